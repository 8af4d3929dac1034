"""The compiled part of ``fp8_dequant_cpu``: imports numba, so it is imported when first needed.

Every step is an integer or F32 operation without branches, which LLVM turns into the vector instructions of the machine
at hand. The steps are exact but for the product, rounded by F32 multiplication, and the encoding. No fast math, and no
dependence on how a CPU converts or propagates NaN. (Looking results up in a table of 256 for each block gives the same
bits, but one at a time: on a CPU with AVX-512 at 0.6 of the speed.)
"""

# numba compiles functions that cannot carry annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

BLOCK = 128
BF16, F16, F32 = 0, 1, 2

_U32 = np.uint32
_F32 = np.float32


def _reinterpret(source: Any, target: Any) -> Any:
    """A function that numba compiles to nothing: the same bits under another type."""

    def typed(_typing, _value):
        def generate(context, builder, _signature, arguments):
            return builder.bitcast(arguments[0], context.get_value_type(target))

        return target(source), generate

    return intrinsic(typed)


_float: Any = _reinterpret(types.uint32, types.float32)
_bits: Any = _reinterpret(types.float32, types.uint32)


@numba.njit
def _decode_e4m3(code):
    """uint32 code -> its F32 value.

    Exponent and mantissa, moved to where F32 has them and rebiased by 127 - 7, are the value of a normal code. With an
    exponent one higher a subnormal one is 2**-6 too large. No F32 subnormal is met on the way: CPUs are slow on those.
    """
    magnitude = code & _U32(0x7F)
    subnormal = magnitude < _U32(8)
    rebias = _U32(121 << 23) if subnormal else _U32(120 << 23)
    excess = _F32(2.0**-6) if subnormal else _F32(0)
    value = _float(_U32((magnitude << _U32(20)) + rebias)) - excess
    bits = _bits(value) | ((code & _U32(0x80)) << _U32(24))
    return _float(_U32(0x7FFFFFFF) if magnitude == _U32(0x7F) else _U32(bits))


@numba.njit
def _encode_bf16(value):
    bits = _bits(value)
    rounded = _U32(bits + _U32(0x7FFF) + ((bits >> _U32(16)) & _U32(1))) >> _U32(16)
    return np.uint16(rounded) if value == value else np.uint16(0x7FFF)


@numba.njit
def _encode_f16(value):
    """Round by F32 addition: 4 times the value in a sum whose last place is 4 times F16's at the value's exponent.

    The exponent is at least 2**-14, below which F16 counts in equal steps.
    """
    bits = _bits(value)
    magnitude = bits & _U32(0x7FFFFFFF)
    exponent = magnitude & _U32(0x7F800000)
    exponent = exponent if exponent > _U32(113 << 23) else _U32(113 << 23)
    times_4 = (_float(_U32(magnitude)) * _F32(2.0**112)) * _F32(2.0**-110)  # Inf from 2**16
    total = _bits(_float(_U32(exponent + _U32(15 << 23))) + times_4)
    rounded = ((total >> _U32(13)) & _U32(0x7C00)) + (total & _U32(0xFFF))
    signed = _U32(rounded | ((bits >> _U32(16)) & _U32(0x8000)))
    return np.uint16(signed) if value == value else np.uint16(0x7FFF)


@numba.njit
def _encode_f32(value):
    return _bits(value) if value == value else _U32(0x7FFFFFFF)


_SIGNATURES = [
    types.void(
        types.Array(types.uint8, 1, "C", readonly=True),
        types.Array(types.float32, 2, "A", readonly=True),
        types.Array(bits, 1, "C"),
        *([types.int64] * 7),
    )
    for bits in (types.uint16, types.uint32)
]


def _compiled(function):
    """Compile now, or load what an earlier process compiled; without a place to keep it, compile in every process."""
    try:
        return numba.njit(_SIGNATURES, nogil=True, cache=True)(function)
    except RuntimeError:  # numba's "no locator available": neither this folder nor the user's cache is writable
        return numba.njit(_SIGNATURES, nogil=True)(function)


@_compiled
def dequant_rows(codes, scale, out, kind, rows, cols, codes_stride, out_stride, first_row, first_col):
    """codes, out: flat from the first to the last element used, a row every ``*_stride`` elements."""
    blocks = (first_col + cols + BLOCK - 1) // BLOCK
    for row in range(rows):
        block_row = (first_row + row) // BLOCK
        for block in range(first_col // BLOCK, blocks):
            start = max(0, block * BLOCK - first_col)
            count = min(cols, (block + 1) * BLOCK - first_col) - start
            source = codes[row * codes_stride + start : row * codes_stride + start + count]
            target = out[row * out_stride + start : row * out_stride + start + count]
            factor = scale[block_row, block]
            if kind == BF16:
                for i in range(count):
                    target[i] = _encode_bf16(_decode_e4m3(_U32(source[i])) * factor)
            elif kind == F16:
                for i in range(count):
                    target[i] = _encode_f16(_decode_e4m3(_U32(source[i])) * factor)
            else:
                for i in range(count):
                    target[i] = _encode_f32(_decode_e4m3(_U32(source[i])) * factor)
