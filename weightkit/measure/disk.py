"""What a disk reaches, in scratch files that have no name: whatever happens, the system takes them away.

Written as the writer does: reserved space, O_DIRECT where the filesystem has it, 4 MiB at a time, a file a job, synced.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weightkit.direct_io import O_DIRECT, direct_buffer, use_page_cache
from weightkit.durable import FULL, SLACK_BYTES, no_space
from weightkit.errors import SpaceError, WriteError
from weightkit.machine import free_disk_bytes
from weightkit.measure.pace import pace
from weightkit.units import human_bytes

PIECE_BYTES = 4 << 20
#: Scratch in all; no more than this share of what is free.
MOST_BYTES = 4 << 30
FREE_SHARE = 1 / 4
LEAST_PIECES = 4


@dataclass(frozen=True, slots=True)
class DiskRates:
    """Bytes a second: ``read``, ``write`` by themselves, ``both_read``, ``both_write`` side by side. ``direct``: past
    the page cache; ``scratch_bytes``: the size of all scratch files."""

    read: float
    write: float
    both_read: float
    both_write: float
    direct: bool
    scratch_bytes: int


def measure_disk(folder: Path, *, jobs: int, seconds: float, most_bytes: int = MOST_BYTES) -> DiskRates:
    """Write, read, then both at once, each for about ``seconds``, in files that ``folder`` never shows.

    Raises:
        SpaceError: too little is free. Checked before anything is written.
        WriteError: the folder cannot be written to.
    """
    each = _size_of_each(folder, jobs, most_bytes)
    try:
        with _scratch_files(folder, jobs, each) as files:
            return _measure(files, jobs, seconds)
    except OSError as exc:
        if exc.errno in FULL:
            raise no_space(folder) from exc
        raise WriteError(f"cannot be measured ({exc.strerror})", where=folder) from exc


def _size_of_each(folder: Path, jobs: int, most_bytes: int) -> int:
    free = free_disk_bytes(folder)
    each = int(min(most_bytes, (free - SLACK_BYTES) * FREE_SHARE) / jobs) // PIECE_BYTES
    if each < LEAST_PIECES:
        needed = int(jobs * LEAST_PIECES * PIECE_BYTES / FREE_SHARE) + SLACK_BYTES
        raise SpaceError(
            "too little is free to measure the disk",
            where=folder,
            expected=f"at least {human_bytes(needed)}",
            found=human_bytes(free),
            fix="Free some space, or name a folder on another disk.",
        )
    return each * PIECE_BYTES


def _measure(files: list[_Scratch], jobs: int, seconds: float) -> DiskRates:
    started = time.perf_counter()
    deadline = started + seconds
    with ThreadPoolExecutor(jobs) as pool:
        written = sum(pool.map(lambda file: file.write_until(deadline), files))
    write = written / (time.perf_counter() - started)
    read = pace([file.read_next for file in files], seconds)
    both_read, both_write = _both(files, seconds)
    return DiskRates(
        read, write, both_read, both_write, all(file.direct for file in files), sum(file.size for file in files)
    )


def _both(files: list[_Scratch], seconds: float) -> tuple[float, float]:
    """Read and write every file at once, a thread each."""
    started = time.perf_counter()
    deadline = started + seconds

    def read(file: _Scratch) -> int:
        done = file.read_next()
        while time.perf_counter() < deadline:
            done += file.read_next()
        return done

    def write(file: _Scratch) -> int:
        return file.write_until(deadline, again=True)

    with ThreadPoolExecutor(2 * len(files)) as pool:
        reads, writes = [pool.submit(read, file) for file in files], [pool.submit(write, file) for file in files]
        total_read, total_written = (sum(job.result() for job in work) for work in (reads, writes))
    wall_s = time.perf_counter() - started
    return total_read / wall_s, total_written / wall_s


class _Scratch:
    """A file without a name, of ``size`` bytes, and aligned buffers."""

    def __init__(self, folder: Path, size: int) -> None:
        self.size, self.direct = size, bool(O_DIRECT)
        self._file = _open_nameless(folder)
        self._out, self._in = direct_buffer(PIECE_BYTES), direct_buffer(PIECE_BYTES)
        self._out[:] = np.frombuffer(secrets.token_bytes(1 << 16) * (PIECE_BYTES >> 16), np.uint8)
        self._written = self._position = 0
        try:
            with suppress(AttributeError):
                os.posix_fallocate(self._file, 0, size)
            self._write(0)  # also finds out whether O_DIRECT works
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        os.close(self._file)

    def write_until(self, deadline: float, *, again: bool = False) -> int:
        """Write a piece at least, from the front until the time or the file is through, then sync; ``again``: from the
        front again. Returns the bytes written."""
        done = 0
        while not done or (time.perf_counter() < deadline and (again or done < self.size)):
            self._write(done % self.size)
            done += PIECE_BYTES
        self._written = max(self._written, min(done, self.size))
        os.fsync(self._file)
        return done

    def read_next(self) -> int:
        """Read the next piece of what was written, over and over. Returns its bytes."""
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, self._position, PIECE_BYTES, os.POSIX_FADV_DONTNEED)
        count = os.preadv(self._file, [self._in.data], self._position)
        self._position = (self._position + PIECE_BYTES) % max(PIECE_BYTES, self._written)
        return count

    def _write(self, offset: int) -> None:
        done = 0
        while done < PIECE_BYTES:
            try:
                done += os.pwrite(self._file, self._out[done:].data, offset + done)
            except OSError as exc:
                if exc.errno != errno.EINVAL or not self.direct:
                    raise
                use_page_cache(self._file)
                self.direct = False
        self._written = max(self._written, PIECE_BYTES)


@contextmanager
def _scratch_files(folder: Path, count: int, size: int) -> Iterator[list[_Scratch]]:
    files: list[_Scratch] = []
    try:
        for _ in range(count):
            files.append(_Scratch(folder, size))
        yield files
    finally:
        for file in files:
            file.close()


def _open_nameless(folder: Path) -> int:
    """A file for reading and writing that is gone when it is closed: made without a name, or unlinked at once."""
    flags = os.O_RDWR | os.O_CLOEXEC
    attempts: list[Callable[[], int]] = []
    if hasattr(os, "O_TMPFILE"):
        attempts.append(lambda: os.open(folder, flags | os.O_TMPFILE | O_DIRECT, 0o600))
    attempts += [lambda: _open_unlinked(folder, flags | O_DIRECT), lambda: _open_unlinked(folder, flags)]
    for attempt in attempts[:-1]:
        with suppress(OSError):
            return attempt()
    return attempts[-1]()


def _open_unlinked(folder: Path, flags: int) -> int:
    path = folder / f".weightkit-bench-{secrets.token_hex(8)}"
    try:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    finally:
        path.unlink(missing_ok=True)
