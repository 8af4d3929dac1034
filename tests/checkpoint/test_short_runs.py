"""The columns of many ranks: the bytes of the matrix, read without the gaps where those are most of it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from weightkit.checkpoint import Reader, Stored
from weightkit.checkpoint.direct import PIECE_BYTES, DirectReader
from weightkit.checkpoint.reading import COVERING_BYTES, SCRATCH_BYTES
from weightkit.checkpoint.tensors import narrow, size_bytes
from weightkit.errors import FormatError

#: Rows of 8 KiB, 6 MiB: more than one stretch, and no whole number of them.
ROWS, COLUMNS, OFFSET = 800, 8192, 24


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stored, np.ndarray]:
    values = np.random.default_rng(0).integers(0, 256, (ROWS, COLUMNS), dtype=np.uint8)
    path = tmp_path_factory.mktemp("runs") / "matrix"
    path.write_bytes(bytes(OFFSET) + values.tobytes())
    return Stored(str(path), OFFSET, "F8_E4M3", values.shape), values


@pytest.mark.parametrize("ahead", [0, 16 << 20])
@pytest.mark.parametrize("ranks", [2, 8, 16, 32, 128])
def test_ranks_have_their_columns(ranks: int, ahead: int, matrix: tuple[Stored, np.ndarray]) -> None:
    stored, values = matrix
    width = COLUMNS // ranks
    with Reader(ahead_bytes=ahead) as reader:
        for rank in (0, 1, ranks - 1):
            found = reader.read(narrow(stored, 1, rank * width, width))
            assert np.array_equal(found.reshape(ROWS, width), values[:, rank * width : (rank + 1) * width])


@pytest.mark.parametrize(("ranks", "share"), [(2, 2), (8, 8), (16, 1), (128, 1)])
def test_reads_are_bounded(
    ranks: int, share: int, matrix: tuple[Stored, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few ranks the whole is read, in calls of about a megabyte; of many, no byte of another's."""
    part = narrow(matrix[0], 1, COLUMNS // ranks, COLUMNS // ranks)
    sizes: list[int] = []
    preadv = os.preadv

    def counted(file: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(sum(map(len, buffers)))
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    with Reader() as reader:
        reader.read(part)
        assert reader.bytes_read == sum(sizes) <= share * size_bytes(part)
    if share > 1:
        assert max(sizes) <= COVERING_BYTES
        assert len(sizes) <= 2 + ROWS * COLUMNS // COVERING_BYTES + ROWS * COLUMNS // SCRATCH_BYTES


@pytest.mark.parametrize("columns", [COLUMNS, 7168])
def test_past_the_page_cache_reads_are_large(
    columns: int, matrix: tuple[Stored, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As few as may be, also of rows that a piece does not hold a whole number of."""
    stored, values = matrix
    rows, width = ROWS * COLUMNS // columns, columns // 2
    part = narrow(Stored(stored.path, OFFSET, "F8_E4M3", (rows, columns)), 1, width, width)
    sizes: list[int] = []
    preadv = os.preadv

    def counted(file: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(file, buffers, offset)
        sizes.append(count)
        return count

    monkeypatch.setattr(os, "preadv", counted)
    with DirectReader() as reader:
        found = reader.read(part)
    whole = values.reshape(-1)[: rows * columns].reshape(rows, columns)
    assert np.array_equal(found.reshape(rows, width), whole[:, width:])
    assert len(sizes) == 2
    assert max(sizes) > PIECE_BYTES - 3 * columns


def test_a_run_that_came_in_two_reads_is_counted_once(
    matrix: tuple[Stored, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, values = matrix
    preadv, seen = os.preadv, []

    def interrupted(file: int, buffers: list[memoryview], offset: int) -> int:
        seen.append(offset)
        if len(seen) == 3:
            buffers = [buffers[0][:100]]
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", interrupted)
    part = narrow(stored, 1, 512, 512)
    with Reader() as reader:
        assert np.array_equal(reader.read(part).reshape(ROWS, 512), values[:, 512:1024])
        assert reader.bytes_read == size_bytes(part)
    assert len(seen) == ROWS + 1


def test_a_file_that_ends_within_a_run(matrix: tuple[Stored, np.ndarray], tmp_path: Path) -> None:
    stored, values = matrix
    path = tmp_path / "cut"
    path.write_bytes(bytes(OFFSET) + values.tobytes()[: 100 * COLUMNS + 700])
    part = narrow(Stored(str(path), OFFSET, "F8_E4M3", stored.shape), 1, 512, 512)
    with Reader() as reader, pytest.raises(FormatError, match="cut: the file ends early: expected 324 more bytes"):
        reader.read(part)


def test_a_disk_that_fails_within_the_runs(matrix: tuple[Stored, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(file: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with Reader() as reader, pytest.raises(FormatError, match=r"matrix: cannot be read \(Input/output error\)"):
        reader.read(narrow(matrix[0], 1, 512, 512))


def test_ahead_of_short_runs_the_kernel_fetches_what_holds_them(
    matrix: tuple[Stored, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr("weightkit.checkpoint.reading._fetch", lambda _, offset, count: told.append((offset, count)))
    with Reader(ahead_bytes=8 << 20) as reader:
        reader.read(narrow(matrix[0], 1, 64, 64))
    assert told == [(OFFSET + 64 + row * COLUMNS, 8 << 20) for row in range(0, ROWS, SCRATCH_BYTES // COLUMNS)]
