"""Root-mean-square normalization."""

from __future__ import annotations

import torch

LATENT_EPS = 1e-6
"""The published code gives the norms inside attention this epsilon whatever ``rms_norm_eps`` is (1e-5 in Moonlight)."""

NORM_ROWS = 16_384
"""Rows a block: the one F32 temporary is 470 MB at a width of 7168, however many tokens there are."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x`` [..., width] over its root mean square, in F32, then times ``weight`` [width] in ``x``'s dtype."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = x.shape[-1]
    for rows, target in zip(x.reshape(-1, width).split(NORM_ROWS), out.view(-1, width).split(NORM_ROWS), strict=True):
        squares = rows.to(torch.float32, copy=True).square_()
        scale = squares.mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        torch.mul(rows, scale, out=target)  # the product is F32, and rounded as it is written
        target.mul_(weight)
    return out
