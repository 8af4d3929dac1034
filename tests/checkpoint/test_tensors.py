"""Lazy tensors: whatever is built from narrows and concats, its bytes are those that numpy gets from the same steps."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import plain_reference
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightkit.checkpoint import reading
from weightkit.checkpoint.copies import copies
from weightkit.checkpoint.reading import Reader
from weightkit.checkpoint.stamp import Stamp
from weightkit.checkpoint.tensors import (
    Cast,
    Concat,
    Dequantized,
    LazyTensor,
    Narrow,
    Stored,
    cast_to,
    concat,
    dequantize,
    is_plain,
    narrow,
    size_bytes,
    stored_parts,
)
from weightkit.compute import CpuEngine, evaluate, strips
from weightkit.errors import FormatError, MissingFileError, ScaleError, SourceChangedError, UnsupportedError
from weightkit.writer.pieces import Copied, pieces

Array = npt.NDArray[np.unsignedinteger]
ITEMS = {"U8": np.uint8, "BF16": np.uint16, "F32": np.uint32, "I64": np.uint64}

quick = settings(deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@dataclass
class Pool:
    """Stored tensors in two files, made as they are needed; each with the array that it stands for."""

    folder: Path

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.files = {"a": bytearray(b"head"), "b": bytearray()}

    def stored(self, dtype: str, shape: tuple[int, ...], *, file: str = "a", gap: int = 0) -> tuple[Stored, Array]:
        content = self.files[file]
        content += bytes(gap)
        array = self.rng.integers(0, np.iinfo(ITEMS[dtype]).max, shape, dtype=ITEMS[dtype])
        tensor = Stored(str(self.folder / file), len(content), dtype, shape)
        content += array.tobytes()
        return tensor, array

    def save(self) -> None:
        for name, content in self.files.items():
            (self.folder / name).write_bytes(content)


@st.composite
def trees(draw: st.DrawFn, pool: Pool, dtype: str, shape: tuple[int, ...], depth: int = 3) -> tuple[LazyTensor, Array]:
    """A plain tensor of the shape, and the array that numpy makes by the same steps."""
    kind = draw(st.integers(0, 2)) if depth and shape else 0
    if kind == 0:
        return pool.stored(dtype, shape, file=draw(st.sampled_from("ab")), gap=draw(st.integers(0, 3)))
    dim = draw(st.integers(0, len(shape) - 1))
    if kind == 1:
        before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        larger = (*shape[:dim], before + shape[dim] + after, *shape[dim + 1 :])
        tensor, array = draw(trees(pool, dtype, larger, depth - 1))
        cut = (slice(None),) * dim + (slice(before, before + shape[dim]),)
        return narrow(tensor, dim, before, shape[dim]), array[cut]
    ends = sorted(draw(st.lists(st.integers(0, shape[dim]), max_size=3)))
    sizes = [high - low for low, high in pairwise([0, *ends, shape[dim]])]
    shapes = [(*shape[:dim], size, *shape[dim + 1 :]) for size in sizes]
    if draw(st.booleans()):  # of parts of one tensor, in any order
        tensor, array = draw(trees(pool, dtype, shape, depth - 1))
        ranges = draw(st.permutations([(sum(sizes[:number]), size) for number, size in enumerate(sizes)]))
        parts = [narrow(tensor, dim, start, size) for start, size in ranges]
        cuts = [array[(slice(None),) * dim + (slice(start, start + size),)] for start, size in ranges]
        return concat(parts, dim), np.concatenate(cuts, dim)
    made = [draw(trees(pool, dtype, part, depth - 1)) for part in shapes]
    return concat([tensor for tensor, _ in made], dim), np.concatenate([array for _, array in made], dim)


@settings(quick, max_examples=200)
@given(st.data())
def test_bytes_equal_numpys(folder: Path, data: st.DataObject) -> None:
    pool = Pool(folder)
    dtype = data.draw(st.sampled_from(sorted(ITEMS)))
    shape = tuple(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3)))
    tensor, array = data.draw(trees(pool, dtype, shape))
    pool.save()
    assert is_plain(tensor)
    assert (tensor.dtype, tensor.shape, size_bytes(tensor)) == (dtype, array.shape, array.nbytes)
    with Reader() as reader:
        out = np.full(array.nbytes, 0xAA, np.uint8)
        assert reader.read(tensor, out).tobytes() == array.tobytes()
        assert b"".join(map(bytes, _piecewise(tensor, reader))) == array.tobytes()
        assert evaluate(tensor, reader, CpuEngine()).tobytes() == array.tobytes()
    _copies_cover_once(tensor)


def _piecewise(tensor: LazyTensor, reader: Reader) -> Iterator[bytes]:
    """As the writer goes about it."""
    for piece in pieces({"it": tensor}):
        if isinstance(piece, Copied):
            out = np.empty(piece.size_bytes, np.uint8)
            reader.read_range(piece.copy.path, piece.copy.offset, out)
            yield out.tobytes()
        else:
            yield reader.read(piece.strip).tobytes()


def _copies_cover_once(tensor: LazyTensor) -> None:
    """Each byte of the output is written by one copy, and none lies outside."""
    count = np.zeros(size_bytes(tensor), np.int64)
    for copy in copies(tensor):
        for row in range(copy.rows):
            start = copy.out_offset + row * copy.out_stride
            assert start + copy.run_bytes <= len(count)
            count[start : start + copy.run_bytes] += 1
    assert (count == 1).all()


@settings(quick, max_examples=60)
@given(st.data(), st.sampled_from([1, 64, 4096]), st.sampled_from([1, 64, 4096]), st.sampled_from([0.0, 0.5, 2.0]))
def test_reads_do_not_depend_on_how_runs_are_covered(
    folder: Path, data: st.DataObject, scratch: int, covering: int, dense: float
) -> None:
    pool = Pool(folder)
    tensor, array = data.draw(trees(pool, "BF16", (5, 9)))
    pool.save()
    with pytest.MonkeyPatch.context() as patch, Reader() as reader:
        patch.setattr(reading, "SCRATCH_BYTES", scratch)
        patch.setattr(reading.Reader, "covering_bytes", covering)
        patch.setattr("weightkit.checkpoint.copies.DENSE", dense)
        assert reader.read(tensor).tobytes() == array.tobytes()


def _halves(dim: int) -> Callable[[str], Stored]:
    shape = tuple(6 if number == dim else 12 for number in range(3))
    return lambda path: Stored(path, 0, "BF16", shape)


@quick
@given(st.data(), st.integers(0, 2), st.lists(st.integers(0, 12), max_size=4))
def test_concat_of_the_narrows_is_the_tensor(folder: Path, data: st.DataObject, dim: int, ends: list[int]) -> None:
    stored, _ = Pool(folder).stored("BF16", (12, 12, 12))
    tensor: LazyTensor = data.draw(
        st.sampled_from(
            [
                stored,
                narrow(Stored("x", 0, "BF16", (12, 24, 12)), 1, 5, 12),
                narrow(Stored("x", 0, "BF16", (12, 12, 24)), 2, 0, 12),
                concat([_halves(dim)(path) for path in "xy"], dim),
                cast_to(stored, "F32"),
                cast_to(narrow(Stored("x", 0, "BF16", (12, 24, 12)), 1, 5, 12), "F32"),
            ]
        )
    )
    edges = [0, *sorted(ends), 12]
    parts = [narrow(tensor, dim, low, high - low) for low, high in pairwise(edges) if high > low]
    assert concat(parts, dim) == tensor


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_ranks_of_blocks_join_to_the_tensor(dim: int, ranks: int) -> None:
    weight, scale = Stored("w", 0, "F8_E4M3", (768, 768)), Stored("s", 8, "F32", (6, 6))
    for tensor in (weight, scale, dequantize(weight, scale, "BF16", name="w")):
        length = tensor.shape[dim] // ranks
        parts = [narrow(tensor, dim, rank * length, length) for rank in range(ranks)]
        assert concat(parts, dim) == tensor


def test_rows_of_a_stored_tensor_are_a_shorter_stored_tensor() -> None:
    stored = Stored("x", 100, "BF16", (4, 3))
    assert narrow(stored, 0, 1, 2) == Stored("x", 106, "BF16", (2, 3))
    assert narrow(stored, 0, 0, 4) is stored
    assert narrow(stored, 1, 1, 2) == Narrow(stored, 1, 1, 2)
    assert narrow(narrow(stored, 1, 1, 2), 1, 1, 1) == Narrow(stored, 1, 2, 1)
    assert narrow(narrow(stored, 1, 1, 2), 0, 2, 1) == Narrow(Stored("x", 112, "BF16", (1, 3)), 1, 1, 2)


def test_neighbours_in_a_file_join_and_strangers_do_not() -> None:
    first, second = Stored("x", 0, "U8", (2, 3)), Stored("x", 6, "U8", (1, 3))
    assert concat([first, second], 0) == Stored("x", 0, "U8", (3, 3))
    assert concat([second, first], 0) == Concat((second, first), 0)
    assert concat([first, Stored("y", 6, "U8", (1, 3))], 0).shape == (3, 3)
    assert isinstance(concat([first, Stored("x", 6, "U8", (2, 3))], 1), Concat)


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 5), (4, 1), (2, -1)])
def test_narrow_outside(start: int, length: int) -> None:
    with pytest.raises(ValueError, match="outside dimension 0"):
        narrow(Stored("x", 0, "U8", (4, 3)), 0, start, length)


@pytest.mark.parametrize(
    ("parts", "dim"),
    [
        ([], 0),
        ([Stored("x", 0, "U8", (2, 3)), Stored("x", 0, "I8", (2, 3))], 0),
        ([Stored("x", 0, "U8", (2, 3)), Stored("x", 0, "U8", (2, 4))], 0),
        ([Stored("x", 0, "U8", (2, 3)), Stored("x", 0, "U8", (2, 3, 1))], 0),
        ([Stored("x", 0, "U8", ()), Stored("x", 1, "U8", ())], 0),
        ([Stored("x", 0, "U8", (4,)), Stored("x", 4, "U8", (4,))], 1),
        ([Stored("x", 0, "U8", (4,)), Stored("x", 4, "U8", ())], 1),
    ],
)
def test_what_does_not_join(parts: list[LazyTensor], dim: int) -> None:
    with pytest.raises(ValueError, match="join"):
        concat(parts, dim)


def test_elements_narrower_than_a_byte_are_cut_at_whole_bytes_or_not_at_all() -> None:
    assert narrow(Stored("x", 0, "F4", (4, 4)), 0, 1, 2) == Stored("x", 2, "F4", (2, 4))
    with pytest.raises(UnsupportedError, match="narrower than a byte"):
        narrow(Stored("x", 0, "F4", (4, 3)), 0, 1, 2)
    with pytest.raises(UnsupportedError, match="narrower than a byte"):
        copies(narrow(Stored("x", 0, "F4", (4, 4)), 1, 1, 2))


def test_only_plain_tensors_have_copies() -> None:
    with pytest.raises(TypeError, match="Cast has to be computed"):
        copies(Cast(Stored("x", 0, "BF16", (2,)), "F32"))


def test_stored_parts_in_reading_order() -> None:
    weight, scale = Stored("w", 0, "F8_E4M3", (128, 128)), Stored("s", 0, "F32", (1, 1))
    tensor = concat([dequantize(weight, scale, "BF16", name="w"), Stored("z", 0, "BF16", (3, 128))], 0)
    assert list(stored_parts(tensor)) == [weight, scale, Stored("z", 0, "BF16", (3, 128))]


# Dequantized


@pytest.fixture(scope="module")
def fp8(folder: Path) -> tuple[Dequantized, npt.NDArray[np.uint16]]:
    """[300, 520] BF16 from FP8 of every code, with scales that differ from block to block; and its bits."""
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 256, (300, 520), dtype=np.uint8)
    scale = rng.uniform(1e-3, 3, (3, 5)).astype(np.float32)
    path = folder / "fp8"
    path.write_bytes(b"abcd" + scale.tobytes() + codes.tobytes())
    tensor = dequantize(
        Stored(str(path), 4 + scale.nbytes, "F8_E4M3", codes.shape),
        Stored(str(path), 4, "F32", scale.shape),
        "BF16",
        name="w",
    )
    assert isinstance(tensor, Dequantized)
    bits = np.frombuffer(plain_reference.dequantized(codes, scale, "BF16"), np.uint16).reshape(codes.shape)
    return tensor, bits


@settings(quick, max_examples=80)
@given(st.data())
def test_a_narrowed_dequantized_tensor_is_the_slice_of_the_whole(
    fp8: tuple[Dequantized, npt.NDArray[np.uint16]], data: st.DataObject
) -> None:
    tensor: LazyTensor = fp8[0]
    bits = fp8[1]
    for _ in range(data.draw(st.integers(1, 3))):
        dim = data.draw(st.integers(0, 1))
        size = tensor.shape[dim]
        start = data.draw(st.integers(0, size) | st.sampled_from([n for n in (0, 128, 256) if n <= size]))
        length = data.draw(st.integers(0, size - start))
        tensor = narrow(tensor, dim, start, length)
        bits = bits[start : start + length] if dim == 0 else bits[:, start : start + length]
    with Reader() as reader:
        assert evaluate(tensor, reader, CpuEngine()).tobytes() == bits.tobytes()


@settings(quick, max_examples=60)
@given(st.data())
def test_a_concat_of_dequantized_narrows(fp8: tuple[Dequantized, npt.NDArray[np.uint16]], data: st.DataObject) -> None:
    whole, bits = fp8
    dim = data.draw(st.integers(0, 1))
    starts = st.integers(0, 260) | st.sampled_from([0, 128, 256])
    cuts = data.draw(st.lists(st.tuples(starts, st.integers(1, 40)), min_size=1, max_size=4))
    tensor = concat([narrow(whole, dim, start, length) for start, length in cuts], dim)
    expected = np.concatenate(
        [bits[start : start + n] if dim == 0 else bits[:, start : start + n] for start, n in cuts], dim
    )
    with Reader() as reader:
        assert evaluate(tensor, reader, CpuEngine()).tobytes() == expected.tobytes()
        pieces = [evaluate(strip, reader, CpuEngine()).tobytes() for strip in strips(tensor, 4000)]
    assert b"".join(pieces) == expected.tobytes()


@pytest.mark.parametrize("dim", [0, 1])
def test_parts_that_end_within_a_block_do_not_share_scales(dim: int) -> None:
    """100 rows of one block and 28 of another are no block."""
    whole = dequantize(Stored("w", 0, "F8_E4M3", (256, 256)), Stored("s", 0, "F32", (2, 2)), "BF16", name="w")
    first, second = narrow(whole, dim, 0, 100), narrow(whole, dim, 128, 28)
    assert concat([first, second], dim) == Concat((first, second), dim)
    assert concat([narrow(whole, dim, 0, 128), narrow(whole, dim, 128, 100)], dim) == narrow(whole, dim, 0, 228)


def test_whole_blocks_of_a_dequantized_tensor_narrow_weight_and_scale() -> None:
    weight, scale = Stored("w", 0, "F8_E4M3", (512, 256)), Stored("s", 0, "F32", (4, 2))
    tensor = dequantize(weight, scale, "BF16", name="w")
    assert narrow(tensor, 0, 128, 256) == Dequantized(
        Stored("w", 128 * 256, "F8_E4M3", (256, 256)), Stored("s", 8, "F32", (2, 2)), "BF16"
    )
    columns = narrow(tensor, 1, 128, 128)
    assert columns == Dequantized(narrow(weight, 1, 128, 128), narrow(scale, 1, 1, 1), "BF16")


def test_what_begins_within_a_block_reads_no_other_blocks() -> None:
    tensor = dequantize(Stored("w", 0, "F8_E4M3", (1024, 128)), Stored("s", 0, "F32", (8, 1)), "BF16", name="w")
    part = narrow(tensor, 0, 200, 100)
    assert part.shape == (100, 128)
    weights = [stored for stored in stored_parts(part) if stored.path == "w"]
    assert [(stored.offset // 128, stored.shape[0]) for stored in weights] == [(128, 256)]


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        (Stored("w", 0, "F8_E4M3", (129, 128)), Stored("s", 0, "F32", (1, 1))),
        (Stored("w", 0, "F8_E4M3", (128, 128)), Stored("s", 0, "BF16", (1, 1))),
        (Stored("w", 0, "F8_E4M3", (128, 128)), Stored("s", 0, "F32", (1,))),
        (Stored("w", 0, "F8_E4M3", (128,)), Stored("s", 0, "F32", (1,))),
    ],
)
def test_a_scale_that_does_not_fit(weight: Stored, scale: Stored) -> None:
    with pytest.raises(ScaleError, match=r"^model\.w: the scale does not fit the weight"):
        dequantize(weight, scale, "BF16", name="model.w")


def test_an_empty_fp8_weight(folder: Path) -> None:
    (folder / "none").write_bytes(b"")
    path = str(folder / "none")
    tensor = dequantize(Stored(path, 0, "F8_E4M3", (0, 256)), Stored(path, 0, "F32", (0, 2)), "BF16", name="w")
    with Reader() as reader:
        assert evaluate(tensor, reader, CpuEngine()).tobytes() == b""


# Strips


@quick
@given(st.integers(0, 2000), st.integers(0, 40), st.integers(1, 30_000), st.sampled_from(["BF16", "F32"]))
def test_strips_cover_exactly(rows: int, columns: int, max_bytes: int, dtype: str) -> None:
    tensor = Stored("x", 0, dtype, (rows, columns))
    found = list(strips(tensor, max_bytes))
    assert sum(strip.shape[0] for strip in found) == rows
    assert concat(found, 0) == tensor
    assert all(strip.shape[0] % 128 == 0 for strip in found[:-1])
    smallest = 128 * size_bytes(Stored("x", 0, dtype, (columns,)))
    assert all(size_bytes(strip) <= max(max_bytes, smallest) for strip in found)


def test_a_scalar_is_one_strip() -> None:
    tensor = Stored("x", 0, "F32", ())
    assert list(strips(tensor, 1)) == [tensor]


# The reader


def test_a_file_that_ends_early(folder: Path) -> None:
    (folder / "short").write_bytes(b"1234")
    with Reader() as reader, pytest.raises(FormatError, match="short: the file ends early: expected 2 more bytes at 4"):
        reader.read(Stored(str(folder / "short"), 2, "U8", (4,)))


def test_a_file_that_is_gone(folder: Path) -> None:
    with Reader() as reader, pytest.raises(MissingFileError):
        reader.read(Stored(str(folder / "nowhere"), 0, "U8", (4,)))


def test_a_folder_is_no_file(folder: Path) -> None:
    with Reader() as reader, pytest.raises(FormatError, match="cannot be read"):
        reader.read(Stored(str(folder), 0, "U8", (4,)))


def test_a_file_that_changed(folder: Path) -> None:
    path = folder / "changed"
    path.write_bytes(b"1234")
    stamps = {str(path): Stamp.of(path.stat())}
    path.write_bytes(b"12345")
    with Reader(stamps) as reader, pytest.raises(SourceChangedError, match="changed after the plan was made"):
        reader.read(Stored(str(path), 0, "U8", (4,)))
