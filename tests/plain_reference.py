"""What a cast must give, in plain numpy: written from the formats' definitions, independent of weightkit and of torch.

E4M3 (OCP 8-bit floating point): a sign, 4 bits of exponent with bias 7, 3 of mantissa; no Inf; NaN where all bits below
the sign are set. BF16 is the upper half of F32.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: The one NaN that a dequantization writes, by dtype.
NAN_BITS = {"BF16": 0x7FFF, "F16": 0x7FFF, "F32": 0x7FFFFFFF}


def _decode(code: int) -> float:
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


E4M3 = np.array([_decode(code) for code in range(256)], np.float32)


def round_to(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.unsignedinteger]:
    """F32 -> the bits of ``dtype``, rounded to nearest even. NaN becomes NaN, of whatever pattern."""
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), np.uint64(0x7FFF), rounded).astype(np.uint16)


def widen(data: bytes, dtype: str) -> npt.NDArray[np.float32]:
    """The values of a float dtype's bytes as F32."""
    if dtype == "F32":
        return np.frombuffer(data, np.float32)
    if dtype == "F16":
        return np.frombuffer(data, np.float16).astype(np.float32)
    return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)


def dequantized(codes: npt.NDArray[np.uint8], scale: npt.NDArray[np.float32], dtype: str) -> bytes:
    """``float32(code) * scale[row // 128, column // 128]`` rounded once; codes [M, N]."""
    rows, columns = np.arange(codes.shape[0]) // 128, np.arange(codes.shape[1]) // 128
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        values = E4M3[codes] * scale[rows[:, None], columns[None, :]]
    bits = round_to(values, dtype)
    return np.where(np.isnan(values), np.array(NAN_BITS[dtype], bits.dtype), bits).tobytes()
