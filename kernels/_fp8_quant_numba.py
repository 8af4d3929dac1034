"""The compiled part of ``fp8_quant_cpu``: imports numba, so it is imported when first needed.

The bits of a block's F32 values are gathered in one array first; each step then is one loop over it without branches,
which LLVM turns into the vector instructions of the machine at hand. What is largest or smallest is looked for among
bits: those of numbers that are not negative are in the order of the numbers. (A comparison of floats, which may be NaN,
keeps such a loop from being vectors: 0.15 GB/s of BF16 that came from FP8, in place of 1.)
"""

# numba compiles functions that cannot carry annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from weightkit.kernels._fp8_numba import _bits, _decode_e4m3, _encode_bf16, _encode_f16, _float, _reinterpret

BLOCK = 128
GROUP = 8
"""Blocks that are gathered together: of each row that many bytes in a stretch (one by one: 0.5 to 0.7 of the speed)."""
_U8 = np.uint8
_U32 = np.uint32
_I64 = np.int64
_F32 = np.float32
_F64 = np.float64

_SIZE = _U32(0x7FFFFFFF)
"""What of the bits of a number is its magnitude."""
_INF = _U32(0x7F800000)
_NAN_CODE = _U32(0x7F)

_double: Any = _reinterpret(types.int64, types.float64)
_double_bits: Any = _reinterpret(types.float64, types.int64)
_FAST: Any = numba.njit(error_model="numpy")
"""Division by zero is not looked for: that would keep loops from being vectors."""


@_FAST
def _encode_size(value):
    """F32, 0 to 448 -> E4M3 code without a sign, nearest even."""
    bits = _bits(value)
    rounded = _U32(_U32(bits + _U32(0x7FFFF)) + _U32((bits >> _U32(20)) & _U32(1)))
    normal = _U32(_U32(rounded >> _U32(20)) - _U32(960))
    steps = _U32(_bits(_F32(value + _F32(16384.0))) & _U32(0x7FFFFF))  # of 2**-9, rounded by the addition
    code = steps if bits < _U32(0x3C800000) else normal
    return code if code < _U32(0x7E) else _U32(0x7E)


@_FAST
def _largest(block):
    """Bits of the largest magnitude, NaN above Inf, and of the largest that is no NaN."""
    most, most_number = _U32(0), _U32(0)
    for j in range(len(block)):
        bits = _U32(block[j] & _SIZE)
        number = bits if bits <= _INF else _U32(0)
        most = bits if bits > most else most
        most_number = number if number > most_number else most_number
    return most, most_number


@_FAST
def _bounds(block, near, mantissa, codes):
    """Codes of value / near, without signs; of the scales that explain them the bits of the least and the largest, F64;
    and whether there is none."""
    low, high, wrong = _I64(0), _double_bits(1e300), _U32(0)
    least = _U32(113) if mantissa == 10 else _U32(1)
    rebias = _U32(895 - mantissa)
    for j in range(len(block)):
        bits = _U32(block[j] & _SIZE)
        code = _encode_size(_F32(_float(bits) / near))
        codes[j] = _U8(code)
        wrong |= _U32((code == 0) != (bits == 0))
        exponent = _U32(bits >> _U32(23))
        power = _U32((exponent > least) & ((bits & _U32(0x7FFFFF)) == 0))  # of two: places below it are half as large
        exponent = exponent if exponent > least else least
        half = _double(_I64(_U32(exponent + rebias)) << _I64(52))
        half_below = _double(_I64(_U32(exponent + rebias - power)) << _I64(52))
        size, step = _F64(_float(bits)), _F64(_decode_e4m3(code))
        below, above = _double_bits((size - half_below) / step), _double_bits((size + half) / step)
        below = below if code != 0 else _I64(0)
        above = above if code != 0 else _double_bits(1e300)
        low = below if below > low else low
        high = above if above < high else high
    return low, high, wrong != 0 or low > high


@_FAST
def _differs(block, codes, scale, mantissa):
    """Whether codes times ``scale``, rounded to the dtype of the block, are not its magnitudes."""
    wrong = _U32(0)
    if mantissa == 7:
        for j in range(len(block)):
            again = _U32(_encode_bf16(_F32(_decode_e4m3(_U32(codes[j])) * scale)))
            wrong |= _U32(_U32(again << _U32(16)) ^ _U32(block[j] & _SIZE))
    elif mantissa == 10:
        for j in range(len(block)):
            again = _U32(_encode_f16(_F32(_decode_e4m3(_U32(codes[j])) * scale)))
            wrong |= _U32(again ^ _U32(_encode_f16(_float(_U32(block[j] & _SIZE)))))
    else:
        for j in range(len(block)):
            again = _bits(_F32(_decode_e4m3(_U32(codes[j])) * scale))
            wrong |= _U32(again ^ _U32(block[j] & _SIZE))
    return wrong != 0


@_FAST
def _narrow(value, mantissa):
    """F32, not negative -> bits in the dtype."""
    if mantissa == 7:
        return _U32(_encode_bf16(value))
    return _U32(_encode_f16(value)) if mantissa == 10 else _bits(value)


@_FAST
def _next(block, scale, mantissa):
    """Bits of a larger scale, up to which none gives all values back; 0 where ``scale`` itself does."""
    most, following = _U32(0), _U32(_bits(scale) + _U32(2))
    least, rebias = _U32(113) if mantissa == 10 else _U32(1), _U32(895 - mantissa)
    twice = 0.0 if mantissa == 23 else 2.0**-150  # products are rounded to F32 first
    for j in range(len(block)):
        bits = _U32(block[j] & _SIZE)
        size = _float(bits)
        near = _F32(size / scale)
        near = near if near < _F32(448.0) else _F32(448.0)
        code = _encode_size(near)
        back, own = _narrow(_F32(_decode_e4m3(code) * scale), mantissa), _narrow(size, mantissa)
        code = code if back <= own else _U32(code - _U32(1))
        exponent = _U32(bits >> _U32(23))
        power = _U32((exponent > least) & ((bits & _U32(0x7FFFFF)) == 0))
        exponent = exponent if exponent > least else least
        half_below = _double(_I64(_U32(exponent + rebias - power)) << _I64(52))
        end = (_F64(size) - half_below) * (1.0 - 2.0**-23) - twice
        end = _bits(_F32(end / _F64(_decode_e4m3(code))))
        end = _U32((end if end > following else following) - _U32(1))
        end = end if code != 0 else _INF
        end = end if back != own else _U32(0)
        most = end if end > most else most
    return most


@_FAST
def _least(block, first, last, mantissa):
    """The least scale that explains a block of those from ``first`` to ``last``, bits; 0 where none does."""
    scale, start, good = first, 0, 0
    while good < len(block) and scale <= last:
        following = _next(block[start : start + BLOCK], _float(scale), mantissa)
        if following == 0:
            start, good = (start + BLOCK if start + BLOCK < len(block) else 0), good + BLOCK
        else:
            scale, good = following, 0
    return _float(scale) if scale <= last else _F32(0)


@_FAST
def _explained(block, largest, mantissa, codes):
    """A scale that the block was dequantized with, as far as its values tell; 0 where there is none."""
    if largest < (_F32(2.0**-14) if mantissa == 10 else _F32(2.0**-108)):
        most = _F32(largest * (_F32(2.0**-7) if mantissa == 10 else _F32(512.0)))
        return _least(block, _U32(1), _bits(most), mantissa)
    for k in range(8):
        candidate = _F32(448.0 - 32.0 * k) if k < 7 else _F32(240.0)
        near = _F32(largest / candidate)
        low, high, start, count = _I64(0), _double_bits(1e300), 0, BLOCK
        while start < len(block) and low <= high:  # what did not come from FP8 is found out soon
            end = min(start + count, len(block))
            below, above, none = _bounds(block[start:end], near, mantissa, codes[start:end])
            low, high = max(low, below), min(high, above)
            if none:
                low, high = _I64(1), _I64(0)
            start, count = end, 2 * count
        if low <= high:
            scale = _F32((_double(low) + _double(high)) * 0.5)
            if not _differs(block, codes, scale, mantissa):
                return scale
            if mantissa == 10:
                scale = _least(block, _U32(_bits(scale) - _U32(1)), _U32(_bits(scale) + _U32(1)), mantissa)
                if scale != 0:
                    return scale
    return _F32(0)


@_FAST
def _encode(values, scale, codes):
    for j in range(len(values)):
        bits = _U32(values[j])
        near = _F32(_float(_U32(bits & _SIZE)) / scale)
        near = _F32(448.0) if near > _F32(448.0) else near
        code = _encode_size(near) if near == near else _NAN_CODE
        codes[j] = _U8(_U32(code | _U32((bits >> _U32(24)) & _U32(0x80))))


@_FAST
def _plain(largest, power_of_two):
    scale = _F32(largest / _F32(448.0))
    if not scale > 0:
        return _F32(1)
    if power_of_two:
        bits = _bits(scale)
        up = _U32(0x800000) if (bits & _U32(0x7FFFFF)) != 0 else _U32(0)
        return _float(_U32(_U32(bits & _INF) + up))
    return scale


@_FAST
def _scale(block, mantissa, power_of_two, codes):
    """As ``fp8_quant`` says; ``codes`` is scratch."""
    most, most_number = _largest(block)
    largest, scale = _float(most_number), _F32(0)
    if most < _INF and most > 0 and not power_of_two:
        scale = _explained(block, largest, mantissa, codes)
    return scale if scale != 0 else _plain(largest, power_of_two)


@_FAST
def _gather(values, shift, out):
    for j in range(len(values)):
        out[j] = _U32(_U32(values[j]) << shift)


_SIGNATURES = [
    types.void(
        types.Array(bits, 2, "C", readonly=True),
        types.Array(types.uint8, 2, "C"),
        types.Array(types.float32, 1, "C"),
        types.int64,
        types.boolean,
    )
    for bits in (types.uint16, types.uint32)
]


def _compiled(function):
    """Compile now, or load what an earlier process compiled; without a place to keep it, compile in every process."""
    try:
        return numba.njit(_SIGNATURES, nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # numba's "no locator available"
        return numba.njit(_SIGNATURES, nogil=True, error_model="numpy")(function)


@_compiled
def quantize_rows(values, codes, scales, mantissa, power_of_two):
    """Up to 128 rows: values [rows, N] -> codes [rows, N], scales [ceil(N / 128)].

    Values are bits: of BF16, or of F32 that a dtype with so many bits of ``mantissa`` was widened to.
    """
    rows, columns = values.shape
    shift = _U32(32 - 8 * values.itemsize)
    gathered, found = np.empty((GROUP, BLOCK * BLOCK), np.uint32), np.empty(BLOCK * BLOCK, np.uint8)
    for first in range(0, len(scales), GROUP):
        count = min(GROUP, len(scales) - first)
        for i in range(rows):
            for b in range(count):
                start = (first + b) * BLOCK
                width = min(BLOCK, columns - start)
                _gather(values[i, start : start + width], shift, gathered[b, i * width : (i + 1) * width])
        for b in range(count):
            block = gathered[b, : rows * min(BLOCK, columns - (first + b) * BLOCK)]
            scales[first + b] = _scale(block, mantissa, power_of_two, found)
        for i in range(rows):
            for b in range(count):
                start = (first + b) * BLOCK
                width = min(BLOCK, columns - start)
                part = gathered[b, i * width : (i + 1) * width]
                _encode(part, scales[first + b], codes[i, start : start + width])
