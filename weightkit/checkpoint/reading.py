"""Reading byte ranges of many files from many threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from weightkit.checkpoint.copies import Copy, copies
from weightkit.checkpoint.stamp import Stamp, stamp_file
from weightkit.checkpoint.tensors import LazyTensor, size_bytes
from weightkit.errors import FormatError, MissingFileError, SourceChangedError
from weightkit.remote.address import is_address
from weightkit.remote.path import RemotePath
from weightkit.remote.ranges import RemoteFiles

Bytes = npt.NDArray[np.uint8]

#: Scratch for one covering read.
SCRATCH_BYTES = 4 << 20
#: Of a local file so much at once, which stays in a core's own cache until the runs are taken from it.
COVERING_BYTES = 1 << 20
#: Reads from this size on are followed by more of the file, as a rule.
LARGE_BYTES = 1 << 20


class Reader:
    """Positioned reads from files that are opened once, and from remote ones. Threads may share it.

    Args:
        stamps: for each file the stamp that it must have when opened; files that are not in it are not checked.
        ahead_bytes: of what follows a large read the kernel is asked to fetch so much, for readers that go through
            whole files: the disk is then at work while they convert and write. (Cold, 4.6 GB on a virtual disk: 0.8 of
            the time or less.)
        stop: once set, it ends the waits of all reads of remote files, which raise ``Interrupted``.

    Attributes:
        bytes_read: by all reads, gaps between runs included.
        covering_bytes: most of a local file in one read of runs and the gaps between them.
    """

    covering_bytes = COVERING_BYTES

    def __init__(
        self,
        stamps: Mapping[str, Stamp] | None = None,
        *,
        ahead_bytes: int = 0,
        stop: threading.Event | None = None,
    ) -> None:
        self._stamps = stamps or {}
        self._ahead_bytes = ahead_bytes
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        self._scratch = threading.local()
        self._remote: RemoteFiles | None = None
        self.stop = stop or threading.Event()
        self.bytes_read = 0

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                os.close(file)
            self._files.clear()
            remote, self._remote = self._remote, None
        if remote is not None:
            remote.close()

    def read_range(self, path: str, offset: int, out: Bytes) -> None:
        """Fill ``out`` (contiguous) from byte ``offset`` of a file.

        Raises:
            FormatError: the file ends early or cannot be read.
            SourceChangedError: it is not what its stamp says.
            HubError: a remote file cannot be had.
        """
        if is_address(path):
            count = self._read_remote(path, offset, out)
            with self._lock:
                self.bytes_read += count
            return
        file, done, view = self._open(path), 0, out.data
        if len(view) >= LARGE_BYTES:
            self._announce(path, offset + len(view))
        while done < len(view):
            try:
                count = os.preadv(file, [view[done:]], offset + done)
            except OSError as exc:
                raise _unreadable(path, exc) from exc
            if count == 0:
                raise FormatError(
                    "the file ends early",
                    where=path,
                    expected=f"{len(view) - done:,} more bytes at {offset + done:,}",
                    found="none",
                )
            done += count
        with self._lock:
            self.bytes_read += done

    def read_copy(self, copy: Copy, out: Bytes) -> None:
        """Read one copy into ``out``, the bytes of the whole tensor."""
        if copy.rows == 1:
            self.read_range(copy.path, copy.offset, out[copy.out_offset : copy.out_offset + copy.run_bytes])
            return
        end = copy.out_offset + (copy.rows - 1) * copy.out_stride + copy.run_bytes
        rows = np.lib.stride_tricks.as_strided(
            out[copy.out_offset : end], (copy.rows, copy.run_bytes), (copy.out_stride, 1)
        )
        if copy.stride == copy.run_bytes == copy.out_stride:
            self.read_range(copy.path, copy.offset, out[copy.out_offset : end])
        elif copy.is_dense:
            self._read_covering(copy, rows)
        else:
            self._read_runs(copy, out[copy.out_offset : end])

    def read(self, tensor: LazyTensor, out: Bytes | None = None) -> Bytes:
        """The bytes of a plain tensor, read into ``out`` where it is given (flat, of the tensor's size)."""
        if out is None:
            out = np.empty(size_bytes(tensor), np.uint8)
        for copy in copies(tensor):
            self.read_copy(copy, out)
        return out

    def _read_remote(self, address: str, offset: int, out: Bytes) -> int:
        """The bytes that came over the network."""
        stamp = self._stamps.get(address)
        if stamp is None:
            stamp = stamp_file(RemotePath(address))
        if offset + len(out) > stamp.size_bytes:
            raise _ends_early(address, offset + len(out), stamp.size_bytes)
        self._remote_files().read(address, stamp.version, offset, out.data)
        return len(out)

    def _remote_files(self) -> RemoteFiles:
        with self._lock:
            if self._remote is None:
                self._remote = RemoteFiles(stop=self.stop)
            return self._remote

    def _read_covering(self, copy: Copy, rows: Bytes) -> None:
        """Read runs and the gaps between them in large pieces; keep the runs."""
        at_once = max(1, (SCRATCH_BYTES if is_address(copy.path) else self.covering_bytes) // copy.stride)
        scratch = self._scratch_of((at_once - 1) * copy.stride + copy.run_bytes)
        for first, last in self._stretches(copy, at_once):
            for row in range(first, last, at_once):
                count = min(at_once, last - row)
                covering = scratch[: (count - 1) * copy.stride + copy.run_bytes]
                self.read_range(copy.path, copy.offset + row * copy.stride, covering)
                rows[row : row + count] = np.lib.stride_tricks.as_strided(
                    covering, (count, copy.run_bytes), (copy.stride, 1)
                )

    def _read_runs(self, copy: Copy, out: Bytes) -> None:
        """Read each run by itself. They may be short and many: then this loop is what they cost."""
        file, view, run_bytes, read = self._open(copy.path), out.data, copy.run_bytes, os.preadv
        whole = copy.rows
        try:
            for first, last in self._stretches(copy):
                for row in range(first, last):
                    start, offset = row * copy.out_stride, copy.offset + row * copy.stride
                    if read(file, (view[start : start + run_bytes],), offset) != run_bytes:
                        self.read_range(copy.path, offset, out[start : start + run_bytes])  # says what is wrong
                        whole -= 1  # as it counts what it reads
        except OSError as exc:
            raise _unreadable(copy.path, exc) from exc
        with self._lock:
            self.bytes_read += whole * run_bytes

    def _stretches(self, copy: Copy, at_once: int = 1) -> Iterator[tuple[int, int]]:
        """Rows from and to, of some megabytes of the file, a multiple of ``at_once`` but for the last; it is told to
        fetch all of them, and more, before that."""
        rows = max(1, SCRATCH_BYTES // copy.stride // at_once) * at_once
        for first in range(0, copy.rows, rows):
            if copy.rows * copy.stride >= LARGE_BYTES:
                self._announce(copy.path, copy.offset + first * copy.stride)
            yield first, min(first + rows, copy.rows)

    def _announce(self, path: str, offset: int) -> None:
        """Have the kernel fetch what lies from ``offset`` on, where this reader goes on."""
        if self._ahead_bytes and not is_address(path):
            _fetch(self._open(path), offset, self._ahead_bytes)

    def _scratch_of(self, count: int) -> Bytes:
        held: Bytes | None = getattr(self._scratch, "buffer", None)
        if held is None or len(held) < count:
            held = self._scratch.buffer = np.empty(count, np.uint8)
        return held[:count]

    def _open(self, path: str) -> int:
        file = self._files.get(path)
        if file is not None:
            return file
        with self._lock:
            if path in self._files:
                return self._files[path]
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError as exc:
                raise MissingFileError("no such file", where=path) from exc
            except OSError as exc:
                raise _unreadable(path, exc) from exc
            stamp, expected = Stamp.of(os.fstat(file)), self._stamps.get(path)
            if expected is not None and stamp != expected:
                os.close(file)
                raise SourceChangedError(
                    "the file changed after the plan was made",
                    where=path,
                    expected=expected,
                    found=stamp,
                    fix="Run the command again with --force.",
                )
            self._files[path] = file
            return file


def _ends_early(path: str, needed: int, size: int) -> FormatError:
    return FormatError("the file ends early", where=path, expected=f"{needed:,} bytes", found=f"{size:,}")


def _unreadable(path: str, error: OSError) -> FormatError:
    return FormatError(f"cannot be read ({error.strerror})", where=path)


def _fetch(file: int, offset: int, count: int) -> None:
    """Ask the kernel to read a range into the page cache, without waiting for it. A hint: where it fails, nothing is
    lost."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(file, offset, count, os.POSIX_FADV_WILLNEED)
