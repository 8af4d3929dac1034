"""The compiled part of ``fp8_quant_cpu``: imports numba, so it is imported when first needed."""

# numba compiles functions that cannot carry annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from weightkit.kernels._fp8_numba import _bits, _decode_e4m3, _encode_bf16, _encode_f16, _float, _reinterpret

BLOCK = 128
_U32 = np.uint32
_F32 = np.float32


_double: Any = _reinterpret(types.uint64, types.float64)
_FAST: Any = numba.njit(error_model="numpy")
"""Division by zero is not looked for: that would keep loops from being vectors."""


@_FAST
def _encode_e4m3(value):
    """F32, at most 448 in magnitude -> E4M3 code, nearest even; NaN gives 0x7F."""
    bits = _bits(value)
    magnitude = bits & _U32(0x7FFFFFFF)
    sign = (bits >> _U32(24)) & _U32(0x80)
    normal = _U32((magnitude + _U32(0x7FFFF) + ((magnitude >> _U32(20)) & _U32(1))) >> _U32(20)) - _U32(960)
    steps = _bits(_float(magnitude) + _F32(16384.0)) & _U32(0x7FFFFF)
    code = steps if magnitude < _U32(0x3C800000) else normal
    code = code if code < _U32(0x7E) else _U32(0x7E)
    return _U32((code if value == value else _U32(0x7F)) | sign)


@_FAST
def _bounds(row, near, mantissa):
    """The scales that explain a row, whose codes are those of value / near: from, to, and whether none does."""
    low, high, wrong = 0.0, 1e300, _U32(0)
    least = _U32(113) if mantissa == 10 else _U32(1)
    for j in range(len(row)):
        bits = _bits(row[j]) & _U32(0x7FFFFFFF)
        size = _float(bits)
        code = _encode_e4m3(_F32(size / near))
        wrong |= _U32((code == 0) != (size == 0))
        exponent = bits >> _U32(23)
        exponent = exponent if exponent > least else least
        half = _double(np.uint64(exponent + _U32(895 - mantissa)) << np.uint64(52))
        step = np.float64(_decode_e4m3(code)) if code != 0 else 1.0
        below = (np.float64(size) - half) / step if code != 0 else 0.0
        above = (np.float64(size) + half) / step if code != 0 else 1e300
        low = below if below > low else low
        high = above if above < high else high
    return low, high, wrong != 0 or low > high


@_FAST
def _differs(row, near, scale, mantissa):
    """Whether codes times ``scale`` are not the row, rounded to its dtype."""
    wrong = _U32(0)
    for j in range(len(row)):
        size = _float(_bits(row[j]) & _U32(0x7FFFFFFF))
        again = _F32(_decode_e4m3(_encode_e4m3(_F32(size / near))) * scale)
        if mantissa == 7:
            wrong |= _U32((_U32(_encode_bf16(again)) << _U32(16)) != _bits(size))
        elif mantissa == 10:
            wrong |= _U32(_encode_f16(again) != _encode_f16(size))
        else:
            wrong |= _U32(again != size)
    return wrong != 0


@_FAST
def _explained(values, largest, mantissa):
    """A scale that the block was dequantized with, as far as its values tell; 0 where there is none."""
    for k in range(8):
        candidate = _F32(448.0 - 32.0 * k) if k < 7 else _F32(240.0)
        near = _F32(largest / candidate)
        low, high, wrong = 0.0, 1e300, False
        for i in range(values.shape[0]):
            below, above, none = _bounds(values[i], near, mantissa)
            low, high = max(low, below), min(high, above)
            if none or low > high:
                wrong = True
                break
        if wrong:
            continue
        scale = _F32((low + high) * 0.5)
        for i in range(values.shape[0]):
            if _differs(values[i], near, scale, mantissa):
                wrong = True
                break
        if not wrong:
            return scale
    return _F32(0)


@_FAST
def _encode_row(row, scale, codes):
    for j in range(len(row)):
        near = _F32(row[j] / scale)
        near = _F32(448.0) if near > _F32(448.0) else near
        near = _F32(-448.0) if near < _F32(-448.0) else near
        codes[j] = np.uint8(_encode_e4m3(near))


@numba.njit
def _plain(largest, power_of_two):
    if not largest > 0:
        return _F32(1)
    scale = _F32(largest / _F32(448.0))
    if power_of_two:
        bits = _bits(scale)
        up = _U32(0x800000) if (bits & _U32(0x7FFFFF)) != 0 else _U32(0)
        return _float(_U32((bits & _U32(0x7F800000)) + up))
    return scale


_SIGNATURE = types.void(
    types.Array(types.float32, 2, "C"),
    types.Array(types.uint8, 2, "C"),
    types.Array(types.float32, 1, "C"),
    types.int64,
    types.boolean,
)


def _compiled(function):
    """Compile now, or load what an earlier process compiled; without a place to keep it, compile in every process."""
    try:
        return numba.njit(_SIGNATURE, nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # numba's "no locator available"
        return numba.njit(_SIGNATURE, nogil=True, error_model="numpy")(function)


@_compiled
def quantize_rows(values, codes, scales, mantissa, power_of_two):
    """Up to 128 rows: values [rows, N] -> codes [rows, N], scales [ceil(N / 128)]."""
    columns = values.shape[1]
    for block in range(len(scales)):
        part = values[:, block * BLOCK : min((block + 1) * BLOCK, columns)]
        most, most_finite = _U32(0), _U32(0)  # magnitudes in the order of their bits, NaN above Inf
        for i in range(part.shape[0]):
            for value in part[i]:
                bits = _bits(value) & _U32(0x7FFFFFFF)
                most = bits if bits > most else most
                number = bits if bits <= _U32(0x7F800000) else _U32(0)
                most_finite = number if number > most_finite else most_finite
        largest, whole = _float(most_finite), most < _U32(0x7F800000)
        scale = _F32(0)
        if whole and largest > 0 and not power_of_two:
            scale = _explained(part, largest, mantissa)
        if scale == 0:
            scale = _plain(largest, power_of_two)
        scales[block] = scale
        for i in range(part.shape[0]):
            _encode_row(part[i], scale, codes[i, block * BLOCK : block * BLOCK + part.shape[1]])
