"""Conversions that kernels have in common: bits of E4M3, BF16, F16 and F32, on whatever device, and its interpreter.

HARDWARE: let the device round, and give NaN its pattern: PTX defines that of ``mul.f32`` and of conversions, which
round to nearest even here, as the one pattern that is wanted. Never so under the interpreter, which truncates F32 to
BF16.
"""

# Triton compiles functions that cannot carry annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (on CPU tensors), as ``TRITON_INTERPRET=1`` asks at import."""
    return not isinstance(encode, triton.runtime.JITFunction)


_TWO_POW_120: tl.constexpr = tl.constexpr(2.0**120)
_OVERFLOWS_480: tl.constexpr = tl.constexpr(1.125 * 2.0**119)  # times 448: 1.97 * 2**127; times 480: over 2**128


@triton.jit
def decode_e4m3(code):
    """uint8 codes -> their F32 values, exactly.

    Exponent and mantissa, moved to where F32 has them, give the value times 2**(7 - 127), E4M3 subnormals as F32
    subnormals; the product with 2**120 is exact. Shifting the sign-extended byte puts the sign in place too. The NaN
    codes so become +-480, where 448 is the largest number: 480 alone overflows in the second product, Inf * 0 is NaN,
    and the sum keeps that (finite * 0 has the value's own sign, so zeros keep theirs). A comparison and a selection in
    its place would take three instructions more on the integer units, of which there are fewest.
    """
    bits = (code.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000  # 0x87F00000 as an int32
    value = bits.to(tl.float32, bitcast=True) * _TWO_POW_120
    return (value * _OVERFLOWS_480) * 0.0 + value


@triton.jit
def encode(value, KIND: tl.constexpr, HARDWARE: tl.constexpr):
    """F32 -> the bits of the output dtype, rounded to nearest even, NaN as the one pattern."""
    if KIND == "BF16":
        if HARDWARE:
            bits = value.to(tl.bfloat16).to(tl.int16, bitcast=True)
        else:
            bits = value.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            bits = tl.where(value != value, 0x7FFF, bits).to(tl.int16)
    elif KIND == "F16":
        bits = value.to(tl.float16).to(tl.int16, bitcast=True)
        if not HARDWARE:
            bits = tl.where(value != value, 0x7FFF, bits).to(tl.int16)
    else:
        bits = value.to(tl.int32, bitcast=True)
        if not HARDWARE:
            bits = tl.where(value != value, 0x7FFFFFFF, bits)
    return bits


@triton.jit
def nearest_bf16(value, KIND: tl.constexpr, HARDWARE: tl.constexpr):
    """F32 -> BF16, to nearest even, in the dtype of the activations; F32 where the interpreter multiplies."""
    if HARDWARE:
        nearest = value.to(tl.bfloat16)
        if KIND == "F16":
            nearest = nearest.to(tl.float32).to(tl.float16)
        elif KIND == "F32":
            nearest = nearest.to(tl.float32)
    else:
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        nearest = tl.where(value != value, value, bits.to(tl.float32, bitcast=True))
        if KIND == "F16":
            nearest = nearest.to(tl.float16).to(tl.float32)
    return nearest
