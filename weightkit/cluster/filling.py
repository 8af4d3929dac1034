"""What a node does: it fills one file, under the eyes of the process that holds the target."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryFile

from weightkit.checkpoint import Reader
from weightkit.checkpoint.stamp import Stamp
from weightkit.cluster.news import Desk, News, tell
from weightkit.cluster.sight import SHARE, require_seen, require_version
from weightkit.compute import EngineSupply, start_engine
from weightkit.compute.engines import DeviceName
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
    os.environ.update(order.endpoints)
    with disk_errors(target), Reader(order.stamps, ahead_bytes=AHEAD_BYTES, stop=desk.stop) as reader:
        desk.read_bytes = lambda: reader.bytes_read
        writer = FileWriter(reader, _engine(order.device))
        return writer.fill(order.partial, order.file, order.before, desk)


@cache
def _engine(device: DeviceName) -> EngineSupply:
    """One a process, which serves several tasks one after the other."""
    return start_engine(device)
