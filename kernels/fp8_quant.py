"""Float weights to FP8 with block scales: the way back from ``fp8_dequant``.

A block of 128 x 128 values has one F32 scale, a value the E4M3 code nearest to value / scale (nearest even, at most
448). The scale is chosen so:

1. Values that were dequantized from FP8 get their codes back, and a scale that dequantizes to the same values. Each
   value w = round(code * scale) says in which interval its scale was, [(|w| - h) / |code|, (|w| + h) / |code|] with h
   half the last place of w (below a power of two, half of that); the scales that explain the whole block are the
   intersection, of which its middle is taken. The codes follow from any scale near it, and its largest code, up to a
   power of two, is one of eight: those are tried, 448 first, which a quantizer gives. (A block with few codes may get
   others, that give the same values.)

   That holds where values are normal numbers, or all but normal: from 2**-108 on for BF16 and F32, whose scale is then
   at least 2**-117, and codes times it at least 2**-126; from 2**-14 on for F16, whose small values may leave one point
   that no F32 is, and then one of the scales beside it explains the block. In smaller blocks a value may come from
   several codes, and a scale shifted by a power of two may be none: those have the least scale that explains them.
2. Others get the largest magnitude / 448, ``power_of_two`` rounded up to one that is no subnormal (``scale_fmt:
   ue8m0``, V3.1 on). A block of zeros, or of values so small that this is 0, has the scale 1.

NaN becomes the code 0x7F, with its sign, and its block's scale is one by 2. Inf has no code: the scale of its block is
Inf, which callers refuse, and its codes mean nothing.
"""

# Triton compiles functions that cannot carry annotations; everything else in this file does.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl

from weightkit.errors import PlanError
from weightkit.kernels.gemm_plan import on_device

BLOCK = 128
MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
LEAST_EXPONENT = {torch.bfloat16: 1, torch.float16: 113, torch.float32: 1}
"""Of a normal number, biased as in F32."""

_OPTIONS = {"VECTOR": 8, "PROBE": 32, "SAMPLE": 2}
"""Of the kernel: codes a thread stores at once; values of the first row that candidates are tried with, and rows that a
scale comes of."""

_LAUNCH = {True: {"num_warps": 4, "maxnreg": 168}, False: {"num_warps": 8, "maxnreg": 128}}
"""With FP8 in hardware, and without. A block's pairs stay in registers, of which three blocks of four warps get 168 a
thread: they come from FP8 at 4.1 TB/s on an H200, where blocks that are read again, or threads with 144 registers that
spill, reach 3.3, and eight warps a block, which share what is done once a block among more, 3.3 too."""


# --- kernel -----------------------------------------------------------------------------------------------------------


@triton.jit
def _encode(value):
    """F32, at most 448 in magnitude -> E4M3 codes as int32, nearest even; NaN gives 0x7F."""
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960
    steps = (tl.abs(value) + 16384.0).to(tl.int32, bitcast=True) & 0x7FFFFF
    code = tl.minimum(tl.where(magnitude < 0x3C800000, steps, normal), 0x7E)
    code = tl.where(value != value, 0x7F, code)
    return code | ((bits >> 24) & 0x80)


@triton.jit
def _magnitude_of(code):
    """E4M3 codes without their sign, F32, exactly."""
    return ((code & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120


@triton.jit
def _rounded(value, MANTISSA: tl.constexpr):
    """F32, not negative, rounded to nearest even in the dtype with so many bits of mantissa."""
    if MANTISSA == 23:
        result = value
    elif MANTISSA == 7:
        bits = value.to(tl.int32, bitcast=True)
        result = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        result = value.to(tl.float16).to(tl.float32)
    return result


@triton.jit
def _code_of(value, FP8: tl.constexpr):
    """F32, at most 448 in magnitude but for rounding, never NaN -> E4M3 codes as int32.

    Widened at once: of a code that is split off a pair of 16 bits and put beside the rest of that pair again, ptxas
    12.8 made an instruction that takes the pair before it is there (``PACK_AB_MERGE_C`` with itself as C).
    """
    if FP8:
        result = tl.inline_asm_elementwise(
            "{ .reg .b16 pair; cvt.rn.satfinite.e4m3x2.f32 pair, 0f00000000, $1; cvt.u32.u16 $0, pair; }",
            "=r,f", [value], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        result = _encode(value)
    return result


@triton.jit
def _either(left, right):
    return left | right


@triton.jit
def _halves(pairs):
    """int32 of two BF16 each -> the first and the second, F32."""
    return (pairs << 16).to(tl.float32, bitcast=True), (pairs & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _pairs(first, second, FP8: tl.constexpr):
    """F32, finite -> int32 of two BF16 each, rounded to nearest even."""
    if FP8:
        result = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [first, second], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        low = _rounded(first, 7).to(tl.int32, bitcast=True)
        result = ((low >> 16) & 0xFFFF) | _rounded(second, 7).to(tl.int32, bitcast=True)
    return result


@triton.jit
def _codes(first, second, FP8: tl.constexpr):
    """F32, at most 448 in magnitude but for rounding, never NaN -> int16 of two E4M3 codes each, nearest even."""
    if FP8:
        result = tl.inline_asm_elementwise(
            "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;", "=h,f,f", [first, second], dtype=tl.int16, is_pure=True, pack=1
        )
    else:
        result = (_encode(first) | (_encode(second) << 8)).to(tl.int16)
    return result


@triton.jit
def _decoded(codes, FP8: tl.constexpr):
    """int16 of two E4M3 codes each -> the values of the first and the second, F32, exactly."""
    if FP8:
        both = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.e4m3x2 $0, $1;", "=r,h", [codes], dtype=tl.int32, is_pure=True, pack=1
        )
        first = both.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        second = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        wide = codes.to(tl.int32)
        first = _magnitude_of(wide) * tl.where((wide & 0x80) == 0, 1.0, -1.0)
        second = _magnitude_of(wide >> 8) * tl.where((wide & 0x8000) == 0, 1.0, -1.0)
    return first, second


@triton.jit
def _larger_pair(left, right):
    """int32 of two BF16 each -> of the larger magnitudes, with any sign; NaN is larger."""
    return tl.inline_asm_elementwise(
        "max.NaN.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [left, right], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _largest_bits(pairs, FP8: tl.constexpr):
    """int32 of two BF16 each -> the largest magnitude's bits in F32, or more than those of Inf where one is NaN."""
    if FP8:
        both = tl.reduce(pairs, None, _larger_pair) & 0x7FFF7FFF
    else:
        both = tl.max(pairs & 0x7FFF0000, axis=None) | tl.max(pairs & 0x7FFF, axis=None)
    return tl.maximum(both & 0x7FFF0000, both << 16)


@triton.jit
def _largest_number(start, inside_rows, inside_columns, columns, BLOCK: tl.constexpr, PART: tl.constexpr):
    """The largest magnitude of a block, F32, NaN left out. The block is read again, a few rows at a time."""
    row = tl.arange(0, PART)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    largest = tl.full((PART, BLOCK), 0.0, tl.float32)
    for first in range(0, BLOCK, PART):
        mask = (first + row < inside_rows) & (column < inside_columns)
        value = tl.load(start + (first + row) * columns + column, mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.where(value == value, tl.abs(value), 0.0))
    return tl.max(largest, axis=None)


@triton.jit
def _equal(left, right, FP8: tl.constexpr):
    """Whether all of two int32 tensors are."""
    if FP8:
        result = tl.reduce(left ^ right, None, _either) == 0
    else:
        result = tl.max(tl.where(left != right, 1, 0), axis=None) == 0
    return result


@triton.jit
def _quotient(value, scale, inverse, FP8: tl.constexpr):
    """value / scale, correctly rounded, given 1 / scale."""
    if FP8:
        # The product with the rounded reciprocal, put right by its remainder (Markstein). The remainder has the sign
        # that leaves -0 as it is.
        result = value * inverse
        result = tl.fma(tl.fma(result, scale, value * -1.0), -inverse, result)
    else:
        result = tl.div_rn(value, scale)
    return result


@triton.jit
def _candidate(k):
    return tl.where(k < 7, 448.0 - 32.0 * k, 240.0)


@triton.jit
def _hopeless(sample, largest, FP8: tl.constexpr):
    """Values of a block, [1, n] F32 -> a bit for each candidate by which a quotient is too far from every code."""
    k = tl.arange(0, 8)[:, None]
    quotient = sample * (_candidate(k) * (1.0 / largest))
    step = _magnitude_of(_code_of(quotient, FP8))
    far = tl.abs(tl.abs(quotient) - step) > step * 0.015625
    return tl.reduce(tl.where(far, 1 << k, 0), None, _either)


@triton.jit
def _bound(distance, code_size):
    """An end of an interval, times the size of its code -> the end as F32 bits, but for the lowest three, which hold
    the code's significand. All positive."""
    end = (distance * (1.0 / code_size)).to(tl.int32, bitcast=True)
    return (end & -8) | ((code_size.to(tl.int32, bitcast=True) >> 20) & 7)


@triton.jit
def _fraction(bound):
    """What ``_bound`` gives -> the end as numerator and denominator, F32, exactly."""
    below = 8.0 + (bound & 7).to(tl.float32)
    above = ((bound & -8).to(tl.float32, bitcast=True) * below).to(tl.int32, bitcast=True)
    return ((above + 0x1000) & -0x2000).to(tl.float32, bitcast=True), below


@triton.jit
def _narrower(low, high, seen, other_low, other_high, other_seen):
    return tl.maximum(low, other_low), tl.minimum(high, other_high), seen | other_seen


@triton.jit
def _sampled(sample, inverse, FP8: tl.constexpr):
    """BF16 values of a block as F32, [n], and a candidate / the largest -> whether the block's scale is one that
    explains these if it has one, whether there is one, and the middle of those."""
    size = tl.abs(sample)
    code = _code_of(size * inverse, FP8)
    used = code != 0
    step = tl.where(used, _magnitude_of(code), 1.0)
    bits = size.to(tl.int32, bitcast=True)
    last = (bits & 0x7F800000).to(tl.float32, bitcast=True) * 0.00390625  # half of its place
    last_below = tl.where((bits & 0x7FFFFF) == 0, last * 0.5, last)
    low = tl.where(used, _bound(size - last_below, step), 0)
    high = tl.where(used, _bound(size + last, step), 0x7F000000)
    low, high, seen = tl.reduce((low, high, tl.where(code >= 8, 1 << (code & 7), 0)), 0, _narrower)
    low_above, low_below = _fraction(low)
    high_above, high_below = _fraction(high)
    left = low_above * high_below
    right = high_above * low_below
    return seen == 0xFF, left <= right, tl.div_rn(left + right, low_below * high_below * 2.0)


@triton.jit
def _half(size, MANTISSA: tl.constexpr, LEAST: tl.constexpr, BELOW: tl.constexpr):
    """Half the last place of F32 values, not negative, in the dtype, F64; or of the numbers ``BELOW`` them."""
    bits = size.to(tl.int32, bitcast=True)
    exponent = tl.maximum(bits >> 23, LEAST)  # below it the dtype counts in equal steps
    half = ((exponent + (1023 - 127 - 1 - MANTISSA)).to(tl.int64) << 52).to(tl.float64, bitcast=True)
    if BELOW:
        half = tl.where(((bits & 0x7FFFFF) == 0) & (exponent > LEAST), half * 0.5, half)
    return half


@triton.jit
def _interval(value, step_size, MANTISSA: tl.constexpr, LEAST: tl.constexpr):
    """F32 values, their largest divided by a candidate -> codes as int32, and the scales that explain each, F64."""
    size = tl.abs(value)
    code = _encode(tl.div_rn(value, step_size)) & 0x7F
    step = tl.where(code == 0, 1.0, _magnitude_of(code)).to(tl.float64)
    wide = size.to(tl.float64)
    low = tl.where(code == 0, tl.where(size > 0.0, 1e301, 0.0), (wide - _half(size, MANTISSA, LEAST, True)) / step)
    high = tl.where(code == 0, 1e300, (wide + _half(size, MANTISSA, LEAST, False)) / step)
    return code, low, high


@triton.jit
def _least(
    start, inside_rows, inside_columns, columns, first, last,
    MANTISSA: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The least scale that explains a block of those from ``first`` to ``last``, F32 bits; more where none does.

    A value that a scale does not give back says from where on one can: where the code below, or the same one if what it
    gives is too small, begins to. That is a lower bound, and no more than some places of F32 below.
    """
    row = tl.arange(0, PART)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    place = 0
    good = 0  # rows, one after another and around, that this scale gives back
    while (good < BLOCK) & (first <= last):
        mask = (place + row < inside_rows) & (column < inside_columns)
        size = tl.abs(tl.load(start + (place + row) * columns + column, mask=mask, other=0.0).to(tl.float32))
        scale = first.to(tl.float32, bitcast=True)
        code = _encode(tl.minimum(tl.div_rn(size, scale), 448.0))
        back = _rounded(_magnitude_of(code) * scale, MANTISSA)
        code = tl.where(back < size, code, code - 1)
        step = tl.where(code > 0, _magnitude_of(code), 1.0).to(tl.float64)
        below = (size.to(tl.float64) - _half(size, MANTISSA, LEAST, True)) * (1.0 - 2.0**-23)
        if MANTISSA != 23:  # products are rounded to F32 first
            below -= 2.0**-150
        end = (below / step).to(tl.float32).to(tl.int32, bitcast=True)
        end = tl.where(code > 0, tl.maximum(end, first + 2) - 1, 0x7F800000)
        end = tl.where(back == size, 0, end)
        following = tl.max(tl.max(end, axis=0), axis=0)
        holds = following == 0
        first = tl.where(holds, first, following)
        good = tl.where(holds, good + PART, 0)
        place = tl.where(holds, (place + PART) % BLOCK, place)
    return first


@triton.jit
def _explained_slowly(
    start, inside_rows, inside_columns, columns, step_size,
    MANTISSA: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Whether a candidate explains a whole block, and the scale. The block is read again, a few rows at a time."""
    row = tl.arange(0, PART)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    lowest = tl.full((PART, BLOCK), 0.0, tl.float64)
    highest = tl.full((PART, BLOCK), 1e300, tl.float64)
    for first in range(0, BLOCK, PART):
        mask = (first + row < inside_rows) & (column < inside_columns)
        value = tl.load(start + (first + row) * columns + column, mask=mask, other=0.0).to(tl.float32)
        _, low, high = _interval(value, step_size, MANTISSA, LEAST)
        lowest = tl.maximum(lowest, low)
        highest = tl.minimum(highest, high)
    low = tl.max(tl.max(lowest, axis=0), axis=0)
    high = tl.min(tl.min(highest, axis=0), axis=0)
    explained = ((low + high) * 0.5).to(tl.float32)
    wrong = tl.full((PART, BLOCK), 0, tl.int32)
    for first in range(0, BLOCK, PART):
        mask = (first + row < inside_rows) & (column < inside_columns)
        value = tl.load(start + (first + row) * columns + column, mask=mask, other=0.0).to(tl.float32)
        code = _encode(tl.div_rn(value, step_size)) & 0x7F
        back = _rounded(_magnitude_of(code) * explained, MANTISSA)
        wrong = tl.where(back != tl.abs(value), 1, wrong)
    good = (tl.max(tl.max(wrong, axis=0), axis=0) == 0) & (low <= high)
    if MANTISSA == 10:  # noqa: SIM102
        if (low <= high) & (good == 0):
            bits = explained.to(tl.int32, bitcast=True)
            found = _least(
                start, inside_rows, inside_columns, columns, bits - 1, bits + 1, MANTISSA, LEAST, BLOCK, PART
            )
            good = found <= bits + 1
            explained = found.to(tl.float32, bitcast=True)
    return good, explained


@triton.jit
def _quantize_kernel(
    values, codes, scales, rows, columns,
    MANTISSA: tl.constexpr, LEAST: tl.constexpr, POWER_OF_TWO: tl.constexpr, PAIRS: tl.constexpr, FP8: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, PROBE: tl.constexpr, SAMPLE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One block: its scale, as the module says, and its codes.

    Memory moves 3 bytes a value, in which time a GPU has some 15 instructions for it. So BF16 goes in pairs
    (``PAIRS``: columns are even), and its scale comes of ``SAMPLE`` rows and the largest value: all values are only
    asked whether it gives them back, and the codes that this takes are the block's. That is exact:

    - An interval's relative place and width depend on the 4 bits of a code's significand and the 8 of the value's,
      which is the code times the scale, rounded. Where one scale gives all values back, codes of equal significands so
      have one interval, and a sample with all eight has the block's. One without (few codes in use, say) is not
      relied on.
    - An interval's end is an odd number of 9 bits by one of 4: two that differ do so by 2**-13, and F32 tells them
      apart. Which one it is comes of the quotient in F32 and the significand, and the middle of two is then one
      division: it is no closer than 2**-33 to where F32 rounds, unless it is exact, so that rounding in F64 first
      changes nothing.
    - A value's quotient by largest / candidate lies within 2**-7 of its code where any scale explains both, while half
      a step of E4M3 is 2**-5. So candidates by which a quotient is further away than 2**-6 are out at once, the
      quotient needs no exact division, and a value may be 2**-7 too large, as the first of a pair makes the second.
    - A scale that gives a value back, w = round(code * scale), has w / scale within 2**-8 of the code: rounded to F32
      and to E4M3, that is the code itself, also where it is 448 or 1 to 7 steps of 2**-9. Zero keeps its sign: the
      comparison is of all 16 bits. So the codes by which a scale held are those that it gives.

    Exponents are kept where BF16 and all intermediate results are normal. Elsewhere, and for other dtypes, the block is
    searched as defined, and so are the candidates after one that the sample promised in vain.
    """
    across = (columns + BLOCK - 1) // BLOCK
    number = tl.program_id(0)
    row0 = (number // across) * BLOCK
    column0 = (number % across) * BLOCK
    place = row0.to(tl.int64) * columns + column0
    start = values + place
    target = codes + place
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside_rows = rows - row0
    inside_columns = columns - column0
    inside = (row < inside_rows) & (column < inside_columns)
    if PAIRS:
        pair_columns = columns // 2
        pair_column = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK // 2), VECTOR // 2), VECTOR // 2)[None, :]
        pair_offset = row * pair_columns + pair_column
        pair_inside = (row < inside_rows) & (pair_column < inside_columns // 2)
        pair_place = row0.to(tl.int64) * pair_columns + column0 // 2
        pair_start = values.to(tl.pointer_type(tl.int32), bitcast=True) + pair_place
        pair_target = codes.to(tl.pointer_type(tl.int16), bitcast=True) + pair_place
        pairs = tl.load(pair_start + pair_offset, mask=pair_inside, other=0)
        probe_column = tl.arange(0, PROBE)[None, :]
        probe = tl.load(start + probe_column, mask=probe_column < inside_columns, other=0.0)
        sample_row = tl.arange(0, SAMPLE * BLOCK) // BLOCK
        sample_column = tl.arange(0, SAMPLE * BLOCK) % BLOCK
        sample_mask = (sample_row < inside_rows) & (sample_column < inside_columns)
        sample = tl.load(start + sample_row * columns + sample_column, mask=sample_mask, other=0.0)
        top = _largest_bits(pairs, FP8)
    else:
        value = tl.load(start + row * columns + column, mask=inside, other=0.0).to(tl.float32)
        top = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=None)
    largest = top.to(tl.float32, bitcast=True)
    whole = top < 0x7F800000
    if top > 0x7F800000:
        largest = _largest_number(start, inside_rows, inside_columns, columns, BLOCK, PART)
    normal = whole & (largest > 2.0**-40) & (largest < 2.0**100) & PAIRS
    settled = largest < 0.0  # False: codes are to be made yet

    scale = tl.div_rn(largest, tl.full((), 448.0, tl.float32))
    scale = tl.where(scale > 0.0, scale, 1.0)
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        up = tl.where((bits & 0x7FFFFF) != 0, 0x800000, 0)
        scale = ((bits & 0x7F800000) + up).to(tl.float32, bitcast=True)
    elif whole & (largest > 0.0):
        k = 0  # the first candidate that is neither out nor the scale
        if PAIRS:  # noqa: SIM102 - names of pairs are known only then
            if normal:
                out = _hopeless(probe.to(tl.float32), largest, FP8)  # a bit a candidate
                promising = largest < 0.0
                inverse = largest
                middle = largest
                if out == 0xFF:
                    k = 8
                else:
                    looking = True
                    while looking:
                        if ((out >> k) & 1) == 0:
                            inverse = 1.0 / tl.div_rn(largest, _candidate(k))
                            relied, promising, middle = _sampled(sample.to(tl.float32), inverse, FP8)
                            promising = promising & relied
                            looking = relied & (promising == 0)
                        if looking:
                            k += 1
                            looking = k < 8
                if promising:
                    first, _ = _halves(pairs)
                    second = pairs.to(tl.float32, bitcast=True)  # with the first in its last bits
                    each = _codes(first * inverse, second * inverse, FP8)
                    first, second = _decoded(each, FP8)
                    settled = _equal(_pairs(first * middle, second * middle, FP8), pairs, FP8)
                    k += 1
                    if settled:
                        scale = middle
                        tl.store(pair_target + pair_offset, each, mask=pair_inside, cache_modifier=".cs")
                        k = 8
        if largest < (2.0**-14 if MANTISSA == 10 else 2.0**-108):
            last = (largest * (2.0**-7 if MANTISSA == 10 else 512.0)).to(tl.int32, bitcast=True)
            one = tl.full((), 1, tl.int32)
            found = _least(start, inside_rows, inside_columns, columns, one, last, MANTISSA, LEAST, BLOCK, PART)
            if found <= last:
                scale = found.to(tl.float32, bitcast=True)
            k = 8
        while k < 8:
            step_size = tl.div_rn(largest, _candidate(k))
            good, explained = _explained_slowly(
                start, inside_rows, inside_columns, columns, step_size, MANTISSA, LEAST, BLOCK, PART
            )
            k += 1
            if good:
                scale = explained
                k = 8
    if PAIRS:  # noqa: SIM102
        if normal & (settled == 0):
            inverse = tl.div_rn(tl.full((), 1.0, tl.float32), scale)
            first, second = _halves(pairs)
            first = _quotient(first, scale, inverse, FP8)
            second = _quotient(second, scale, inverse, FP8)
            tl.store(pair_target + pair_offset, _codes(first, second, FP8), mask=pair_inside, cache_modifier=".cs")
    if normal == 0:
        part_row = tl.arange(0, PART)[:, None]
        for first_row in range(0, BLOCK, PART):
            mask = (first_row + part_row < inside_rows) & (column < inside_columns)
            again = (first_row + part_row) * columns + column
            narrow = tl.load(start + again, mask=mask, other=0.0)
            part = narrow.to(tl.float32)
            limited = tl.minimum(tl.maximum(tl.div_rn(part, scale), -448.0), 448.0)
            code = _encode(tl.where(part == part, limited, part))
            if MANTISSA == 10:  # a GPU widens NaN of F16 to the one pattern, without a sign
                code |= (narrow.to(tl.int16, bitcast=True).to(tl.int32) >> 8) & 0x80
            tl.store(target + again, code.to(tl.uint8), mask=mask)
    tl.store(scales + number, scale)


# --- launch -----------------------------------------------------------------------------------------------------------


def quantize(
    values: torch.Tensor, *, power_of_two: bool = False, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix on a GPU; on a CPU use ``fp8_quant_cpu``, which gives the same bits.

    Args:
        values: BF16, F16 or F32 [M, N], contiguous.
        power_of_two: scales are powers of two.
        out: where to put codes and scales, contiguous, on the same device.

    Returns: codes U8 [M, N] and scales F32 [ceil(M / 128), ceil(N / 128)], on the current stream of their device.

    Raises:
        PlanError: another dtype or number of dimensions; values that are not contiguous.
    """
    require_matrix(values)
    if not values.is_contiguous():
        raise PlanError("values to quantize must be contiguous", fix="Call .contiguous() first.")
    rows, columns = values.shape
    blocks = (triton.cdiv(rows, BLOCK), triton.cdiv(columns, BLOCK))
    codes, scales = out or (
        torch.empty(rows, columns, dtype=torch.uint8, device=values.device),
        torch.empty(blocks, dtype=torch.float32, device=values.device),
    )
    fp8 = _device_has_fp8(values.device)
    with on_device(values):
        _quantize_kernel[(blocks[0] * blocks[1],)](
            values, codes, scales, rows, columns,
            MANTISSA=MANTISSA_BITS[values.dtype], LEAST=LEAST_EXPONENT[values.dtype],
            POWER_OF_TWO=power_of_two, PAIRS=_in_pairs(values, codes), FP8=fp8, BLOCK=BLOCK,
            PART=4 if values.is_cuda else BLOCK, **_OPTIONS, **_LAUNCH[fp8],
        )  # fmt: skip
    return codes, scales


def _in_pairs(values: torch.Tensor, codes: torch.Tensor) -> bool:
    """Whether two values, and two codes, can be read and written at once."""
    even = values.shape[1] % 2 == 0 and values.data_ptr() % 4 == 0 and codes.data_ptr() % 2 == 0
    return even and values.dtype == torch.bfloat16


def _device_has_fp8(device: torch.device) -> bool:
    """Whether the device converts E4M3 itself, which is never asked of the interpreter."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def require_matrix(values: torch.Tensor) -> None:
    """Raise ``PlanError`` for what cannot be quantized."""
    if values.dim() != 2 or values.dtype not in MANTISSA_BITS:
        raise PlanError(
            "values that cannot be quantized in blocks",
            expected="a matrix of BF16, F16 or F32",
            found=f"{values.dtype} {list(values.shape)}",
        )
