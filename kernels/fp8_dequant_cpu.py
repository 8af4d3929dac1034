"""FP8 block dequantization on a CPU: the bits of ``fp8_dequant``, for machines without a GPU.

The compiled loop releases the GIL and runs on the caller's thread: callers run one strip a thread. numba compiles it
once for a machine and keeps the result beside this file, or in the user's cache directory where that is read-only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from weightkit.errors import PlanError, ScaleError

BLOCK = 128
"""Rows and columns that share a scale."""

_KINDS = {"BF16": 0, "F16": 1, "F32": 2}
_OUTPUTS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}


def dequant_cpu(
    weight: npt.NDArray[np.uint8],
    scale_inv: npt.NDArray[np.float32],
    out: npt.NDArray[Any],
    *,
    dtype: str,
    first_row: int = 0,
    first_col: int = 0,
) -> None:
    """Write ``float32(E4M3) * scale_inv[row // 128, col // 128]``, rounded once to nearest even, into ``out``.

    Args:
        weight: [M, N] uint8, E4M3 codes; rows may be strided, elements of a row are adjacent. May be read-only.
        scale_inv: F32. It covers rows ``0 .. first_row + M`` and columns ``0 .. first_col + N`` in blocks of 128; rows
            of blocks beyond are ignored, so that a strip can be given with all scales of its tensor, or with its own.
        out: [M, N] uint16 (BF16, F16) or uint32 (F32), the bits of the result, strided as weight may be.
        dtype: ``BF16``, ``F16`` or ``F32``.
        first_row, first_col: where weight's first element lies in the tensor whose scales these are.

    Raises:
        ScaleError: scales that do not cover the weight.
        PlanError: operands of another dtype, shape or layout.
    """
    _check(weight, scale_inv, out, dtype, first_row, first_col)
    if weight.size == 0:
        return
    from weightkit.kernels._fp8_numba import dequant_rows

    codes, codes_stride = _flat(weight)
    bits, out_stride = _flat(out)
    dequant_rows(codes, scale_inv, bits, _KINDS[dtype], *weight.shape, codes_stride, out_stride, first_row, first_col)


def _flat(rows: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], int]:
    """A matrix's memory from its first to its last element as one row, and how many elements lie from row to row."""
    height, width = rows.shape
    stride = rows.strides[0] // rows.itemsize if height > 1 else width
    shape, strides = ((height - 1) * stride + width,), (rows.itemsize,)
    return np.lib.stride_tricks.as_strided(rows, shape, strides, writeable=rows.flags.writeable), stride


def _check(
    weight: npt.NDArray[np.uint8],
    scale_inv: npt.NDArray[np.float32],
    out: npt.NDArray[Any],
    dtype: str,
    first_row: int,
    first_col: int,
) -> None:
    if dtype not in _KINDS:
        raise PlanError("no such output of a dequantization", expected=", ".join(_KINDS), found=dtype)
    if weight.dtype != np.uint8 or weight.ndim != 2:
        raise PlanError(
            "dequantization needs a matrix of E4M3 codes",
            expected="uint8 [M, N]",
            found=f"{weight.dtype} {list(weight.shape)}",
        )
    if out.dtype != _OUTPUTS[dtype] or out.shape != weight.shape or not out.flags.writeable:
        raise PlanError(
            f"output of a dequantization to {dtype} does not fit its weight",
            expected=f"writable {np.dtype(_OUTPUTS[dtype])} {list(weight.shape)}",
            found=f"{out.dtype} {list(out.shape)}",
        )
    for name, array in (("weight", weight), ("out", out)):
        adjacent = array.shape[1] <= 1 or array.strides[1] == array.itemsize
        forward = array.strides[0] >= 0 and array.strides[0] % array.itemsize == 0
        if array.size and not (adjacent and forward):
            raise PlanError(
                f"elements of a row of {name} are not adjacent, or rows run backwards", found=f"strides {array.strides}"
            )
    if first_row < 0 or first_col < 0:
        raise PlanError("a strip starts before its tensor", found=f"row {first_row}, column {first_col}")
    needed = [-(-(first + size) // BLOCK) for first, size in zip((first_row, first_col), weight.shape, strict=True)]
    shape = list(scale_inv.shape)
    if scale_inv.dtype != np.float32 or len(shape) != 2 or shape[0] < needed[0] or shape[1] < needed[1]:
        raise ScaleError(
            f"scale does not cover a strip of shape {list(weight.shape)} from row {first_row}, column {first_col}",
            expected=f"float32, at least {needed}",
            found=f"{scale_inv.dtype} {shape}",
        )
