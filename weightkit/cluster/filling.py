"""What a node does: it fills one file, under the eyes of the process that holds the target."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

from weightkit.checkpoint import Reader
from weightkit.checkpoint.stamp import Stamp
from weightkit.cluster.news import Desk, News, tell
from weightkit.cluster.sight import SHARE, require_seen, require_version
from weightkit.compute import CpuEngine, EngineSupply, StartingEngine, start_engine
from weightkit.compute.engines import DeviceName
from weightkit.compute.starting import has_kernel
from weightkit.durable import STATE_DIR, is_held
from weightkit.errors import ClusterError
from weightkit.writer.executor import disk_errors
from weightkit.writer.files import AHEAD_BYTES, FileWriter
from weightkit.writer.journal import Progress
from weightkit.writer.plan import PlannedFile


@dataclass(frozen=True)
class Place:
    """A target, absolute, and who holds it."""

    target: Path
    hold: str

    @property
    def is_held(self) -> bool:
        return is_held(self.target, self.hold)


@dataclass(frozen=True)
class Order:
    """What a task needs to fill one file; all paths are absolute.

    Attributes:
        partial: where it is filled.
        before: what an earlier attempt made durable there.
        stamps: of the source files that this one is made from.
        endpoints: where addresses are asked for, as ``weightkit.remote.address.endpoints`` has it. Who asks is the
            node's own matter: no token travels.
    """

    place: Place
    file: PlannedFile
    partial: Path
    before: Progress | None
    stamps: Mapping[str, Stamp]
    device: DeviceName
    endpoints: Mapping[str, str]


def look(place: Place, stamps: Mapping[str, Stamp], version: str) -> None:
    """Whether this node can do the work.

    Raises:
        ClusterError: another weightkit, or a target or sources that are not what the process with the plan sees.
        WriteError: the target cannot be written to from here.
    """
    require_version(version)
    if not place.is_held:
        raise ClusterError("this node does not see the target", where=place.target, fix=SHARE)
    require_seen(stamps)
    with disk_errors(place.target), TemporaryFile(dir=place.target / STATE_DIR):
        pass  # it may write there


def write_file(order: Order) -> Iterator[News]:
    """Fill a file; the result is its SHA-256."""
    yield from tell(partial(_fill, order), lambda: order.place.is_held)


def _fill(order: Order, desk: Desk) -> str:
    target = order.place.target
    with (
        _environment(order.endpoints),
        disk_errors(target),
        Reader(order.stamps, ahead_bytes=AHEAD_BYTES, stop=desk.stop) as reader,
    ):
        desk.read_bytes = lambda: reader.bytes_read
        writer = FileWriter(reader, _engine(order))
        return writer.fill(order.partial, order.file, order.before, desk)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """The environment with some variables set; the process serves other commands later, and gets its own back."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


_engines: dict[DeviceName, EngineSupply] = {}


def _engine(order: Order) -> EngineSupply:
    """One a process, which serves several tasks one after the other; the first that needs it starts it, with its own
    kernels. However small a task's share of the work, more follow."""
    work = order.file.computed
    if not any(map(has_kernel, work)):
        return CpuEngine()
    if order.device not in _engines:
        engine = _engines[order.device] = start_engine(order.device, work, worth_bytes=0)
        if isinstance(engine, StartingEngine):
            engine.tell(_log)
    return _engines[order.device]


def _log(line: str) -> None:
    """Into the worker's log, which Ray keeps. A failure under ``cuda`` is the task's error besides."""
    print(line, file=sys.stderr, flush=True)
