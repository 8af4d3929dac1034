"""Carry out a plan: a worker owns an output file and fills it from front to back."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from weightkit.checkpoint import Reader, read_header
from weightkit.checkpoint.copies import Copy
from weightkit.checkpoint.folder import LOCK_NAME
from weightkit.checkpoint.index import INDEX_NAME
from weightkit.checkpoint.lock import Lock, LockedFile
from weightkit.checkpoint.reading import SCRATCH_BYTES, Bytes
from weightkit.checkpoint.tensors import Promised, Stored, size_bytes
from weightkit.compute import CpuEngine, Engine, evaluate, strip_bytes
from weightkit.compute.evaluate import STRIP_ROWS
from weightkit.durable import FULL, PARTIAL, STATE_DIR, no_space, only_writer, sync_folder, write_whole
from weightkit.errors import Interrupted, PlanError, WriteError
from weightkit.machine import default_jobs
from weightkit.progress import Progress as ProgressBar
from weightkit.units import counted, human_bytes, human_seconds
from weightkit.writer.journal import Journal, Progress
from weightkit.writer.pieces import STRIP_BYTES, Copied, Made, pieces, require_in_range
from weightkit.writer.plan import Plan, PlannedFile
from weightkit.writer.stream import BUFFER_BYTES, BUFFERS, AppendStream
from weightkit.writer.target import clear_target, inspect_target, require_memory, require_space

#: A worker's next reads, which the disk is to begin with: 16 MB were as good as 64.
AHEAD_BYTES = 16 << 20
#: A file's progress is made durable this often; a stop by kill -9 loses at most so much of each file in work.
DURABLE_EVERY_BYTES = 1 << 30


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
    """

    target: Path
    files: int
    size_bytes: int
    written_bytes: int
    read_bytes: int
    wall_s: float

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
            f" in {human_seconds(self.wall_s)} ({rate}/s{resumed})."
        )


def peak_memory_bytes(plan: Plan, jobs: int) -> int:
    """The most that the workers' buffers take, beyond what Python and its libraries do."""
    strip = max(STRIP_BYTES, _largest_strip(plan))
    computed = 2 * strip if plan.computed_tensors else 0
    return min(jobs, len(plan.files)) * (BUFFERS * BUFFER_BYTES + SCRATCH_BYTES + strip + computed)


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


def execute(
    plan: Plan, *, jobs: int | None = None, engine: Engine | None = None, progress: bool = True, force: bool = False
) -> Written:
    """Write the plan's files. A run that was stopped is continued; one that was finished is left alone.

    Args:
        plan: from ``make_plan``.
        jobs: files in work at once; default ``default_jobs()``.
        engine: where tensors are computed; default the CPU.
        progress: show a bar.
        force: replace what an earlier write left in the target.

    Raises:
        TargetError, SpaceError, PlanError: before anything is written.
        SourceChangedError, FormatError: a source file is not what it was, or ends early.
        SpaceError, WriteError: on the way, of a full or failing disk; the next run continues.
        Interrupted: by Ctrl-C; the next run continues.
    """
    started = time.monotonic()
    if jobs is not None and jobs < 1:
        raise PlanError("not a number of jobs", where="--jobs", expected="at least 1", found=jobs)
    state = inspect_target(plan, force=force)
    if state.complete:
        _sweep(plan.target)
        return _nothing_to_do(plan, started)
    require_space(plan, state.files, force=force)
    require_memory(peak_memory_bytes(plan, jobs or default_jobs()))
    with open_run(plan, engine=engine, progress=progress, force=force) as run:
        if run is None:
            return _nothing_to_do(plan, started)
        run.write_files(jobs or default_jobs())
        run.seal()
        return Written(
            plan.target,
            len(plan.files),
            plan.bytes_written,
            run.written_bytes,
            run.reader.bytes_read,
            time.monotonic() - started,
        )


class Promises(Protocol):
    """Who delivers the ``Promised`` tensors of a plan."""

    def take(self, name: str) -> Bytes:
        """The tensor's bytes, flat; waits until they are made. Asked once for each, in the order of the file."""
        ...

    def settle(self, file: str) -> None:
        """Waits for what must be on the disk before a file of theirs, whole by now, gets its name."""
        ...


@contextmanager
def open_run(
    plan: Plan, *, engine: Engine | None, progress: bool, force: bool, promises: Promises | None = None
) -> Iterator[Run | None]:
    """Be the only writer of the plan's target: files are written through the ``Run``, in any order, then sealed.

    None where another run has completed the plan meanwhile. Raises as ``execute``.
    """
    target = plan.target
    try:
        target.mkdir(parents=True, exist_ok=True)
        with only_writer(target):
            state = inspect_target(plan, force=force)  # others may have written until now
            if state.complete:
                yield None
                return
            if force:
                clear_target(target)
            bar = ProgressBar(plan.bytes_written, target.name, shown=progress, parts=len(plan.files))
            with Reader(plan.stamps, ahead_bytes=AHEAD_BYTES) as reader, bar:
                run = Run(plan, reader, engine or CpuEngine(), bar, dict(state.files), promises)
                try:
                    yield run
                finally:
                    run.journal.close()
    except OSError as exc:
        if exc.errno in FULL:
            raise no_space(target) from exc
        raise WriteError(f"cannot be written ({exc.strerror})", where=exc.filename or target) from exc


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
        engine: Engine,
        bar: ProgressBar,
        history: dict[str, Progress],
        promises: Promises | None = None,
    ) -> None:
        self.plan, self.reader, self.engine, self.bar = plan, reader, engine, bar
        self.history = history
        self._promises = promises
        self.written_bytes = 0
        self._counting = threading.Lock()
        self.stop = threading.Event()
        sources = {Path(path).name: stamp for path, stamp in plan.stamps.items()}
        names = [*(file.name for file in plan.files), *plan.side_files, LOCK_NAME]
        self.journal = Journal(plan.target, plan.hash, sources, names)

    def write_files(self, jobs: int) -> None:
        """All files, ``jobs`` at once. The first failure stops the others at their next buffer."""
        pool = ThreadPoolExecutor(jobs, thread_name_prefix="weightkit")
        try:
            _wait_for([pool.submit(self.write_file, file) for file in self.plan.files])
        except KeyboardInterrupt as exc:
            raise Interrupted("stopped; what was written is kept", where=self.plan.target, fix=CONTINUE) from exc
        finally:
            self.stop.set()
            end_pool(pool)

    def write_file(self, file: PlannedFile) -> None:
        """One file: to its partial name, synced, checked, renamed, journalled."""
        self._check_stop()
        final, partial = self.plan.target / file.name, self.plan.target / (file.name + PARTIAL)
        before = self.history.get(file.name)
        if self.is_done(file):
            self.bar.add(file.size_bytes)
            self.bar.part_done()
            return
        promised = _is_promised(file)
        start, digest = (0, None) if promised else self._durable_prefix(partial, before)
        self.bar.add(start)
        stream = AppendStream(partial, file.size_bytes, resume_at=start, digest=digest)
        try:
            self._fill(stream, file)
            sha256 = stream.finish()
        except BaseException:
            self._keep(stream, file)
            raise
        _require_as_planned(partial, file)
        if promised and self._promises is not None:
            self._promises.settle(file.name)
        partial.rename(final)
        sync_folder(self.plan.target)
        self._record(file, Progress(file.size_bytes, sha256, done=True))
        self.bar.part_done()

    def is_done(self, file: PlannedFile) -> bool:
        """Whether an earlier run, or this one, has put the file in its place."""
        before, final = self.history.get(file.name), self.plan.target / file.name
        return before is not None and before.done and final.exists() and final.stat().st_size == file.size_bytes

    def _durable_prefix(self, partial: Path, before: Progress | None) -> tuple[int, hashlib._Hash | None]:
        """How much of a partial file can be trusted: what the journal vouches for and still hashes as it says."""
        if before is None or before.done or not partial.exists() or partial.stat().st_size < before.bytes:
            return 0, None
        digest, left = hashlib.sha256(), before.bytes
        with partial.open("rb", buffering=0) as file:
            while left and (block := file.read(min(left, BUFFER_BYTES))):
                self._check_stop()
                digest.update(block)
                left -= len(block)
        return (before.bytes, digest) if not left and digest.hexdigest() == before.sha256 else (0, None)

    def _fill(self, stream: AppendStream, file: PlannedFile) -> None:
        self._count(stream.append(_as_bytes(file.header)))
        durable, resumable = stream.position, not _is_promised(file)
        for piece in pieces(file.tensors):
            if stream.skip(piece.size_bytes):
                durable = stream.position
                continue
            self._check_stop()
            if isinstance(piece, Copied):
                self._copy(stream, piece.copy)
            else:
                data = self._make(piece)
                require_in_range(piece, data)
                self._count(stream.append(data))
            if resumable and stream.position - durable >= DURABLE_EVERY_BYTES:
                durable = stream.position
                self._record(file, Progress(*stream.make_durable()))

    def _make(self, piece: Made) -> Bytes:
        if isinstance(piece.strip, Promised) and self._promises is not None:
            return self._promises.take(piece.name)
        return evaluate(piece.strip, self.reader, self.engine)

    def _copy(self, stream: AppendStream, copy: Copy) -> None:
        def read_into(start: int, out: Bytes) -> None:
            self._check_stop()
            self.reader.read_range(copy.path, copy.offset + start, out)
            self._count(len(out))

        stream.fill(copy.run_bytes, read_into)

    def _count(self, count: int) -> None:
        with self._counting:
            self.written_bytes += count
        self.bar.add(count)

    def _keep(self, stream: AppendStream, file: PlannedFile) -> None:
        """After a failure: journal what is safe, so that the next run continues there."""
        try:
            progress = Progress(*stream.make_durable())
            if progress.bytes and not _is_promised(file):
                self._record(file, progress)
        except (OSError, WriteError):
            pass  # the disk that failed may fail again; the last durable line still holds
        finally:
            stream.close()

    def _record(self, file: PlannedFile, progress: Progress) -> None:
        self.journal.record(file.name, progress)
        self.history[file.name] = progress

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
        self.journal.remove()


CONTINUE = "Run the same command again: it continues where it stopped."


def _is_promised(file: PlannedFile) -> bool:
    """Whether it holds what is made elsewhere: made again it might have other bytes, which must not meet the old ones
    within one file, so such a file is never continued."""
    return any(isinstance(tensor, Promised) for tensor in file.tensors.values())


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


def _require_as_planned(path: Path, file: PlannedFile) -> None:
    """Read the header of what was written, and hold it against the plan."""
    header = read_header(path)
    written = [(entry.name, entry.dtype, entry.shape) for entry in header.entries if entry.end > entry.begin]
    planned = [(name, tensor.dtype, tensor.shape) for name, tensor in file.tensors.items() if size_bytes(tensor)]
    if written != planned or header.file_size != file.size_bytes:
        raise WriteError(
            "the file that was written is not what was planned", where=path, fix="Report this, with the command."
        )


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


def _as_bytes(content: bytes) -> Bytes:
    return np.frombuffer(content, np.uint8)
