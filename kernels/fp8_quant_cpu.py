"""Float weights to FP8 with block scales on a CPU: the bits of ``fp8_quant``, whose docstring has the rules.

The compiled loop releases the GIL and runs on the caller's thread, as that of ``fp8_dequant_cpu``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from weightkit.errors import PlanError

BLOCK = 128
"""Rows and columns that share a scale."""

_MANTISSA_BITS = {"BF16": 7, "F16": 10, "F32": 23}


def quantize_cpu(
    values: npt.NDArray[np.uint8],
    shape: tuple[int, int],
    dtype: str,
    *,
    power_of_two: bool = False,
    out: npt.NDArray[np.uint8] | None = None,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Codes U8 [M, N] and scales F32 [ceil(M / 128), ceil(N / 128)] of a matrix.

    Args:
        values: its bytes, row-major, flat.
        shape: [M, N].
        dtype: ``BF16``, ``F16`` or ``F32``.
        power_of_two: scales are powers of two.
        out: where to put the codes, of their shape, contiguous.

    Raises:
        PlanError: another dtype.
    """
    from weightkit.kernels._fp8_quant_numba import quantize_rows

    if dtype not in _MANTISSA_BITS:
        raise PlanError("values that cannot be quantized in blocks", expected="BF16, F16 or F32", found=dtype)
    rows, columns = shape
    codes = np.empty(shape, np.uint8) if out is None else out
    scales = np.empty((-(-rows // BLOCK), -(-columns // BLOCK)), np.float32)
    for block_row in range(len(scales)):
        part = slice(block_row * BLOCK, min((block_row + 1) * BLOCK, rows))
        bits = _bits(values, part, columns, dtype)
        quantize_rows(bits, codes[part], scales[block_row], _MANTISSA_BITS[dtype], power_of_two)
    return codes, scales


def _bits(
    values: npt.NDArray[np.uint8], rows: slice, columns: int, dtype: str
) -> npt.NDArray[np.uint16] | npt.NDArray[np.uint32]:
    """Rows of a matrix: BF16 as it is, the others in F32, exactly."""
    itemsize = 4 if dtype == "F32" else 2
    raw = values[rows.start * columns * itemsize : rows.stop * columns * itemsize]
    if dtype == "BF16":
        return raw.view(np.uint16).reshape(-1, columns)
    wide = raw.view(np.float16).astype(np.float32) if dtype == "F16" else raw
    return wide.view(np.uint32).reshape(-1, columns)
