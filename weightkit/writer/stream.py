"""One output file as an append stream: the producer fills buffers, threads hash and write them behind its back."""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from weightkit.checkpoint.reading import Bytes
from weightkit.direct_io import ALIGNMENT, O_DIRECT, direct_buffer, is_direct, use_page_cache
from weightkit.durable import FULL, no_space
from weightkit.sha256 import Digest, Line, hashers, sha256

#: 256 KB to 4 MB wrote fastest, 16 MB slower; a resumed write continues at a multiple of it.
BUFFER_BYTES = 4 << 20
BUFFERS = 4
#: Writes of one file at once: a disk is faster with more to do, above all when few files are left.
WRITES = 2


class AppendStream:
    """A file written from front to back, with its SHA-256.

    Args:
        path: the file, created with the umask's mode where it is not there.
        size_bytes: its final size; space for it is reserved at once, where the filesystem can.
        resume_at: bytes that an earlier run left there durably, a multiple of ``BUFFER_BYTES``. What the producer
            appends below that position is dropped.
        digest: the SHA-256 state over those bytes.

    Raises ``SpaceError`` when the disk is full; the bytes before ``position`` are kept.
    """

    def __init__(self, path: Path, size_bytes: int, *, resume_at: int = 0, digest: Digest | None = None) -> None:
        self.position = 0
        self._resume_at = resume_at
        self._path = path
        self._digest = digest or sha256(size_bytes)
        self._file = _open_for_writing(path)
        self._failure: BaseException | None = None
        self._unpin: Callable[[], None] | None = None
        self._whole = whole = direct_buffer(BUFFER_BYTES * BUFFERS)
        self._free: queue.SimpleQueue[Bytes] = queue.SimpleQueue()
        for number in range(BUFFERS):
            self._free.put(whole[number * BUFFER_BYTES : (number + 1) * BUFFER_BYTES])
        self._current = self._free.get()
        self._filled = 0
        self._hashing = Line(self._digest)
        self._to_write: queue.SimpleQueue[_Block | None] = queue.SimpleQueue()
        self._pending = threading.Semaphore(0)
        self._submitted = 0
        self._threads = [threading.Thread(target=self._write_blocks, daemon=True) for _ in range(WRITES)]
        try:
            _reserve(self._file, size_bytes, path)
        except BaseException:
            os.close(self._file)
            raise
        for thread in self._threads:
            thread.start()

    def skip(self, count: int) -> bool:
        """Step over ``count`` bytes if all of them are there already."""
        if self.position + count > self._resume_at:
            return False
        self.position += count
        return True

    def append(self, data: Bytes) -> int:
        """Append a flat uint8 array. Returns how many of its bytes were not there already."""
        return self.fill(len(data), lambda start, out: np.copyto(out, data[start : start + len(out)]))

    def fill(self, count: int, read_into: Callable[[int, Bytes], None]) -> int:
        """Append ``count`` bytes that ``read_into(start, out)`` puts into place, in as many calls as there are buffers.

        Returns how many of them were not there already.
        """
        done = there = min(count, max(0, self._resume_at - self.position))
        self.position += done
        while done < count:
            out = self._current[self._filled : self._filled + count - done]
            read_into(done, out)
            done += len(out)
            self.position += len(out)
            self._filled += len(out)
            if self._filled == BUFFER_BYTES:
                self._submit()
        return count - there

    def pin(self, pin: Callable[[Bytes], Callable[[], None]]) -> None:
        """Have the buffers made ready, once, for a device that puts bytes into them: ``pin`` gets them all, and returns
        what undoes it."""
        if self._unpin is None:
            self._unpin = pin(self._whole)

    def make_durable(self) -> tuple[int, str]:
        """Sync the full buffers so far. Returns the position up to which bytes are safe, and their SHA-256."""
        self._drain()
        os.fdatasync(self._file)
        return max(self.position - self._filled, self._resume_at), self._digest.hexdigest()

    def finish(self) -> str:
        """Write the rest, sync, close. Returns the file's SHA-256."""
        if self._filled:
            self._submit()
        self._drain()
        os.ftruncate(self._file, self.position)
        os.fsync(self._file)
        self.close()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Stop the threads and close the file, as it is."""
        if self._file < 0:
            return
        self._wait_for_all()
        for _ in self._threads:
            self._to_write.put(None)
        for thread in self._threads:
            thread.join()
        if self._unpin is not None:
            self._unpin()
        os.close(self._file)
        self._file = -1

    def _submit(self) -> None:
        block = _Block(self._current, self._filled, self.position - self._filled)
        hashers().put(self._hashing, block.data, lambda: self._done_with(block))
        self._submitted += 1
        self._to_write.put(block)
        self._filled = 0
        self._current = self._free.get()
        self._raise_failure()

    def _drain(self) -> None:
        self._wait_for_all()
        self._raise_failure()

    def _wait_for_all(self) -> None:
        while self._submitted:
            self._pending.acquire()
            self._submitted -= 1

    def _raise_failure(self) -> None:
        if self._failure is None:
            return
        if isinstance(self._failure, OSError) and self._failure.errno in FULL:
            raise no_space(self._path) from self._failure
        raise self._failure

    def _write_blocks(self) -> None:
        while (block := self._to_write.get()) is not None:
            try:
                if self._failure is None:
                    self._write_block(block)
            except BaseException as exc:
                self._failure = exc
            self._done_with(block)

    def _done_with(self, block: _Block) -> None:
        if block.done_by_both():
            self._free.put(block.buffer)
            self._pending.release()

    def _write_block(self, block: _Block) -> None:
        """At its place, and nothing beyond it: a second writer of the same file, such as one of a machine that was
        taken for dead, then changes no byte of it."""
        whole = len(block.data) // ALIGNMENT * ALIGNMENT
        self._write(block.data[:whole], block.offset)
        if whole < len(block.data):  # the end of the file
            if is_direct(self._file):
                use_page_cache(self._file)
            self._write(block.data[whole:], block.offset + whole)

    def _write(self, data: Bytes, offset: int) -> None:
        view, done = data.data, 0
        while done < len(view):
            direct = is_direct(self._file)  # before, as another write may find out first
            try:
                done += os.pwrite(self._file, view[done:], offset + done)
            except OSError as exc:
                if exc.errno != errno.EINVAL or not direct:
                    raise
                use_page_cache(self._file)


class _Block:
    """A filled buffer on its way; free again once it is both hashed and written."""

    def __init__(self, buffer: Bytes, count: int, offset: int) -> None:
        self.buffer, self.data, self.offset = buffer, buffer[:count], offset
        self._first_done = threading.Lock()

    def done_by_both(self) -> bool:
        return not self._first_done.acquire(blocking=False)


def _open_for_writing(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | O_DIRECT, 0o666)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)  # tmpfs and some network filesystems


def _reserve(file: int, size_bytes: int, path: Path) -> None:
    """fallocate(2) itself: where the filesystem lacks it, libc's posix_fallocate would write every block."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "fallocate"):
        return
    if libc.fallocate(file, 0, ctypes.c_int64(0), ctypes.c_int64(size_bytes)) != 0:
        code = ctypes.get_errno()
        if code in FULL:
            raise no_space(path)
        if code == errno.EFBIG:
            raise OSError(code, os.strerror(code), str(path))
