"""The parts of a product whose K was split among programs, added in one order whatever ran when."""

# Triton compiles functions that cannot carry annotations; everything else in this file does.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl

from weightkit.kernels.conversions import encode, interpreted
from weightkit.kernels.gemm_plan import BITS_DTYPE, KINDS


@triton.jit
def _sum_kernel(
    parts, out, numbers,
    KIND: tl.constexpr, HARDWARE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts [SPLITS, numbers] F32 -> out [numbers]: in this order, whatever ran when."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < numbers
    total = tl.load(parts + place, mask=inside, other=0.0)
    for _ in tl.static_range(1, SPLITS):
        parts += numbers
        total += tl.load(parts + place, mask=inside, other=0.0)
    tl.store(out + place, encode(total, KIND, HARDWARE), mask=inside)


def sum_parts(parts: torch.Tensor, out: torch.Tensor) -> None:
    """parts F32 [splits, ...] -> out [...], BF16, F16 or F32: added in their order, on the current stream."""
    numbers, block = out.numel(), 128 if out.numel() < 1 << 18 else 1024
    _sum_kernel[(triton.cdiv(numbers, block),)](
        parts, out.view(BITS_DTYPE[out.dtype]), numbers,
        KIND=KINDS[out.dtype], HARDWARE=not interpreted() and torch.version.hip is None,
        SPLITS=len(parts), BLOCK=block, num_warps=4,
    )  # fmt: skip
