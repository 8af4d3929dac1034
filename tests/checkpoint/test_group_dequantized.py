"""GPTQ weights as lazy tensors: however they are cut and joined, the values are those of the whole in plain numpy, and
only words that are needed are read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gptq_cases import Packed, random_packed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weightkit.checkpoint.reading import Reader
from weightkit.checkpoint.tensors import (
    Concat,
    GroupDequantized,
    LazyTensor,
    Narrow,
    Stored,
    cast_to,
    concat,
    dequantize_groups,
    is_plain,
    narrow,
    size_bytes,
    stored_parts,
)
from weightkit.compute import CpuEngine, evaluate, strips
from weightkit.compute import evaluate as evaluating
from weightkit.errors import ScaleError
from weightkit.writer.plan import describe

Bits = npt.NDArray[np.unsignedinteger]
quick = settings(deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def stored_in(folder: Path, packed: Packed, name: str, *, zero_offset: int = 1, dtype: str = "BF16") -> LazyTensor:
    """The four tensors in a file, one after the other, as a lazy weight."""
    path, offset, parts = folder / name, 3, []
    for array, kind in zip(packed.arrays, ("I32", "I32", "F16", "I32"), strict=True):
        parts.append(Stored(str(path), offset, kind, array.shape))
        offset += array.nbytes
    path.write_bytes(b"abc" + b"".join(array.tobytes() for array in packed.arrays))
    return dequantize_groups(*parts, bits=packed.bits, zero_offset=zero_offset, dtype=dtype, name=name)


def bytes_of(tensor: LazyTensor) -> bytes:
    with Reader() as reader:
        return evaluate(tensor, reader, CpuEngine()).tobytes()


CASES = [(bits, order) for bits in (4, 8) for order in ("ascending", "random", "one")]


@pytest.fixture(scope="module")
def wholes(folder: Path) -> list[tuple[LazyTensor, Bits]]:
    """[72, 208] of both widths and all orders of groups, each with its bits."""
    made = []
    for bits, order in CASES:
        packed = random_packed(72, 208, bits, order)
        made.append((stored_in(folder, packed, f"whole-{bits}-{order}"), packed.dequantized(1, "BF16")))
    return made


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize(("bits", "order"), CASES)
def test_the_whole(folder: Path, bits: int, order: str, zero_offset: int, dtype: str) -> None:
    packed = random_packed(24, 64, bits, order)
    tensor = stored_in(folder, packed, "it", zero_offset=zero_offset, dtype=dtype)
    expected = packed.dequantized(zero_offset, dtype)
    assert isinstance(tensor, GroupDequantized)
    assert (tensor.dtype, tensor.shape, size_bytes(tensor)) == (dtype, (24, 64), expected.nbytes)
    assert not is_plain(tensor)
    assert bytes_of(tensor) == expected.tobytes()


@settings(quick, max_examples=50)
@given(st.data())
def test_narrows_are_slices(wholes: list[tuple[LazyTensor, Bits]], data: st.DataObject) -> None:
    tensor, bits = data.draw(st.sampled_from(wholes))
    for _ in range(data.draw(st.integers(1, 3))):
        dim = data.draw(st.integers(0, 1))
        size = tensor.shape[dim]
        start = data.draw(st.integers(0, size) | st.sampled_from(range(0, size + 1, 8)))
        length = data.draw(st.integers(0, size - start))
        tensor = narrow(tensor, dim, start, length)
        bits = bits[start : start + length] if dim == 0 else bits[:, start : start + length]
        assert tensor.shape == bits.shape
    assert bytes_of(tensor) == bits.tobytes()


@settings(quick, max_examples=50)
@given(st.data(), st.integers(0, 1))
def test_narrows_join_to_the_whole(wholes: list[tuple[LazyTensor, Bits]], data: st.DataObject, dim: int) -> None:
    """Wherever the cuts are, inside words too: a shard that is merged is what it was."""
    tensor, _ = data.draw(st.sampled_from(wholes))
    size = tensor.shape[dim]
    cuts = data.draw(st.lists(st.integers(0, size) | st.sampled_from(range(0, size + 1, 8)), max_size=5))
    edges = [0, *sorted(cuts), size]
    parts = [narrow(tensor, dim, low, high - low) for low, high in pairwise(edges) if high > low]
    assert concat(parts, dim) == tensor


@settings(quick, max_examples=50)
@given(st.data(), st.integers(0, 1))
def test_concats_of_any_narrows(wholes: list[tuple[LazyTensor, Bits]], data: st.DataObject, dim: int) -> None:
    """Of one weight or of several, in any order, overlapping or not."""
    chosen = data.draw(st.lists(st.sampled_from(wholes), min_size=1, max_size=2))
    parts, slices = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        tensor, bits = data.draw(st.sampled_from(chosen))
        size = tensor.shape[dim]
        start = data.draw(st.integers(0, size - 1) | st.sampled_from(range(0, size, 8)))
        length = data.draw(st.integers(1, min(24, size - start)))
        parts.append(narrow(tensor, dim, start, length))
        slices.append(bits[start : start + length] if dim == 0 else bits[:, start : start + length])
    tensor, expected = concat(parts, dim), np.concatenate(slices, dim)
    assert bytes_of(tensor) == expected.tobytes()
    with pytest.MonkeyPatch.context() as patch, Reader() as reader:
        patch.setattr(evaluating_module(), "STRIP_ROWS", 5)
        patch.setattr(evaluating_module(), "GROUP_STRIP_BYTES", 1)
        found = [evaluate(strip, reader, CpuEngine()).tobytes() for strip in strips(tensor, 1000)]
    assert b"".join(found) == expected.tobytes()


def evaluating_module() -> object:
    return sys.modules[evaluating.__module__]


def test_both_dimensions_narrow_what_is_stored() -> None:
    """Rows of the weight are columns of three tensors; its columns are rows of the words and of g_idx alone."""
    whole = dequantize_groups(*fitting(), bits=4, zero_offset=1, dtype="BF16", name="w")
    assert isinstance(whole, GroupDequantized)
    rows = narrow(whole, 0, 16, 8)
    assert rows == replace(
        whole,
        qweight=Narrow(whole.qweight, 1, 16, 8),
        qzeros=Narrow(whole.qzeros, 1, 2, 1),
        scales=Narrow(whole.scales, 1, 16, 8),
    )
    columns = narrow(whole, 1, 64, 32)
    assert columns == replace(
        whole, qweight=Stored("q", 8 * 32 * 4, "I32", (4, 32)), g_idx=Stored("g", 64 * 4, "I32", (32,))
    )


@pytest.mark.parametrize(("dim", "start", "length", "low", "high"), [(0, 11, 6, 8, 24), (1, 16, 3, 16, 24)])
def test_a_cut_inside_a_word_takes_the_words_that_cover_it(
    dim: int, start: int, length: int, low: int, high: int
) -> None:
    whole = dequantize_groups(*fitting(), bits=4, zero_offset=1, dtype="BF16", name="w")
    assert narrow(whole, dim, start, length) == Narrow(narrow(whole, dim, low, high - low), dim, start - low, length)


def test_what_shares_neither_groups_nor_scales_stays_apart() -> None:
    qweight, qzeros, scales, g_idx = fitting()
    one = dequantize_groups(qweight, qzeros, scales, g_idx, bits=4, zero_offset=1, dtype="BF16", name="w")
    other = replace(one, g_idx=Stored("another", 0, "I32", (128,)), scales=Stored("t", 0, "F16", (4, 32)))
    for dim in (0, 1):
        assert concat([one, other], dim) == Concat((one, other), dim)
        assert concat([one, replace(one, zero_offset=0)], dim) == Concat((one, replace(one, zero_offset=0)), dim)
    words = [narrow(one, 0, 0, 8), narrow(replace(one, zero_offset=0), 0, 8, 8)]
    assert concat(words, 0) == Concat(tuple(words), 0)


def test_outputs_of_modules_with_one_g_idx_join() -> None:
    qweight, qzeros, scales, g_idx = fitting()
    gate = dequantize_groups(qweight, qzeros, scales, g_idx, bits=4, zero_offset=1, dtype="BF16", name="gate")
    up = replace(gate, qweight=Stored("u", 0, "I32", (16, 32)))
    joined = concat([gate, up], 0)
    assert isinstance(joined, GroupDequantized)
    assert joined.shape == (64, 128)
    assert joined.qweight == Concat((qweight, Stored("u", 0, "I32", (16, 32))), 1)


def test_cast_and_description() -> None:
    whole = dequantize_groups(*fitting(), bits=4, zero_offset=1, dtype="BF16", name="w")
    assert cast_to(whole, "BF16") is whole
    assert narrow(cast_to(whole, "F32"), 0, 8, 8) == cast_to(narrow(whole, 0, 8, 8), "F32")
    assert list(stored_parts(whole)) == list(fitting())
    described = json.dumps(describe(whole, {}))
    for changed in (replace(whole, zero_offset=0), replace(whole, dtype="F16"), narrow(whole, 1, 0, 8)):
        assert json.dumps(describe(changed, {})) != described


def fitting() -> tuple[Stored, Stored, Stored, Stored]:
    """[32, 128] of 4 bits, groups of 32."""
    return (
        Stored("q", 0, "I32", (16, 32)),
        Stored("z", 0, "I32", (4, 4)),
        Stored("s", 0, "F16", (4, 32)),
        Stored("g", 0, "I32", (128,)),
    )


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, Stored("q", 0, "I32", (16, 36)), r"qweight does not fit .*expected I32 \[16, 32\], found I32 \[16, 36\]"),
        (0, Stored("q", 0, "U8", (16, 32)), "qweight does not fit .*found U8"),
        (0, Stored("q", 0, "I32", (16,)), "qweight does not fit"),
        (1, Stored("z", 0, "I32", (4, 32)), r"qzeros does not fit .*expected I32 \[4, 4\], found I32 \[4, 32\]"),
        (1, Stored("z", 0, "I32", (3, 4)), "qzeros does not fit"),
        (2, Stored("s", 0, "BF16", (4, 32)), r"scales does not fit .*expected F16 \[4, 32\], found BF16"),
        (2, Stored("s", 0, "F16", (4, 16)), "scales does not fit"),
        (2, Stored("s", 0, "F16", (0, 32)), "scales does not fit"),
        (3, Stored("g", 0, "I64", (128,)), r"g_idx does not fit .*expected I32 \[128\], found I64"),
        (3, Stored("g", 0, "I32", (64,)), "g_idx does not fit"),
    ],
)
def test_parts_that_do_not_fit(place: int, wrong: Stored, message: str) -> None:
    parts = [wrong if number == place else part for number, part in enumerate(fitting())]
    with pytest.raises(ScaleError, match=rf"^model\.w: {message}"):
        dequantize_groups(*parts, bits=4, zero_offset=1, dtype="BF16", name="model.w")


@pytest.mark.parametrize(("bits", "zero_offset"), [(2, 1), (3, 1), (16, 1), (4, 2)])
def test_formats_that_do_not_exist(bits: int, zero_offset: int) -> None:
    with pytest.raises(ScaleError, match=r"^model\.w: no such GPTQ format"):
        dequantize_groups(*fitting(), bits=bits, zero_offset=zero_offset, dtype="BF16", name="model.w")


@pytest.mark.parametrize("group", [-1, 4, 1 << 30])
def test_a_group_without_scale_is_found_before_it_is_looked_up(folder: Path, group: int) -> None:
    packed = random_packed(16, 64, 4, "ascending")
    packed.g_idx[5] = group
    with pytest.raises(ScaleError, match=r"hostile: g_idx names groups that have no scale"):
        bytes_of(stored_in(folder, packed, "hostile"))


def test_narrow_reads_little(folder: Path) -> None:
    """A half of the inputs is a half of the words; a strip of outputs leaves the other columns alone."""
    packed = random_packed(1024, 4096, 4, "ascending", groups=32)
    whole = stored_in(folder, packed, "large")
    small = packed.arrays[1].nbytes + packed.arrays[2].nbytes
    words, index = packed.arrays[0].nbytes, packed.arrays[3].nbytes
    with Reader() as reader:
        evaluate(narrow(whole, 1, 2048, 2048), reader, CpuEngine())
        assert reader.bytes_read == words // 2 + small + index // 2
    with Reader() as reader:
        evaluate(narrow(whole, 0, 512, 8), reader, CpuEngine())
        assert reader.bytes_read == words // 128 + small // 128 + index


def test_an_expert_of_deepseek_v3_is_one_strip() -> None:
    sizes = {"gate": (2048, 7168), "down": (7168, 2048)}
    for n, k in sizes.values():
        expert = GroupDequantized(
            Stored("q", 0, "I32", (k // 8, n)),
            Stored("z", 0, "I32", (k // 128, n // 8)),
            Stored("s", 0, "F16", (k // 128, n)),
            Stored("g", 0, "I32", (k,)),
            4,
            1,
            "BF16",
        )
        assert list(strips(expert, 8 << 20)) == [expert]
        halves = list(strips(cast_to(expert, "F32"), 8 << 20))
        assert len(halves) == 2
        assert all(strip.shape[0] % 128 == 0 for strip in halves)
        assert concat(halves, 0) == cast_to(expert, "F32")


PEAK = """
import json, sys
from pathlib import Path
from weightkit.checkpoint.tensors import Stored, dequantize_groups
from weightkit.layouts import FileSet
from weightkit.writer import make_plan
from weightkit.writer.executor import execute, peak_memory_bytes

folder, dtype = Path(sys.argv[1]), sys.argv[2]

def weight(n, k):
    shapes = (("I32", (k // 8, n)), ("I32", (k // 128, n // 8)), ("F16", (k // 128, n)), ("I32", (k,)))
    parts = [Stored(str(folder / "source/zeros"), 0, kind, shape) for kind, shape in shapes]
    return dequantize_groups(*parts, bits=4, zero_offset=1, dtype=dtype, name="w")

def plan(name, n, k):
    return make_plan(FileSet(files={"f": {"w": weight(n, k)}}, side_files={}, stamps={}, root=str(folder / "source"),
                             index=False), folder / name)

def largest():  # of this process alone: ru_maxrss begins at the size of the one that started it
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

execute(plan("warm", 128, 128), progress=False)
before, it = largest(), plan("out", 16384, 7168)
execute(it, jobs=1, progress=False)
print(json.dumps({"stated": peak_memory_bytes(it, 1), "grown": largest() - before}))
"""


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_the_writer_takes_the_memory_that_it_states(tmp_path: Path, dtype: str) -> None:
    """[16384, 7168]: 224 or 448 MiB, of which some strips are held at a time."""
    (tmp_path / "source").mkdir()
    with (tmp_path / "source/zeros").open("wb") as file:
        file.truncate(64 << 20)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path, dtype],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"},  # what is freed goes back, and no heap keeps it
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["stated"] < 192 << 20
    assert found["grown"] < found["stated"] + (16 << 20)
