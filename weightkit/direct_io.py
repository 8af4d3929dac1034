"""Reading and writing past the page cache (O_DIRECT)."""

from __future__ import annotations

import fcntl
import mmap
import os
from contextlib import suppress

import numpy as np
import numpy.typing as npt

#: What offsets, lengths and addresses must be multiples of, on any filesystem that has such reads and writes.
ALIGNMENT = 4096
O_DIRECT = getattr(os, "O_DIRECT", 0)
HUGE_PAGE_BYTES = 2 << 20


def direct_buffer(size_bytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed memory for direct reads and writes.

    From 2 MiB on it lies in huge pages, where the system gives any: a device takes some 256 pieces of memory a request,
    so that pages of 4 KiB cut 4 MiB into 4 to 8 of them.
    """
    spare = HUGE_PAGE_BYTES if size_bytes >= HUGE_PAGE_BYTES else 0
    # Private: shared memory, as mmap's default has it, gets no huge pages.
    memory = mmap.mmap(-1, size_bytes + spare, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(memory, np.uint8)
    if not spare:
        return whole
    with suppress(AttributeError, OSError):  # no Linux; a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -whole.ctypes.data % HUGE_PAGE_BYTES
    return whole[start : start + size_bytes]


def is_direct(file: int) -> bool:
    """Whether reads and writes of an open file go past the page cache."""
    return bool(fcntl.fcntl(file, fcntl.F_GETFL) & O_DIRECT)


def use_page_cache(file: int) -> None:
    """From now on, whatever the file was opened for."""
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~O_DIRECT)
