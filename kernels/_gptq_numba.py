"""The compiled part of ``gptq_format_cpu``: imports numba, so it is imported when first needed.

As in ``_fp8_numba``: no branches in the loops over codes, so that LLVM makes vector instructions of them, no fast math,
and no dependence on how a CPU converts or propagates NaN.

Words lie across codes of one output: a cache line of ``qweight`` holds 16 outputs. So words are transposed first, for
16 outputs at once, each is spread to a byte a code, and then one loop runs along the inputs that share a group.
"""

# numba compiles functions that cannot carry annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import numba
import numpy as np
from numba import types

from weightkit.kernels._fp8_numba import BF16, F16, _encode_bf16, _encode_f16, _encode_f32

#: Outputs worked on at once: words of a cache line.
COLUMNS = 16

_F32 = np.float32
_U64 = np.uint64

_SIGNATURES = [
    types.void(
        types.Array(types.uint32, 2, "C", readonly=True),
        types.Array(types.float32, 2, "C", readonly=True),
        types.Array(types.float32, 2, "C", readonly=True),
        types.Array(types.uint32, 1, "C", readonly=True),
        types.Array(types.int64, 2, "C", readonly=True),
        types.Array(bits, 2, "C"),
        types.int64,
        types.int64,
    )
    for bits in (types.uint16, types.uint32)
]


def _compiled(function):
    """Compile now, or load what an earlier process compiled; without a place to keep it, compile in every process."""
    try:
        return numba.njit(_SIGNATURES, nogil=True, cache=True)(function)
    except RuntimeError:  # numba's "no locator available": neither this folder nor the user's cache is writable
        return numba.njit(_SIGNATURES, nogil=True)(function)


@numba.njit
def _spread(words, codes):
    """uint32 words of eight codes -> uint64 of a byte each."""
    for i in range(len(words)):
        word = _U64(words[i])
        word = (word | word << _U64(16)) & _U64(0x0000FFFF0000FFFF)
        word = (word | word << _U64(8)) & _U64(0x00FF00FF00FF00FF)
        codes[i] = (word | word << _U64(4)) & _U64(0x0F0F0F0F0F0F0F0F)


@_compiled
def dequant_columns(qweight, scales, zeros, g_idx, runs, out, bits, kind):
    """qweight [W, N]; scales, zeros [N, groups]; out [N, K].

    runs [R, 3]: first input, end and group of inputs that share one; none where ``g_idx`` [K] is to be looked up for
    every input.
    """
    words, outputs = qweight.shape
    held = np.empty((COLUMNS, words), np.uint32)
    spread = np.empty(words, np.uint64)
    each_factor, each_zero = np.empty(len(g_idx), np.float32), np.empty(len(g_idx), np.float32)
    for first in range(0, outputs, COLUMNS):
        count = min(COLUMNS, outputs - first)
        for row in range(words):
            for column in range(count):
                held[column, row] = qweight[row, first + column]
        for column in range(count):
            if bits == 4:
                _spread(held[column], spread)
                codes = spread.view(np.uint8)
            else:
                codes = held[column].view(np.uint8)
            target, factor, zero = out[first + column], scales[first + column], zeros[first + column]
            for run in range(len(runs)):
                start, end, group = runs[run]
                source, part, f, z = codes[start:end], target[start:end], factor[group], zero[group]
                if kind == BF16:
                    for i in range(len(part)):
                        part[i] = _encode_bf16((_F32(source[i]) - z) * f)
                elif kind == F16:
                    for i in range(len(part)):
                        part[i] = _encode_f16((_F32(source[i]) - z) * f)
                else:
                    for i in range(len(part)):
                        part[i] = _encode_f32((_F32(source[i]) - z) * f)
            if len(runs) == 0:
                for i in range(len(target)):
                    each_factor[i] = factor[g_idx[i]]
                    each_zero[i] = zero[g_idx[i]]
                if kind == BF16:
                    for i in range(len(target)):
                        target[i] = _encode_bf16((_F32(codes[i]) - each_zero[i]) * each_factor[i])
                elif kind == F16:
                    for i in range(len(target)):
                        target[i] = _encode_f16((_F32(codes[i]) - each_zero[i]) * each_factor[i])
                else:
                    for i in range(len(target)):
                        target[i] = _encode_f32((_F32(codes[i]) - each_zero[i]) * each_factor[i])
