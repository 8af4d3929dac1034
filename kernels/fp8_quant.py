"""Float weights to FP8 with block scales: the way back from ``fp8_dequant``.

A block of 128 x 128 values has one F32 scale, a value the E4M3 code nearest to value / scale (nearest even, at most
448). The scale is chosen so:

1. Values that were dequantized from FP8 get their codes back, and a scale that dequantizes to the same values. Each
   value w = round(code * scale) says in which interval its scale was, [(|w| - h) / |code|, (|w| + h) / |code|] with h
   half the last place of w; the scales that explain the whole block are the intersection. The codes follow from any
   scale near it, and its largest code, up to a power of two, is one of eight: those are tried, 448 first, which a
   quantizer gives.
2. Others get the largest magnitude / 448, ``power_of_two`` rounded up to one that is no subnormal (``scale_fmt:
   ue8m0``, V3.1 on). A block of zeros, or of values so small that this is 0, has the scale 1.

NaN becomes the code 0x7F. Inf has no code: callers refuse it.
"""

# Triton compiles functions that cannot carry annotations; everything else in this file does.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl

from weightkit.errors import PlanError

BLOCK = 128
LARGEST = 448.0
"""The largest E4M3."""

CANDIDATES = (448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0)
"""Largest codes of a block, up to a power of two: a mantissa each."""

_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
_LEAST_EXPONENT = {torch.bfloat16: 1, torch.float16: 113, torch.float32: 1}
"""Of a normal number, biased as in F32."""


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
def _quantize_kernel(
    values, codes, scales, rows, columns,
    MANTISSA: tl.constexpr, LEAST: tl.constexpr, POWER_OF_TWO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block: its scale, as the module says, and its codes."""
    across = (columns + BLOCK - 1) // BLOCK
    number = tl.program_id(0)
    row = (number // across) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = (number % across) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    place = row.to(tl.int64) * columns + column
    value = tl.load(values + place, mask=inside, other=0.0).to(tl.float32)
    size = tl.abs(value)
    finite = size < float("inf")
    largest = tl.max(tl.max(tl.where(value == value, size, 0.0), axis=0), axis=0)
    whole = tl.max(tl.max(tl.where(finite, 0, 1), axis=0), axis=0) == 0

    scale = tl.div_rn(largest, tl.full((), 448.0, tl.float32))
    scale = tl.where(scale > 0.0, scale, 1.0)
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        up = tl.where((bits & 0x7FFFFF) != 0, 0x800000, 0)
        scale = ((bits & 0x7F800000) + up).to(tl.float32, bitcast=True)
    else:
        exponent = (size.to(tl.int32, bitcast=True) >> 23) & 0xFF
        exponent = tl.maximum(exponent, LEAST)  # below it the dtype counts in equal steps
        half = ((exponent + (1023 - 127 - 1 - MANTISSA)).to(tl.int64) << 52).to(tl.float64, bitcast=True)
        searching = whole & (largest > 0.0)
        for k in range(8):
            if searching:
                candidate = tl.where(k < 7, 448.0 - 32.0 * k, 240.0)
                code = _encode(tl.div_rn(value, tl.div_rn(largest, candidate))) & 0x7F
                step = _magnitude_of(code)
                exact = tl.where(code == 0, 1.0, step).to(tl.float64)
                wide = size.to(tl.float64)
                low = tl.where(code == 0, 0.0, (wide - half) / exact)
                high = tl.where(code == 0, 1e300, (wide + half) / exact)
                lowest, highest = tl.max(tl.max(low, axis=0), axis=0), tl.min(tl.min(high, axis=0), axis=0)
                explained = ((lowest + highest) * 0.5).to(tl.float32)
                wrong = ((code == 0) != (size == 0.0)) | (_rounded(step * explained, MANTISSA) != size)
                bad = tl.max(tl.max(wrong.to(tl.int32), axis=0), axis=0)
                good = (bad == 0) & (lowest <= highest)
                scale = tl.where(good, explained, scale)
                searching = good == 0
    limited = tl.minimum(tl.maximum(tl.div_rn(value, scale), -448.0), 448.0)
    limited = tl.where(value == value, limited, value)
    tl.store(codes + place, _encode(limited).to(tl.uint8), mask=inside)
    tl.store(scales + number, scale)


# --- reference --------------------------------------------------------------------------------------------------------


def encode_e4m3(values: torch.Tensor) -> torch.Tensor:
    """F32 of any shape, at most 448 in magnitude -> E4M3 codes, U8, rounded to nearest even; NaN gives 0x7F."""
    bits = values.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    steps = (values.abs() + 16384.0).view(torch.int32) & 0x7FFFFF  # in steps of 2**-9, rounded by the addition
    code = torch.where(magnitude < (121 << 23), steps, normal).clamp(max=0x7E)
    code = torch.where(values != values, torch.full_like(code, 0x7F), code)
    return (code | ((bits >> 24) & 0x80)).to(torch.uint8)


def decode_e4m3(codes: torch.Tensor) -> torch.Tensor:
    """U8 -> F32, exactly."""
    return codes.view(torch.float8_e4m3fn).float()


def quantize(
    values: torch.Tensor, *, power_of_two: bool = False, out: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix on a GPU; on a CPU use ``fp8_quant_cpu``, which gives the same bits.

    Args:
        values: BF16, F16 or F32 [M, N], contiguous.
        power_of_two: scales are powers of two.
        out: where to put codes and scales.

    Returns: codes U8 [M, N] and scales F32 [ceil(M / 128), ceil(N / 128)].

    Raises:
        PlanError: another dtype or number of dimensions.
    """
    require_matrix(values)
    rows, columns = values.shape
    blocks = (triton.cdiv(rows, BLOCK), triton.cdiv(columns, BLOCK))
    codes, scales = out or (
        torch.empty(rows, columns, dtype=torch.uint8, device=values.device),
        torch.empty(blocks, dtype=torch.float32, device=values.device),
    )
    _quantize_kernel[(blocks[0] * blocks[1],)](
        values.contiguous(), codes, scales, rows, columns,
        MANTISSA=_MANTISSA_BITS[values.dtype], LEAST=_LEAST_EXPONENT[values.dtype],
        POWER_OF_TWO=power_of_two, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return codes, scales


def quantize_reference(values: torch.Tensor, *, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, N] BF16, F16 or F32 -> codes U8 [M, N] and scales F32 [ceil(M / 128), ceil(N / 128)], block by block.

    Raises:
        PlanError: another dtype or number of dimensions.
    """
    require_matrix(values)
    rows, columns = values.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scales = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            block = values[place].cpu()
            scale = _explained(block) if not power_of_two else None
            scales[i, j] = _plain(block, power_of_two) if scale is None else scale
            codes[place] = encode_e4m3((block.float() / scales[i, j]).clamp(-LARGEST, LARGEST))
    return codes, scales


def require_matrix(values: torch.Tensor) -> None:
    """Raise ``PlanError`` for what cannot be quantized."""
    if values.dim() != 2 or values.dtype not in _MANTISSA_BITS:
        raise PlanError(
            "values that cannot be quantized in blocks",
            expected="a matrix of BF16, F16 or F32",
            found=f"{values.dtype} {list(values.shape)}",
        )


def _plain(block: torch.Tensor, power_of_two: bool) -> torch.Tensor:
    largest = torch.nan_to_num(block.float().abs(), nan=0.0).max()
    scale = largest / LARGEST
    if not scale > 0:
        return torch.ones(())
    return torch.exp2(torch.ceil(torch.log2(scale)).clamp(min=-126)) if power_of_two else scale


def _explained(block: torch.Tensor) -> torch.Tensor | None:
    """A scale that the block was dequantized with, as far as its values tell; None where there is none."""
    values = block.float()
    magnitude = values.abs().double()
    largest = values.abs().max()
    if not torch.isfinite(largest) or not largest > 0:
        return None
    exponent = ((values.view(torch.int32) >> 23) & 0xFF).clamp(min=_LEAST_EXPONENT[block.dtype])
    half = torch.ldexp(torch.ones_like(magnitude), exponent - 128 - _MANTISSA_BITS[block.dtype])
    for candidate in CANDIDATES:
        codes = decode_e4m3(encode_e4m3(values / (largest / candidate)))
        if bool(((codes == 0) != (values == 0)).any()):
            continue
        used = codes != 0
        steps = codes[used].abs().double()
        low, high = ((magnitude - half)[used] / steps).max(), ((magnitude + half)[used] / steps).min()
        scale = ((low + high) / 2).float()
        if bool(low <= high) and torch.equal((codes * scale).to(block.dtype), block):
            return scale
    return None
