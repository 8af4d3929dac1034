"""A reader that forgets leaves nothing of what it read in the page cache; others leave it there."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from weightkit.checkpoint.copies import Copy
from weightkit.checkpoint.reading import Reader

SIZE = 16 << 20
PIECE = 4 << 20


def resident_pages(path: Path) -> int:
    """Pages of the file that are in the page cache, as mincore(2) says."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        address = np.frombuffer(memory, np.uint8).ctypes.data
        pages = np.zeros(-(-len(memory) // mmap.PAGESIZE), np.uint8)
        done = libc.mincore(
            ctypes.c_void_p(address), ctypes.c_size_t(len(memory)), pages.ctypes.data_as(ctypes.c_void_p)
        )
        assert done == 0
    return int(np.count_nonzero(pages & 1))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that is on the disk and in the page cache."""
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)
    if resident_pages(path):
        pytest.skip("this filesystem keeps its files in memory")
    path.read_bytes()
    assert resident_pages(path) == SIZE // mmap.PAGESIZE
    return path


@pytest.mark.parametrize("first", [0, 8, 4097])
def test_whole_files_in_pieces(first: int, path: Path) -> None:
    content = path.read_bytes()
    with Reader(forget=True) as reader:
        for offset in range(first, SIZE, PIECE):
            out = np.empty(min(PIECE, SIZE - offset), np.uint8)
            reader.read_range(str(path), offset, out)
            assert out.tobytes() == content[offset : offset + len(out)]
    assert resident_pages(path) <= SIZE // mmap.PAGESIZE // 100  # the kernel drops none of a folio that is cut


def test_others_keep(path: Path) -> None:
    with Reader() as reader:
        reader.read_range(str(path), 0, np.empty(SIZE, np.uint8))
    assert resident_pages(path) == SIZE // mmap.PAGESIZE


def test_what_lies_between_the_runs_of_ranks_is_kept(path: Path) -> None:
    """Other ranks' columns of the same matrix."""
    width = 4096
    copy = Copy(
        str(path),
        offset=0,
        stride=width,
        out_offset=0,
        out_stride=width // 2,
        run_bytes=width // 2,
        rows=SIZE // width,
    )
    with Reader(forget=True) as reader:
        reader.read_copy(copy, np.empty(SIZE // 2, np.uint8))
    assert resident_pages(path) == SIZE // mmap.PAGESIZE
