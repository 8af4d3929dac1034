"""One output file, from front to back: planned, then a whole partial file on the disk. It may be written anywhere that
sees source and target; its final name is given by the process that holds the target.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from weightkit.checkpoint import Reader, read_header
from weightkit.checkpoint.copies import Copy
from weightkit.checkpoint.reading import Bytes
from weightkit.checkpoint.tensors import Promised, size_bytes
from weightkit.compute import EngineSupply, KeptScales, Started, start
from weightkit.compute.engines import Here
from weightkit.errors import WriteError
from weightkit.sha256 import Digest, sha256
from weightkit.writer.journal import Progress
from weightkit.writer.pieces import Copied, Made, may_leave_range, pieces, require_in_range
from weightkit.writer.plan import PlannedFile
from weightkit.writer.spool import SpoolingReader
from weightkit.writer.stream import BUFFER_BYTES, AppendStream

#: A worker's next reads, which the disk is to begin with: 16 MB were as good as 64.
AHEAD_BYTES = 16 << 20
#: Strips that a device computes while the next one is read.
STARTED = 1
#: A file's progress is made durable this often; a stop by kill -9 loses at most so much of each file in work.
DURABLE_EVERY_BYTES = 1 << 30


class Promises(Protocol):
    """Who delivers the ``Promised`` tensors of a plan."""

    def take(self, name: str) -> Bytes:
        """The tensor's bytes, flat; waits until they are made. Asked once for each, in the order of the file."""
        ...

    def settle(self, file: str) -> None:
        """Waits for what must be on the disk before a file of theirs, whole by now, gets its name."""
        ...


class Observer(Protocol):
    """Who is told how a file goes. All of it happens on the thread that writes."""

    def check_stop(self) -> None:
        """Raises ``Interrupted`` where the write is to stop."""
        ...

    def kept(self, count: int) -> None:
        """``count`` bytes are there from an earlier run."""
        ...

    def wrote(self, count: int) -> None:
        """``count`` bytes more are on their way to the disk."""
        ...

    def durable(self, progress: Progress) -> None:
        """So much of the partial file is safe."""
        ...


class FileWriter:
    """Fills partial files.

    Args:
        reader: of the source files.
        engine: where tensors are computed.
        promises: where some of them are made elsewhere.
    """

    def __init__(self, reader: Reader, engine: EngineSupply, promises: Promises | None = None) -> None:
        self._reader, self._engine, self._promises = reader, engine, promises
        # a spool makes room by what was written: it cannot be asked for more while that is held back
        self._ahead = 0 if isinstance(reader, SpoolingReader) else STARTED

    def fill(self, partial: Path, file: PlannedFile, before: Progress | None, observer: Observer) -> str:
        """Write ``file`` to ``partial``, synced and held against the plan. Returns its SHA-256.

        Two that fill the same file at once write the same bytes to the same places.

        Args:
            before: what an earlier attempt made durable there.
            observer: after a failure it is told, last, how much is safe.
        """
        kept, digest = (0, None) if is_promised(file) else _durable_prefix(partial, file, before, observer)
        observer.kept(kept)
        stream = AppendStream(partial, file.size_bytes, resume_at=kept, digest=digest)
        try:
            self._append(stream, file, kept, observer)
            sha256 = stream.finish()
        except BaseException:
            _keep(stream, file, observer)
            raise
        _require_as_planned(partial, file)
        return sha256

    def _append(self, stream: AppendStream, file: PlannedFile, durable: int, observer: Observer) -> None:
        observer.wrote(stream.append(np.frombuffer(file.header, np.uint8)))
        resumable = not is_promised(file)
        left = itertools.dropwhile(lambda piece: stream.skip(piece.size_bytes), pieces(file.tensors))
        for piece, started in self._begun(left, observer):
            if isinstance(piece, Copied):
                self._copy(stream, piece.copy, observer)
            else:
                observer.wrote(_land(stream, piece, started or Here(self._promised(piece))))
            if resumable and stream.position - durable >= DURABLE_EVERY_BYTES:
                durable = stream.position
                observer.durable(Progress(*stream.make_durable()))

    def _begun(
        self, left: Iterable[Copied | Made], observer: Observer
    ) -> Iterator[tuple[Copied | Made, Started | None]]:
        """Each piece in its turn, begun where it is computed here: one that a device computes only once the next is
        begun too, so that reading and computing overlap."""
        waiting: deque[tuple[Made, Started]] = deque()
        kept = KeptScales()
        for piece in left:
            observer.check_stop()
            if isinstance(piece, Copied) or self._is_promised(piece):
                yield from _emptied(waiting)
                yield piece, None
                continue
            started = start(piece.strip, self._reader, self._engine.now(), kept)
            if started.is_here and any(may_leave_range(earlier) for earlier, _ in waiting):
                started = Here(started.bytes().copy())  # those before it come into the same scratch, to be looked at
            waiting.append((piece, started))
            while len(waiting) > (0 if started.is_here else self._ahead):
                yield waiting.popleft()
        yield from _emptied(waiting)

    def _is_promised(self, piece: Made) -> bool:
        return isinstance(piece.strip, Promised) and self._promises is not None

    def _promised(self, piece: Made) -> Bytes:
        if self._promises is None:
            raise WriteError("nobody makes the tensor", where=piece.name, fix="Report this, with the command.")
        return self._promises.take(piece.name)

    def _copy(self, stream: AppendStream, copy: Copy, observer: Observer) -> None:
        def read_into(start: int, out: Bytes) -> None:
            observer.check_stop()
            self._reader.read_range(copy.path, copy.offset + start, out)
            observer.wrote(len(out))

        stream.fill(copy.run_bytes, read_into)


def _land(stream: AppendStream, piece: Made, started: Started) -> int:
    """Append a strip: from a device straight into the stream's buffers, unless its values are to be looked at. Returns
    how many of its bytes were not there already."""
    if started.is_here or may_leave_range(piece):
        data = started.bytes()
        require_in_range(piece, data)
        return stream.append(data)
    stream.pin(started.pin)
    return stream.fill(piece.size_bytes, started.copy_to)


T = TypeVar("T")


def _emptied(waiting: deque[T]) -> Iterator[T]:
    while waiting:
        yield waiting.popleft()


def is_promised(file: PlannedFile) -> bool:
    """Whether it holds what is made elsewhere: made again it might have other bytes, which must not meet the old ones
    within one file, so such a file is never continued."""
    return any(isinstance(tensor, Promised) for tensor in file.tensors.values())


def _durable_prefix(
    partial: Path, file: PlannedFile, before: Progress | None, observer: Observer
) -> tuple[int, Digest | None]:
    """How much of a partial file can be trusted: what the journal vouches for and still hashes as it says."""
    if before is None or before.done or not partial.exists() or partial.stat().st_size < before.bytes:
        return 0, None
    digest, left = sha256(file.size_bytes), before.bytes
    with partial.open("rb", buffering=0) as opened:
        while left and (block := opened.read(min(left, BUFFER_BYTES))):
            observer.check_stop()
            digest.update(block)
            left -= len(block)
    return (before.bytes, digest) if not left and digest.hexdigest() == before.sha256 else (0, None)


def _keep(stream: AppendStream, file: PlannedFile, observer: Observer) -> None:
    """After a failure: tell what is safe, so that the next run continues there."""
    try:
        progress = Progress(*stream.make_durable())
        if progress.bytes and not is_promised(file):
            observer.durable(progress)
    except (OSError, WriteError):
        pass  # the disk that failed may fail again; the last durable line still holds
    finally:
        stream.close()


def _require_as_planned(path: Path, file: PlannedFile) -> None:
    """Read the header of what was written, and hold it against the plan."""
    header = read_header(path)
    written = [(entry.name, entry.dtype, entry.shape) for entry in header.entries if entry.end > entry.begin]
    planned = [(name, tensor.dtype, tensor.shape) for name, tensor in file.tensors.items() if size_bytes(tensor)]
    if written != planned or header.file_size != file.size_bytes:
        raise WriteError(
            "the file that was written is not what was planned", where=path, fix="Report this, with the command."
        )
