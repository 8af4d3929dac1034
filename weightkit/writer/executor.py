"""Carry out a plan: a worker owns an output file and fills it from front to back.

This process holds the target: the names of files, the journal and the seal are its work alone. Who fills the files is
the executor's matter: threads here, or others elsewhere.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from weightkit.checkpoint import Reader
from weightkit.checkpoint.dtypes import itemsize
from weightkit.checkpoint.folder import LOCK_NAME
from weightkit.checkpoint.index import INDEX_NAME
from weightkit.checkpoint.lock import Lock, LockedFile
from weightkit.checkpoint.once import READ_AHEAD_BYTES, OnceReader
from weightkit.checkpoint.reading import SCRATCH_BYTES
from weightkit.checkpoint.tensors import (
    BlockQuantized,
    Cast,
    Concat,
    LazyTensor,
    Narrow,
    Stored,
    is_plain,
    size_bytes,
)
from weightkit.compute import CpuEngine, EngineSupply, StartingEngine, strip_bytes
from weightkit.compute.engines import SLOTS
from weightkit.compute.evaluate import STRIP_ROWS
from weightkit.durable import FULL, PARTIAL, STATE_DIR, Hold, no_space, only_writer, sync_folder, write_whole
from weightkit.errors import DeviceError, Interrupted, PlanError, WriteError
from weightkit.machine import JOBS
from weightkit.progress import Progress as ProgressBar
from weightkit.remote.ranges import RemoteFiles
from weightkit.units import counted, human_bytes, human_seconds
from weightkit.writer.files import AHEAD_BYTES, FileWriter, Promises, is_promised
from weightkit.writer.journal import Journal, Progress
from weightkit.writer.pieces import STRIP_BYTES
from weightkit.writer.plan import Plan, PlannedFile
from weightkit.writer.sourcing import SPOOL_DIR, SourceRecord, Sourcing, plan_sourcing, remote_sources
from weightkit.writer.spool import Spool, SpoolingReader, clear_spool
from weightkit.writer.stream import BUFFER_BYTES, BUFFERS
from weightkit.writer.target import clear_target, inspect_target, require_memory, require_space


@dataclass(frozen=True)
class Written:
    """What a write did.

    Attributes:
        target: the folder.
        files: number of weight files in it.
        size_bytes: their bytes.
        written_bytes: those of them that this run wrote; the rest was there from an earlier run.
        read_bytes: bytes read from the source.
        wall_s: seconds.
        verified: the remote sources of which nothing was used but what their recorded SHA-256 covers.
        unverified: the other remote sources.
    """

    target: Path
    files: int
    size_bytes: int
    written_bytes: int
    read_bytes: int
    wall_s: float
    verified: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Plain values by field."""
        return asdict(self) | {"target": str(self.target)}

    def render(self) -> str:
        """One line for a terminal."""
        if not self.written_bytes:
            return f"{self.target}: complete already, {counted(self.files, 'file')}, {human_bytes(self.size_bytes)}."
        rate = human_bytes(self.written_bytes / max(self.wall_s, 1e-9))
        kept = self.size_bytes - self.written_bytes
        resumed = f", {human_bytes(kept)} kept from an earlier run" if kept else ""
        return (
            f"{self.target}: {counted(self.files, 'file')}, {human_bytes(self.size_bytes)}"
            f" in {human_seconds(self.wall_s)} ({rate}/s{resumed}).{self._sources()}"
        )

    def _sources(self) -> str:
        """What was verified of a remote source."""
        if not self.unverified:
            return f"\n{counted(len(self.verified), 'source file')}, each verified whole." if self.verified else ""
        names = [path.rpartition("/")[2] for path in self.unverified]
        total = counted(len(self.verified) + len(names), "source file")
        some = ", ".join(names[:4]) + (f" and {len(names) - 4:,} more" if len(names) > 4 else "")
        return f"\nNot verified whole: {len(names):,} of {total} ({some})."


def peak_memory_bytes(plan: Plan, jobs: int) -> int:
    """The most that the workers' buffers take, beyond what Python and its libraries do."""
    strip = max(STRIP_BYTES, _largest_strip(plan))
    computed = _computing(plan) * strip
    return min(jobs, len(plan.files)) * (BUFFERS * BUFFER_BYTES + SCRATCH_BYTES + READ_AHEAD_BYTES + strip + computed)


def _computing(plan: Plan) -> int:
    """What computing a strip takes, in strips: its sources, two sets of them on a GPU, and where it is put together;
    parts that are computed to be joined or cut are held beside the whole."""
    computed = plan.computed
    widest = max((itemsize(each.source.dtype) for each in computed if isinstance(each, BlockQuantized)), default=0)
    beside = any(map(_is_gathered, computed))
    return 1 + (SLOTS + beside) * widest if widest else (2 + beside) * bool(computed)


def _is_gathered(tensor: LazyTensor) -> bool:
    """Whether it is joined of, or cut from, what is computed."""
    match tensor:
        case Narrow() | Concat():
            return not is_plain(tensor)
        case Cast(source=source) | BlockQuantized(source=source):
            return _is_gathered(source)
    return False


def _largest_strip(plan: Plan) -> int:
    """Bytes of the largest strip that is assembled or computed; stored tensors are copied as they are."""
    return max(
        (
            max(
                size_bytes(tensor) // tensor.shape[0] * min(STRIP_ROWS, tensor.shape[0]),
                min(size_bytes(tensor), strip_bytes(tensor, STRIP_BYTES)),
            )
            for file in plan.files
            for tensor in file.tensors.values()
            if not isinstance(tensor, Stored) and tensor.shape and tensor.shape[0]
        ),
        default=0,
    )


#: Starts an engine for the tensors that are to be computed, as ``weightkit.compute.start_engine`` does.
EngineStart = Callable[[Sequence[LazyTensor]], EngineSupply]


class Executor(Protocol):
    """Who fills the files of a plan."""

    def require(self, plan: Plan) -> None:
        """Raises what stands in the way, before anything is written."""
        ...

    def write_files(self, run: Run) -> None:
        """All files that are not done. The first failure stops the others, whose progress is journalled.

        Raises: as ``execute``; ``KeyboardInterrupt`` by Ctrl-C.
        """
        ...


class LocalExecutor:
    """Threads of this process.

    Args:
        jobs: files in work at once; default ``JOBS``.
    """

    def __init__(self, jobs: int | None = None) -> None:
        if jobs is not None and jobs < 1:
            raise PlanError("not a number of jobs", where="--jobs", expected="at least 1", found=jobs)
        self.jobs = jobs or JOBS

    def require(self, plan: Plan) -> None:
        """Raises ``SpaceError`` where memory is too little for so many jobs."""
        require_memory(peak_memory_bytes(plan, self.jobs))

    def write_files(self, run: Run) -> None:
        """All files, ``jobs`` at once; the others stop at their next buffer. See ``Executor``."""
        pool = ThreadPoolExecutor(self.jobs, thread_name_prefix="weightkit")
        try:
            _wait_for([pool.submit(run.write_file, file) for file in run.plan.files])
        finally:
            run.stop.set()
            end_pool(pool)


def execute(
    plan: Plan,
    *,
    jobs: int | None = None,
    engine: EngineSupply | EngineStart | None = None,
    executor: Executor | None = None,
    progress: bool = True,
    force: bool = False,
    spool_bytes: int | None = None,
) -> Written:
    """Write the plan's files. A run that was stopped is continued; one that was finished is left alone.

    Args:
        plan: from ``make_plan``.
        jobs: files in work at once; default ``JOBS``. Not asked with an ``executor``.
        engine: where tensors are computed in this process, or what starts it once it is known which of them are left;
            default the CPU.
        executor: who fills the files; default ``LocalExecutor(jobs)``. The bytes do not depend on it.
        progress: show a bar.
        force: replace what an earlier write left in the target.
        spool_bytes: most disk for remote source files on their way: those whose SHA-256 is recorded are fetched whole
            into the target's state folder, verified, read and dropped; 0 reads ranges alone and verifies no file
            whole. Default what is in work at once, as far as the disk has it. An ``executor`` has no spool.

    Raises:
        TargetError, SpaceError, PlanError: before anything is written.
        DeviceError: the engine cannot be started, before anything is written; or it fails on the way.
        SourceChangedError, FormatError: a source file is not what it was, or ends early.
        ChecksumError, HubError: of a remote source; its content is not what is recorded, or it cannot be had.
        SpaceError, WriteError: on the way, of a full or failing disk; the next run continues.
        Interrupted: by Ctrl-C; the next run continues.
    """
    started = time.monotonic()
    own = LocalExecutor(jobs) if executor is None else None
    state = inspect_target(plan, force=force)
    if state.complete:
        _sweep(plan.target)
        return _nothing_to_do(plan, started)
    sourcing = plan_sourcing(plan, state.files, jobs=jobs, limit_bytes=spool_bytes, elsewhere=own is None, force=force)
    require_space(plan, state.files, force=force, beside_bytes=sourcing.lacking_bytes(plan.target))
    if own is not None and sourcing.spooled:
        own = LocalExecutor(sourcing.jobs)
    executor = executor or own or LocalExecutor(jobs)
    executor.require(plan)
    with open_run(plan, engine=engine, progress=progress, force=force, sourcing=sourcing) as run:
        if run is None:
            return _nothing_to_do(plan, started)
        try:
            executor.write_files(run)
        except KeyboardInterrupt as exc:
            raise Interrupted("stopped; what was written is kept", where=plan.target, fix=CONTINUE) from exc
        verified, unverified = run.sources.sorted_out(remote_sources(plan))
        run.seal()
        return Written(
            plan.target,
            len(plan.files),
            plan.bytes_written,
            run.written_bytes,
            run.read_bytes,
            time.monotonic() - started,
            verified,
            unverified,
        )


@contextmanager
def open_run(
    plan: Plan,
    *,
    engine: EngineSupply | EngineStart | None,
    progress: bool,
    force: bool,
    promises: Promises | None = None,
    sourcing: Sourcing | None = None,
) -> Iterator[Run | None]:
    """Be the only writer of the plan's target: files are written through the ``Run``, in any order, then sealed.

    None where another run has completed the plan meanwhile. Raises as ``execute``.
    """
    target = plan.target
    with disk_errors(target), _made(target), only_writer(target) as hold:
        state = inspect_target(plan, force=force)  # others may have written until now
        if state.complete:
            yield None
            return
        supply = _supply(engine, plan, state.files)
        if force:
            clear_target(target)
        bar = ProgressBar(plan.bytes_written, target.name, shown=progress, parts=len(plan.files))
        sources = SourceRecord(target)
        if isinstance(supply, StartingEngine):
            supply.tell(bar.tell)
        with _reader(plan, sourcing, state.files, sources, bar.tell) as reader, bar:
            run = Run(plan, reader, supply, bar, dict(state.files), hold, promises, sources)
            try:
                yield run
            finally:
                run.journal.close()


@contextmanager
def _made(target: Path) -> Iterator[None]:
    """The folder, made where it is not there; taken away again where nothing came into it."""
    is_new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if is_new:
            with suppress(OSError):  # not empty
                target.rmdir()


def _supply(engine: EngineSupply | EngineStart | None, plan: Plan, files: Mapping[str, Progress]) -> EngineSupply:
    """The engine, which is started only for tensors that are left to compute."""
    if engine is not None and not callable(engine):
        return engine
    left = [file for file in plan.files if not _is_done(plan, file, files.get(file.name))]
    computed = [tensor for file in left for tensor in file.computed]
    return engine(computed) if engine is not None and computed else CpuEngine()


def _is_done(plan: Plan, file: PlannedFile, before: Progress | None) -> bool:
    final = plan.target / file.name
    return before is not None and before.done and final.exists() and final.stat().st_size == file.size_bytes


def _reader(
    plan: Plan,
    sourcing: Sourcing | None,
    files: Mapping[str, Progress],
    sources: SourceRecord,
    tell: Callable[[str], None],
) -> Reader:
    """Reads the sources of what is left; remote ones by a spool, where they are verified."""
    for path in sourcing.unverified if sourcing is not None else ():
        sources.ranges(path)
    if sourcing is None or not sourcing.spooled:
        kind = OnceReader if plan.reads_once else Reader
        return kind(plan.stamps, ahead_bytes=AHEAD_BYTES)
    left = [(file, files.get(file.name)) for file in plan.files]
    outputs = [
        (file, progress.bytes if progress is not None else 0)
        for file, progress in left
        if progress is None or not progress.done
    ]

    def spool(remote: RemoteFiles) -> Spool:
        return Spool(
            plan.target / STATE_DIR / SPOOL_DIR, sourcing, outputs, remote, verified=sources.verified, tell=tell
        )

    return SpoolingReader(plan.stamps, spool, ahead_bytes=AHEAD_BYTES)


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Say what the system says of a disk as a ``WriteError``."""
    try:
        yield
    except OSError as exc:
        if exc.errno in FULL:
            raise no_space(target) from exc
        fix = "Name another target, or mend this one; the same command then goes on."
        raise WriteError(f"cannot be written ({exc.strerror})", where=exc.filename or target, fix=fix) from exc


def _sweep(target: Path) -> None:
    """Take away the state folder that a run left which was killed when all but that was done."""
    if (target / STATE_DIR).exists():
        with suppress(OSError, WriteError), only_writer(target):
            pass


def _nothing_to_do(plan: Plan, started: float) -> Written:
    return Written(plan.target, len(plan.files), plan.bytes_written, 0, 0, time.monotonic() - started)


class Run:
    """One execution of a plan: what its workers share. ``history`` is how far each file is."""

    def __init__(
        self,
        plan: Plan,
        reader: Reader,
        engine: EngineSupply,
        bar: ProgressBar,
        history: dict[str, Progress],
        hold: Hold,
        promises: Promises | None = None,
        sources: SourceRecord | None = None,
    ) -> None:
        self.plan, self.bar, self.history, self.hold = plan, bar, history, hold
        self.sources = sources or SourceRecord(plan.target)
        self.spool = reader.spool if isinstance(reader, SpoolingReader) else None
        self._reader, self._promises = reader, promises
        self._engine, self._files = engine, FileWriter(reader, engine, promises)
        self.written_bytes = 0
        self._read_elsewhere = 0
        self._counting = threading.Lock()
        self.stop = reader.stop
        stamps = {Path(path).name: stamp for path, stamp in plan.stamps.items()}
        names = [*(file.name for file in plan.files), *plan.side_files, LOCK_NAME]
        self.journal = Journal(plan.target, plan.hash, stamps, names)

    @property
    def read_bytes(self) -> int:
        """Bytes read from the source."""
        spooled = self.spool.fetched_bytes if self.spool is not None else 0
        return self._reader.bytes_read + self._read_elsewhere + spooled

    def write_file(self, file: PlannedFile) -> None:
        """One file: to its partial name, synced, checked, renamed, journalled."""
        self._check_stop()
        if self.is_done(file):
            self.bar.add(file.size_bytes)
            self.bar.part_done()
            return
        sha256 = self._fill(file)
        if self._promises is not None and is_promised(file):
            self._promises.settle(file.name)
        if self.spool is not None:
            self.spool.end(file)
        self.place(file, sha256)

    def _fill(self, file: PlannedFile) -> str:
        """The file's SHA-256. Where a GPU fails that nobody insists on, the CPU goes on from what is durable; not of
        sources on their way through a spool, which may be gone from it."""
        told = _Told(self, file)
        try:
            return self._files.fill(self.partial(file), file, self.history.get(file.name), told)
        except DeviceError as exc:
            if self.spool is not None or not isinstance(self._engine, StartingEngine) or not self._engine.fail(exc):
                raise
        self.bar.add(-told.position)
        return self._files.fill(self.partial(file), file, self.history.get(file.name), _Told(self, file))

    def partial(self, file: PlannedFile) -> Path:
        """Where the file is filled."""
        return self.plan.target / (file.name + PARTIAL)

    def place(self, file: PlannedFile, sha256: str) -> None:
        """Give a file that was filled its name, and journal it."""
        self.partial(file).rename(self.plan.target / file.name)
        sync_folder(self.plan.target)
        self.record(file, Progress(file.size_bytes, sha256, done=True))
        self.bar.part_done()

    def is_done(self, file: PlannedFile) -> bool:
        """Whether an earlier run, or this one, has put the file in its place."""
        return _is_done(self.plan, file, self.history.get(file.name))

    def record(self, file: PlannedFile, progress: Progress) -> None:
        """Journal how far a file is."""
        self.journal.record(file.name, progress)
        self.history[file.name] = progress

    def count(self, *, written: int = 0, read: int = 0) -> None:
        """So many bytes of the output and of the source were written and read, other than through ``write_file``."""
        with self._counting:
            self.written_bytes += written
            self._read_elsewhere += read

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise Interrupted("stopped", where=self.plan.target)

    def seal(self) -> None:
        """Side files, lock and, last, the index: the mark that the target is complete."""
        target, sides = self.plan.target, dict(self.plan.side_files)
        locked = {file.name: LockedFile(file.size_bytes, self.history[file.name].sha256) for file in self.plan.files}
        index = b"".join(sides.pop(INDEX_NAME).chunks()) if INDEX_NAME in sides else None
        locked |= {name: _write_side_file(target / name, file.chunks()) for name, file in sides.items()}
        if index is not None:
            locked[INDEX_NAME] = LockedFile(len(index), hashlib.sha256(index).hexdigest())
        lock = Lock(locked, {"plan": self.plan.hash, "source": self.plan.root})
        write_whole(target / LOCK_NAME, lock.to_bytes())
        if index is not None:
            write_whole(target / INDEX_NAME, index)
        clear_spool(target / STATE_DIR / SPOOL_DIR)
        self.sources.remove()
        self.journal.remove()


class _Told:
    """What a run does with the news of a file that it writes itself. See ``Observer``."""

    def __init__(self, run: Run, file: PlannedFile) -> None:
        self._run, self._file = run, file
        self.position = 0

    def check_stop(self) -> None:
        self._run._check_stop()

    def kept(self, count: int) -> None:
        self._run.bar.add(count)
        self.position = count
        if self._run.spool is not None:
            self._run.spool.begin(self._file, count)

    def wrote(self, count: int) -> None:
        self.position += count
        if self._run.spool is not None:
            self._run.spool.passed(self._file, self.position)
        self._run.count(written=count)
        self._run.bar.add(count)

    def durable(self, progress: Progress) -> None:
        self._run.record(self._file, progress)


CONTINUE = "Run the same command again: it continues where it stopped."


def end_pool(pool: ThreadPoolExecutor) -> None:
    """Wait for the workers, whatever is pressed: until they are through, files and the target are theirs."""
    while True:
        try:
            return pool.shutdown(wait=True, cancel_futures=True)
        except KeyboardInterrupt:
            continue  # they were told to stop, and do so at their next buffer


def _wait_for(futures: list[Future[None]]) -> None:
    """Return when all are done; raise the first failure. Wakes often, so that Ctrl-C is seen."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()


def _write_side_file(path: Path, chunks: Iterable[bytes]) -> LockedFile:
    """A side file, whole or not at all; its size and checksum."""
    digest, size = hashlib.sha256(), 0

    def counted() -> Iterator[bytes]:
        nonlocal size
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            yield chunk

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, counted())
    return LockedFile(size, digest.hexdigest())
