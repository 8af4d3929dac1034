"""How far a product may be from the exact one, whatever the order of its sums."""

from __future__ import annotations

import torch

#: Half a unit in the last place, as a fraction of the value.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
#: What an addition in F32 may lose, as a fraction of the magnitudes: twice a rounding, as tensor cores cut sums off.
SUM_ROUNDING = 2.0**-23


def beyond_roundings(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Where a product with sums in F32 is further from the exact one than roundings explain.

    A sum of K products, in any order, is off by at most K times ``SUM_ROUNDING`` of their magnitudes' sum, and the
    result is rounded to its dtype once.

    Args:
        found: [T, N] BF16, F16 or F32, on the CPU as all.
        x: [T, K] BF16 or F16, whose products with ``weight`` are exact in F32.
        weight: [N, K] BF16 or F16.

    Returns:
        [T, N] bool; False where the exact product is not finite, or where a part of its sum might not be: that order
        decides.
    """
    rows, matrix = x.double(), weight.double()
    exact, magnitudes = rows @ matrix.T, rows.abs() @ matrix.abs().T
    limits = torch.finfo(found.dtype)
    bound = (x.shape[1] + 1) * SUM_ROUNDING * magnitudes + ROUNDING[found.dtype] * exact.abs() + limits.smallest_normal
    near = (found.double() - exact).abs() <= bound
    return ~near & (magnitudes < limits.max / 2)
