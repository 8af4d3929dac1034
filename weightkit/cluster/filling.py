"""What a node does: it fills one file, under the eyes of the process that holds the target."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

from weightkit.checkpoint import LazyTensor, Reader
from weightkit.checkpoint.stamp import Stamp
from weightkit.cluster.news import EVERY_S, Desk, News, tell
from weightkit.cluster.sight import SHARE, require_build, require_seen
from weightkit.compute import CpuEngine, Engine, EngineSupply, start_engine
from weightkit.compute.engines import UNUSABLE, DeviceName, cuda_errors, reason
from weightkit.compute.starting import StartingEngine, has_kernel, shown_names
from weightkit.durable import STATE_DIR, is_held
from weightkit.errors import ClusterError, DeviceError
from weightkit.sha256 import hash_apart
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
        device: ``auto`` takes the node's GPUs, and its CPU, which is told, where they cannot be used.
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


def look(place: Place, stamps: Mapping[str, Stamp], expected: str) -> None:
    """Whether this node can do the work.

    Raises:
        ClusterError: another weightkit, or a target or sources that are not what the process with the plan sees.
        WriteError: the target cannot be written to from here.
    """
    require_build(expected)
    if not place.is_held:
        raise ClusterError("this node does not see the target", where=place.target, fix=SHARE)
    require_seen(stamps)
    with disk_errors(place.target), TemporaryFile(dir=place.target / STATE_DIR):
        pass  # it may write there


def write_file(order: Order) -> Iterator[News]:
    """Fill a file; the result is its SHA-256.

    Under ``cuda`` a task whose GPU has failed keeps it until the run is over, its last word said: Ray would give it to
    the next task, which would fail on it too, while tasks on the node's other GPUs take longer.
    """
    failed = False
    with closing(tell(partial(_fill, order), lambda: order.place.is_held)) as told:
        for news in told:
            failed = type(news.error) is DeviceError
            yield news
    while failed and order.device == "cuda" and order.place.is_held:
        time.sleep(EVERY_S)


def _fill(order: Order, desk: Desk) -> str:
    hash_apart()
    target = order.place.target
    with (
        _environment(order.endpoints),
        disk_errors(target),
        Reader(order.stamps, ahead_bytes=AHEAD_BYTES, stop=desk.stop) as reader,
    ):
        engine = _engine(order)
        desk.read_bytes = lambda: reader.bytes_read
        if isinstance(engine, NodeEngine):
            desk.gpu, desk.gpu_failure = engine.gpu, lambda: engine.failure
        writer = FileWriter(reader, engine)
        with _failing(engine):
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


class NodeEngine:
    """The GPUs that Ray gave to this process: on the CPU until they are ready. See ``EngineSupply``.

    Under ``auto`` the CPU also goes on where they cannot be used, which Ray cannot know: it counts what somebody said
    that there is, or what lies in ``/dev``. CUDA that failed once is not asked again in the same process.

    Attributes:
        gpu: what its node calls the GPU, where it is one: Ray shows it alone to the process.
    """

    def __init__(self, device: DeviceName, work: Sequence[LazyTensor]) -> None:
        self.device = device
        shown = shown_names()
        self.gpu = shown[0] if len(shown) == 1 else None
        self._failure: DeviceError | None = None
        self._supply: EngineSupply = CpuEngine()
        try:
            self._supply = start_engine("cuda", work)
            if isinstance(self._supply, StartingEngine):
                self._supply.tell(_log)
        except DeviceError as exc:
            self.fail(exc)
        except Exception as exc:  # torch may not be there, or fail in any way
            self.fail(DeviceError(UNUSABLE, where="--device", found=reason(exc), fix="Use --device cpu."))

    @property
    def failure(self) -> str | None:
        """Why the CPU computes for good, in a few words; None while that is not known."""
        if self._failure is None:
            with suppress(DeviceError):
                self.now()
        return None if self._failure is None else reason(self._failure)

    def now(self) -> Engine:
        try:
            if self._failure is None:
                return self._supply.now()
        except DeviceError as exc:
            self.fail(exc)
        if self._failure is not None and self.device == "cuda":
            raise self._failure
        return self._supply.now()

    def fail(self, failure: DeviceError) -> None:
        """From now on the CPU computes; under ``cuda``, nobody."""
        if self._failure is None:
            _log(f"The GPU cannot be used ({reason(failure)}).")
        self._supply, self._failure = CpuEngine(), failure


@contextmanager
def _failing(engine: EngineSupply) -> Iterator[None]:
    """A GPU that fails within is a ``DeviceError``, and not used again by this process."""
    if not isinstance(engine, NodeEngine):
        yield
        return
    try:
        with _device_errors():
            yield
    except DeviceError as exc:
        engine.fail(exc)
        raise


@contextmanager
def _device_errors() -> Iterator[None]:
    try:
        yield
    except Exception:
        if "torch" not in sys.modules:
            raise
        with cuda_errors("the GPU"):
            raise


#: One a process, which serves several tasks one after the other.
_engines: dict[DeviceName, NodeEngine] = {}


def _engine(order: Order) -> EngineSupply:
    """The first task that needs a GPU starts it, with its own kernels: however small its share of the work, more
    follow."""
    work = order.file.computed
    if order.device == "cpu" or not any(map(has_kernel, work)):
        return CpuEngine()
    if order.device not in _engines:
        _engines[order.device] = NodeEngine(order.device, work)
    return _engines[order.device]


def _log(line: str) -> None:
    """Into the worker's log, which Ray keeps."""
    print(line, file=sys.stderr, flush=True)
