"""Quantizing in blocks in plain torch, block by block: what the kernel and the CPU's loop are held against.

``fp8_quant`` has the rules.
"""

from __future__ import annotations

import torch

from weightkit.kernels.fp8_quant import BLOCK, LEAST_EXPONENT, MANTISSA_BITS, require_matrix

LARGEST = 448.0
"""The largest E4M3."""

CANDIDATES = (448.0, 416.0, 384.0, 352.0, 320.0, 288.0, 256.0, 240.0)
"""Largest codes of a block, up to a power of two: a mantissa each."""


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


def _plain(block: torch.Tensor, power_of_two: bool) -> torch.Tensor:
    largest = torch.nan_to_num(block.float().abs(), nan=0.0, posinf=torch.inf).max()
    scale = largest / LARGEST
    if not scale > 0:
        return torch.ones(())
    if not power_of_two or torch.isinf(scale):
        return scale
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones(()), (exponent - (mantissa == 0.5).int()).clamp(min=-126))


def _explained(block: torch.Tensor) -> torch.Tensor | None:
    """A scale that the block was dequantized with, as far as its values tell; None where there is none."""
    values = block.float()
    magnitude = values.abs().double()
    largest = values.abs().max()
    if not torch.isfinite(largest) or not largest > 0:
        return None
    half_float = block.dtype == torch.float16
    if largest < (2.0**-14 if half_float else 2.0**-108):
        return _least_scale(block, 1, _float_bits(largest * (2.0**-7 if half_float else 512)))
    half, half_below = _half_places(block)
    for candidate in CANDIDATES:
        codes = decode_e4m3(encode_e4m3(values / (largest / candidate)))
        if bool(((codes == 0) != (values == 0)).any()):
            continue
        used = codes != 0
        steps = codes[used].abs().double()
        low, high = ((magnitude - half_below)[used] / steps).max(), ((magnitude + half)[used] / steps).min()
        scale = ((low + high) / 2).float()
        if bool(low > high):
            continue
        if torch.equal((codes * scale).to(block.dtype), block):
            return scale
        near = _least_scale(block, _float_bits(scale) - 1, _float_bits(scale) + 1) if half_float else None
        if near is not None:
            return near
    return None


def _least_scale(block: torch.Tensor, first: int, last: int) -> torch.Tensor | None:
    """The least scale that explains a block of those whose bits are ``first`` to ``last``."""
    values, twice = block.float().abs(), 0.0 if block.dtype == torch.float32 else 2.0**-150
    ends = (values.double() - _half_places(block)[1]) * (1 - 2.0**-23) - twice
    while first <= last:
        scale = torch.tensor(first, dtype=torch.int32).view(torch.float32)
        codes = encode_e4m3((values / scale).clamp(max=LARGEST))
        back = (decode_e4m3(codes) * scale).to(block.dtype).float()
        missed = back != values
        if not bool(missed.any()):
            return scale
        codes = torch.where(back < values, codes, codes - 1)[missed]
        if bool((codes == 0).any()):
            return None
        first = max(first + 1, _float_bits((ends[missed] / decode_e4m3(codes).double()).float().max()) - 1)
    return None


def _half_places(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the last places of values, and of the numbers below them, F64."""
    bits, least = block.float().view(torch.int32), LEAST_EXPONENT[block.dtype]
    exponent = ((bits >> 23) & 0xFF).clamp(min=least)
    half = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent - 128 - MANTISSA_BITS[block.dtype])
    return half, torch.where((bits & 0x7FFFFF == 0) & (exponent > least), half / 2, half)


def _float_bits(value: torch.Tensor) -> int:
    return int(value.view(torch.int32))
