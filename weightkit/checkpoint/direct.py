"""Reading past the page cache, for files larger than memory: what it would keep is never there when it is wanted."""

from __future__ import annotations

import os
import random
import threading
import time
from bisect import bisect
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from weightkit.checkpoint.reading import Bytes, Reader
from weightkit.checkpoint.stamp import Stamp
from weightkit.direct_io import ALIGNMENT, O_DIRECT, direct_buffer
from weightkit.remote.address import is_address

#: One read; from 4 MB on larger ones gain nothing.
PIECE_BYTES = 4 << 20
#: Shorter reads, such as rows of an embedding, go through the page cache.
SMALLEST_BYTES = 256 << 10


class DirectReader(Reader):
    """A ``Reader`` whose large reads leave the page cache alone (O_DIRECT).

    Where the file system has no such reads, it reads as others do and tells the kernel to forget the pages.
    """

    #: The disk is what such a reader waits for: one large read, wherever it begins within a block.
    covering_bytes = PIECE_BYTES - ALIGNMENT

    def __init__(self, stamps: Mapping[str, Stamp] | None = None) -> None:
        super().__init__(stamps)
        self._direct: dict[str, int | None] = {}
        self._refused: list[int] = []
        self._direct_lock = threading.Lock()
        self._pieces = threading.local()

    def __enter__(self) -> DirectReader:
        return self

    def close(self) -> None:
        with self._direct_lock:
            for file in (*self._direct.values(), *self._refused):
                if file is not None:
                    os.close(file)
            self._direct.clear()
            self._refused.clear()
        super().close()

    def read_range(self, path: str, offset: int, out: Bytes) -> None:
        """See ``Reader.read_range``."""
        if len(out) < SMALLEST_BYTES or is_address(path):
            super().read_range(path, offset, out)
            return
        done = self._read_direct(path, offset, out)
        if done < len(out):  # no direct reads here, or the file ends early, which the plain read says clearly
            super().read_range(path, offset + done, out[done:])
            _forget(self._open(path), offset + done, len(out) - done)
        if done:
            with self._lock:
                self.bytes_read += done

    def is_direct(self, path: str) -> bool:
        """Whether the file is read past the page cache."""
        return not is_address(path) and self._direct_file(path) is not None

    def _read_direct(self, path: str, offset: int, out: Bytes) -> int:
        """Fill ``out`` from its start by aligned reads; the bytes that are filled."""
        file, done = self._direct_file(path), 0
        if file is None:
            return 0
        piece = self._piece()
        while done < len(out):
            skipped = (offset + done) % ALIGNMENT
            count = min(len(piece), -(-(skipped + len(out) - done) // ALIGNMENT) * ALIGNMENT)
            try:
                count = os.preadv(file, [piece.data[:count]], offset + done - skipped)
            except OSError:
                self._give_up(path)
                break
            taken = min(count - skipped, len(out) - done)
            if taken <= 0:
                break
            out[done : done + taken] = piece[skipped : skipped + taken]
            done += taken
        return done

    def _direct_file(self, path: str) -> int | None:
        if path in self._direct:
            return self._direct[path]
        self._open(path)  # checks the stamp
        with self._direct_lock:
            if path not in self._direct:
                self._direct[path] = open_direct(self._files[path])
            return self._direct[path]

    def _give_up(self, path: str) -> None:
        """This file cannot be read so after all; others may be in the middle of it, so its descriptor stays open."""
        with self._direct_lock:
            file = self._direct[path]
            if file is not None:
                self._refused.append(file)
                self._direct[path] = None

    def _piece(self) -> Bytes:
        """This thread's aligned buffer."""
        held: Bytes | None = getattr(self._pieces, "buffer", None)
        if held is None:
            held = self._pieces.buffer = direct_buffer(PIECE_BYTES)
        return held


@dataclass(frozen=True)
class ReadRate:
    """How fast files are read.

    Attributes:
        bytes_per_s: by all threads together.
        direct: whether past the page cache; else through it, after it was told to forget what is read.
    """

    bytes_per_s: float
    direct: bool


def measure_read_rate(
    files: Mapping[str, int], *, seconds: float = 1.0, jobs: int = 8, run_bytes: int = 4 * PIECE_BYTES
) -> ReadRate:
    """Read at random places of ``files`` (path to size) for a while, so that no cache flatters.

    Args:
        files: the files; empty ones do not count.
        seconds: how long.
        jobs: threads that read.
        run_bytes: bytes that are read on from each place, as one weight is.

    Raises:
        FormatError, MissingFileError: a file that cannot be read.
        ValueError: nothing to read.
    """
    paths = [path for path, size in files.items() if size > 0]
    if not paths:
        raise ValueError("no file to read")
    ends = list(accumulate(files[path] for path in paths))
    with DirectReader() as reader, ThreadPoolExecutor(jobs) as pool:
        direct = all(reader.is_direct(path) for path in paths)
        started = time.perf_counter()

        def work(seed: int) -> None:
            draw, buffer = random.Random(seed), np.empty(run_bytes, np.uint8)
            while time.perf_counter() - started < seconds:
                _read_somewhere(reader, paths, ends, draw, buffer)

        for job in [pool.submit(work, seed) for seed in range(jobs)]:
            job.result()
        return ReadRate(reader.bytes_read / (time.perf_counter() - started), direct)


def _read_somewhere(
    reader: DirectReader, paths: Sequence[str], ends: Sequence[int], draw: random.Random, buffer: Bytes
) -> None:
    place = draw.randrange(ends[-1])
    which = bisect(ends, place)
    size = ends[which] - (ends[which - 1] if which else 0)
    offset = draw.randrange(max(1, size - len(buffer)))
    out = buffer[: min(len(buffer), size - offset)]
    if not is_address(paths[which]) and not reader.is_direct(paths[which]):
        _forget(reader._open(paths[which]), offset, len(out))
    reader.read_range(paths[which], offset, out)


def open_direct(file: int) -> int | None:
    """Another descriptor of an open file, whatever its name stands for by now, for reads past the page cache; None
    where there are none."""
    if not O_DIRECT:
        return None
    try:
        return os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC | O_DIRECT)
    except OSError:
        return None


def _forget(file: int, offset: int, count: int) -> None:
    """Drop a range of a file from the page cache. A hint."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(file, offset, count, os.POSIX_FADV_DONTNEED)
