"""Files read once, from front to back, for several purposes: checksum, values, replicas. A thread owns a file.

Memory is ``CHUNK_BYTES`` a thread, whatever the files' sizes; ``READ_AHEAD_BYTES`` more where they are read past the
page cache, ``WINDOW_BYTES`` where they are remote.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from weightkit.checkpoint import Entry, Header, Reader
from weightkit.checkpoint.dtypes import DTYPE_BITS
from weightkit.checkpoint.once import ReadAhead, open_once
from weightkit.checkpoint.reading import Bytes
from weightkit.errors import FormatError, WeightkitError
from weightkit.layouts.opening import FETCH, READABLE
from weightkit.machine import JOBS
from weightkit.progress import Progress
from weightkit.remote.path import RemotePath

CHUNK_BYTES = 4 << 20
#: Of a remote file so much is read at once, and held in memory.
WINDOW_BYTES = 32 << 20


class Consumer(Protocol):
    """What is done with a file's bytes. Before the first of them it can be sent to another process, which feeds it."""

    def feed(self, offset: int, chunk: Bytes) -> None:
        """The bytes at ``offset`` of the file; the array is overwritten afterwards."""
        ...

    def finish(self) -> Iterable[WeightkitError]:
        """After the last byte: what is wrong."""
        ...


@dataclass(frozen=True)
class Reading:
    """A file to be read.

    Attributes:
        spans: [start, stop) byte ranges, ascending.
        header: where it is given, no chunk ends inside an element.
    """

    path: Path
    spans: Sequence[tuple[int, int]]
    consumers: Sequence[Consumer]
    header: Header | None = None

    @property
    def size_bytes(self) -> int:
        return sum(stop - start for start, stop in self.spans)


class Readers(Protocol):
    """Who reads files, other than threads of this process."""

    def read_all(self, readings: Sequence[Reading], *, desc: str, progress: bool) -> list[WeightkitError]:
        """As ``read_all``. What consumers hold comes back only from those that have an ``adopt``."""
        ...


def read_all(readings: Sequence[Reading], *, jobs: int | None, desc: str, progress: bool) -> list[WeightkitError]:
    """Feed every file to its consumers, largest first; what they and the reading itself found, in the order given.

    Ctrl-C stops all threads within a chunk and is raised again.
    """
    stop = threading.Event()
    bar = Progress(sum(reading.size_bytes for reading in readings), desc, shown=progress, parts=len(readings))

    def work(reading: Reading) -> list[WeightkitError]:
        try:
            return read_one(reading, bar.add, stop)
        finally:
            bar.part_done()

    order = sorted(range(len(readings)), key=lambda number: -readings[number].size_bytes)
    with bar, ThreadPoolExecutor(jobs or JOBS) as pool:
        futures = {number: pool.submit(work, readings[number]) for number in order}
        try:
            while wait(futures.values(), timeout=0.2).not_done:
                pass  # waking often, so that Ctrl-C is seen
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        return [problem for number in range(len(readings)) for problem in futures[number].result()]


def read_one(reading: Reading, count: Callable[[int], None], stop: threading.Event) -> list[WeightkitError]:
    """Feed a file to its consumers. What they and the reading itself found; once ``stop`` is set, nothing of use.

    Args:
        count: is told the bytes of each chunk.
    """
    try:
        _read(reading, count, stop)
    except WeightkitError as problem:
        return [problem]
    except OSError as exc:
        return [FormatError(f"cannot be read ({exc.strerror})", where=reading.path, fix=READABLE)]
    return [problem for consumer in reading.consumers for problem in consumer.finish()]


def _read(reading: Reading, count: Callable[[int], None], stop: threading.Event) -> None:
    with _opened(reading, stop) as fill:
        buffer = np.empty(min(CHUNK_BYTES, max((end - at for at, end in reading.spans), default=0)), np.uint8)
        for offset, length in _chunks(reading):
            if stop.is_set():
                return
            chunk = buffer[:length]
            fill(offset, chunk)
            for consumer in reading.consumers:
                consumer.feed(offset, chunk)
            count(length)


@contextmanager
def _opened(reading: Reading, stop: threading.Event) -> Iterator[Callable[[int, Bytes], None]]:
    """What fills a chunk from an offset of the file on."""
    if isinstance(reading.path, RemotePath):
        with Reader(stop=stop) as reader:
            yield _Window(reader, str(reading.path), reading.spans).fill
        return
    with ExitStack() as stack:
        file = os.open(reading.path, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, file)
        direct = open_once(file)
        if direct is None:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        else:
            stack.callback(os.close, direct)
        ahead = stack.enter_context(closing(ReadAhead())) if direct is not None else None

        def fill(offset: int, chunk: Bytes) -> None:
            nonlocal direct
            done = 0
            if ahead is not None and direct is not None:
                try:
                    done = ahead.read(direct, offset, chunk)
                except OSError:  # the plain read says it, if it has it too
                    direct = None
            _fill(file, offset + done, chunk[done:], reading.path)

        yield fill


class _Window:
    """A remote file, read from front to back: so much of it at once that several connections are at work."""

    def __init__(self, reader: Reader, address: str, spans: Sequence[tuple[int, int]]) -> None:
        self._reader, self._address, self._spans = reader, address, spans
        self._start, self._held = 0, np.empty(0, np.uint8)

    def fill(self, offset: int, chunk: Bytes) -> None:
        begin = offset - self._start
        if begin < 0 or begin + len(chunk) > len(self._held):
            end = next(end for at, end in self._spans if at <= offset < end)
            self._start, begin = offset, 0
            self._held = np.empty(min(WINDOW_BYTES, end - offset), np.uint8)
            self._reader.read_range(self._address, offset, self._held)
        chunk[:] = self._held[begin : begin + len(chunk)]


def _chunks(reading: Reading) -> Iterator[tuple[int, int]]:
    """Offset and length of each read: at most ``CHUNK_BYTES``, and no element in two of them."""
    header = reading.header
    begins = [] if header is None else [header.data_offset + entry.begin for entry in header.entries]
    for start, stop in reading.spans:
        while start < stop:
            end = min(start + CHUNK_BYTES, stop)
            if header is not None and end < stop and (number := bisect_right(begins, end) - 1) >= 0:
                end -= (end - begins[number]) % max(1, DTYPE_BITS[header.entries[number].dtype] // 8)
            yield start, end - start
            start = end


def _fill(file: int, offset: int, chunk: Bytes, path: Path) -> None:
    view, done = chunk.data, 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], offset + done)
        if count == 0:
            raise FormatError("the file ends early", where=path, found=f"{offset + done:,} bytes", fix=FETCH)
        done += count


class Pieces:
    """Which tensors a chunk holds parts of."""

    def __init__(self, header: Header) -> None:
        self._entries = header.entries
        self._base = header.data_offset
        self._ends = [header.data_offset + entry.end for entry in header.entries]

    def of(self, offset: int, chunk: Bytes) -> Iterator[tuple[Entry, int, Bytes]]:
        """Entry, offset in its bytes, and bytes, for each tensor that the chunk at ``offset`` of the file touches."""
        stop = offset + len(chunk)
        for number in range(bisect_right(self._ends, offset), len(self._entries)):
            entry = self._entries[number]
            begin = self._base + entry.begin
            if begin >= stop:
                return
            low, high = max(begin, offset), min(self._ends[number], stop)
            if low < high:
                yield entry, low - begin, chunk[low - offset : high - offset]
