"""The CPU path has the bits of the reference, wherever the strip lies and however its rows are strided."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from dequant_cases import (
    BITS,
    DTYPES,
    SPECIAL_SCALES,
    assert_same_bits,
    bits_of,
    every_code_with,
    random_operands,
    random_scales,
)

from weightkit.errors import PlanError, ScaleError
from weightkit.kernels.fp8_dequant import dequant_reference
from weightkit.kernels.fp8_dequant_cpu import dequant_cpu

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]


def reference(weight: U8, scale: F32, dtype: str) -> npt.NDArray[Any]:
    return bits_of(dequant_reference(torch.from_numpy(weight), torch.from_numpy(scale), DTYPES[dtype]))


def dequantized(weight: U8, scale: F32, dtype: str, **where: int) -> npt.NDArray[Any]:
    out = np.full(weight.shape, 0x1234, BITS[dtype])
    dequant_cpu(weight, scale, out, dtype=dtype, **where)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_under_special_and_random_scales(dtype: str) -> None:
    weight, scale = every_code_with(np.concatenate([SPECIAL_SCALES, random_scales(20_000, seed=2)]))
    assert_same_bits(dequantized(weight, scale, dtype), reference(weight, scale, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_around_the_edges_of_f16(dtype: str) -> None:
    """Scales whose products pass F16's overflow, its smallest normal and its smallest numbers in small steps."""
    edges = [0x43124000, 0x38800000 - (8 << 23), 0x38800000, 0x33000000, 0x33000000 - (8 << 23)]
    bits = np.concatenate([np.arange(edge - 300, edge + 300, 3) for edge in edges]).astype(np.uint32)
    weight, scale = every_code_with(bits.view(np.float32))
    assert_same_bits(dequantized(weight, scale, dtype), reference(weight, scale, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (127, 129), (130, 77), (576, 512), (64, 10944)], ids=str)
def test_shapes(shape: tuple[int, int], dtype: str) -> None:
    weight, scale = random_operands(*shape)
    assert_same_bits(dequantized(weight, scale, dtype), reference(weight, scale, dtype), dtype)


@pytest.mark.parametrize(("first_row", "last_row"), [(0, 128), (128, 300), (1, 2), (127, 129), (200, 300)])
def test_strip_of_rows(first_row: int, last_row: int) -> None:
    """With all scales of the tensor, and with the strip's own."""
    weight, scale = random_operands(300, 144)
    expected = reference(weight, scale, "BF16")[first_row:last_row]
    strip = weight[first_row:last_row]
    assert_same_bits(dequantized(strip, scale, "BF16", first_row=first_row), expected, "BF16")
    own = scale[first_row // 128 :]
    assert_same_bits(dequantized(strip, own, "BF16", first_row=first_row % 128), expected, "BF16")


@pytest.mark.parametrize(("first_col", "last_col"), [(0, 128), (576, 1152), (64, 65), (127, 129), (1000, 1152)])
def test_strip_of_columns_with_strided_rows(first_col: int, last_col: int) -> None:
    """18432 / 32 columns a rank is four and a half blocks: the second rank starts in the middle of one."""
    weight, scale = random_operands(200, 1152)
    expected = reference(weight, scale, "BF16")[:, first_col:last_col]
    target = np.full((200, 1152), 0x1234, np.uint16)
    out = target[:, first_col:last_col]
    dequant_cpu(weight[:, first_col:last_col], scale, out, dtype="BF16", first_col=first_col)
    assert_same_bits(out.copy(), expected, "BF16")
    assert (target[:, :first_col] == 0x1234).all()
    assert (target[:, last_col:] == 0x1234).all()


def test_read_only_input_and_no_more_written_than_out() -> None:
    weight, scale = random_operands(130, 144)
    expected = reference(weight, scale, "BF16")
    frozen, factors = np.frombuffer(weight.tobytes(), np.uint8).reshape(130, 144), scale.copy()
    factors.flags.writeable = False
    guarded = np.full(130 * 144 + 512, 0x1234, np.uint16)
    dequant_cpu(frozen, factors, guarded[256:-256].reshape(130, 144), dtype="BF16")
    assert_same_bits(guarded[256:-256].reshape(130, 144), expected, "BF16")
    assert (guarded[:256] == 0x1234).all()
    assert (guarded[-256:] == 0x1234).all()


def test_threads_share_nothing() -> None:
    weight, scale = random_operands(1024, 512)
    out = np.zeros(weight.shape, np.uint16)

    def strip(first: int) -> None:
        rows = slice(first, first + 96)
        dequant_cpu(weight[rows], scale, out[rows], dtype="BF16", first_row=first)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(strip, range(0, 1024, 96)))
    assert_same_bits(out, reference(weight, scale, "BF16"), "BF16")


def test_empty() -> None:
    for shape in [(0, 128), (4, 0)]:
        dequant_cpu(np.empty(shape, np.uint8), np.empty((1, 1), np.float32), np.empty(shape, np.uint16), dtype="BF16")


def test_scale_that_does_not_cover_the_strip() -> None:
    weight, scale = random_operands(256, 144)
    out = np.empty(weight.shape, np.uint16)
    for where, expected in [({"first_row": 1}, r"\[3, 2\]"), ({"first_col": 200}, r"\[2, 3\]")]:
        with pytest.raises(ScaleError, match=f"at least {expected}, found float32 \\[2, 2\\]"):
            dequant_cpu(weight, scale, out, dtype="BF16", **where)
    with pytest.raises(ScaleError, match="float64"):
        dequant_cpu(weight, scale.astype(np.float64), out, dtype="BF16")  # type: ignore[arg-type]


def test_operands_that_cannot_be() -> None:
    weight, scale = random_operands(128, 128)
    out = np.empty(weight.shape, np.uint16)
    with pytest.raises(PlanError, match="found F64"):
        dequant_cpu(weight, scale, out, dtype="F64")
    with pytest.raises(PlanError, match="found int8"):
        dequant_cpu(weight.view(np.int8), scale, out, dtype="BF16")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="uint32"):
        dequant_cpu(weight, scale, out, dtype="F32")
    with pytest.raises(PlanError, match="adjacent"):
        dequant_cpu(weight.T, scale, out, dtype="BF16")
    with pytest.raises(PlanError, match="adjacent"):
        dequant_cpu(weight, scale, out[::-1], dtype="BF16")
    with pytest.raises(PlanError, match="row -1"):
        dequant_cpu(weight, scale, out, dtype="BF16", first_row=-1)


def test_numba_is_imported_when_first_used() -> None:
    code = (
        "import sys, numpy as np; from weightkit.kernels.fp8_dequant_cpu import dequant_cpu; "
        "assert not {'numba', 'torch', 'triton'} & set(sys.modules), 'heavy import'; "
        "dequant_cpu(np.full((1, 1), 0x38, np.uint8), np.ones((1, 1), np.float32), o := np.zeros((1, 1), np.uint16), "
        "dtype='BF16'); assert o[0, 0] == 0x3F80; assert 'numba' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
