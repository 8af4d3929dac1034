"""Going through large files once: what the page cache does not hold already is read past it, ahead of its use."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weightkit.checkpoint.direct import SMALLEST_BYTES, open_direct
from weightkit.checkpoint.reading import Bytes, Reader
from weightkit.checkpoint.stamp import Stamp
from weightkit.direct_io import ALIGNMENT, direct_buffer
from weightkit.remote.address import is_address

#: One read, and what is read ahead.
PIECE_BYTES = 4 << 20
#: A read that begins no further on than this goes on with the one before it.
GAP_BYTES = 1 << 20
#: What a thread that reads takes.
READ_AHEAD_BYTES = 2 * PIECE_BYTES
#: Of a file, what the page cache must hold for it to be read from there.
CACHED_SHARE = 0.5


class OnceReader(Reader):
    """A ``Reader`` for files that are read once, from front to back: neither do they take the page cache from others,
    nor the kernel's time for it.

    Files on a local disk alone are read so. Of others, and of those that lie in the page cache, all is left to the
    kernel, and so are short reads. (Linux tells what is cached of a file to those alone who own it or may write it.)
    Of reads that jump between files more comes from the disk than is asked for: they are for a plain ``Reader``.
    """

    def __init__(self, stamps: Mapping[str, Stamp] | None = None, *, ahead_bytes: int = 0) -> None:
        super().__init__(stamps, ahead_bytes=ahead_bytes)
        self._direct: dict[str, int | None] = {}
        self._opened: list[int] = []
        self._direct_lock = threading.Lock()
        self._ahead = threading.local()
        self._all_ahead: list[ReadAhead] = []

    def close(self) -> None:
        for ahead in self._all_ahead:
            ahead.close()
        for file in self._opened:
            os.close(file)
        self._all_ahead.clear()
        self._opened.clear()
        self._direct.clear()
        self._ahead = threading.local()
        super().close()

    def read_range(self, path: str, offset: int, out: Bytes) -> None:
        """See ``Reader.read_range``."""
        file = None if len(out) < SMALLEST_BYTES or is_address(path) else self._direct_file(path)
        done = 0
        if file is not None:
            try:
                done = self._read_ahead().read(file, offset, out)
            except OSError:
                self._direct[path] = None  # by those who come; its descriptor stays open for others in the middle
        if done < len(out):  # the rest: no direct reads here, or the file ends early, which the plain read says clearly
            super().read_range(path, offset + done, out[done:])
        with self._lock:
            self.bytes_read += done

    def _direct_file(self, path: str) -> int | None:
        if path in self._direct:
            return self._direct[path]
        plain = self._open(path)  # checks the stamp
        with self._direct_lock:
            if path not in self._direct:
                file = self._direct[path] = open_once(plain)
                if file is not None:
                    self._opened.append(file)
            return self._direct[path]

    def _read_ahead(self) -> ReadAhead:
        """This thread's."""
        ahead: ReadAhead | None = getattr(self._ahead, "held", None)
        if ahead is None:
            ahead = self._ahead.held = ReadAhead()
            with self._direct_lock:
                self._all_ahead.append(ahead)
        return ahead


@dataclass(frozen=True)
class _Piece:
    """``count`` bytes of an open file from ``start`` on, a multiple of the alignment."""

    file: int
    start: int
    count: int
    buffer: Bytes

    def covers(self, file: int, offset: int) -> bool:
        return file == self.file and self.start <= offset < self.start + self.count

    def goes_on(self, file: int, offset: int) -> bool:
        return file == self.file and 0 <= offset - (self.start + self.count) <= GAP_BYTES


class ReadAhead:
    """A thread's reads past the page cache. Where they follow each other, the next piece is read while one is used."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="weightkit-ahead")
        self._spare, buffer = direct_buffer(PIECE_BYTES), direct_buffer(PIECE_BYTES)
        self._piece = _Piece(-1, 0, 0, buffer)
        self._next: Future[_Piece] | None = None
        self._may_ask = True

    def close(self) -> None:
        self._worker.shutdown()

    def read(self, file: int, offset: int, out: Bytes) -> int:
        """Fill ``out`` from its start; the bytes that are filled, fewer only at the end of the file. Raises OSError."""
        done = 0
        while done < len(out):
            piece = self._at(file, offset + done, len(out) - done)
            skipped = offset + done - piece.start
            taken = min(piece.count - skipped, len(out) - done)
            if taken <= 0:
                break
            out[done : done + taken] = piece.buffer[skipped : skipped + taken]
            done += taken
        return done

    def _at(self, file: int, offset: int, needed: int) -> _Piece:
        """The piece that has a byte, and is held from then on."""
        if self._piece.covers(file, offset):
            return self._piece
        following, self._next = self._next, None
        goes_on = self._piece.goes_on(file, offset)
        if following is not None:
            with suppress(OSError):  # the read that now follows has it too, if it is about the same bytes
                found = following.result()
                self._piece, self._spare = found, self._piece.buffer
                goes_on = found.covers(file, offset) or found.goes_on(file, offset)
        if not self._piece.covers(file, offset):
            start = offset - offset % ALIGNMENT
            count = PIECE_BYTES if goes_on else min(PIECE_BYTES, -(-(offset + needed - start) // ALIGNMENT) * ALIGNMENT)
            buffer = self._piece.buffer
            self._piece = _Piece(-1, 0, 0, buffer)  # whatever becomes of the read
            self._piece = _read(file, start, buffer, count)
        if (goes_on or offset + needed > self._piece.start + self._piece.count) and self._piece.count % ALIGNMENT == 0:
            self._next = self._ask(file, self._piece.start + self._piece.count)
        return self._piece

    def _ask(self, file: int, start: int) -> Future[_Piece] | None:
        """Begin to read a piece. Never again once that failed, as the buffer may have been given away."""
        try:
            return self._worker.submit(_read, file, start, self._spare, PIECE_BYTES) if self._may_ask else None
        except RuntimeError:  # no more threads; or Python ends, in whose main thread this is not
            self._may_ask = False
            return None


def _read(file: int, start: int, buffer: Bytes, count: int) -> _Piece:
    return _Piece(file, start, os.preadv(file, [buffer[:count].data], start), buffer)


def open_once(file: int) -> int | None:
    """A descriptor for ``ReadAhead`` of what is open as ``file``; None where it is better left to the kernel."""
    worth = _is_on_a_disk(file) and cached_share(file) < CACHED_SHARE
    return open_direct(file) if worth else None


def cached_share(file: int) -> float:
    """How much of an open file the page cache holds; 1 where the system does not say."""
    size = os.fstat(file).st_size
    if size == 0:
        return 1.0
    with suppress(AttributeError, OSError, ValueError), mmap.mmap(file, size, prot=mmap.PROT_READ) as memory:
        whole = np.frombuffer(memory, np.uint8)
        there = np.empty(-(-size // mmap.PAGESIZE), np.uint8)
        address, vector = ctypes.c_void_p(whole.ctypes.data), ctypes.c_void_p(there.ctypes.data)
        del whole
        if ctypes.CDLL(None, use_errno=True).mincore(address, ctypes.c_size_t(size), vector) == 0:
            return float(np.count_nonzero(there & 1)) / len(there)
    return 1.0


def _is_on_a_disk(file: int) -> bool:
    """Whether a block device holds the file. File systems over a network, and those in memory, have none, or a number
    that is no device's."""
    device = os.fstat(file).st_dev
    return os.major(device) != 0 and Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").exists()
