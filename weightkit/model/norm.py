"""Root-mean-square normalization."""

from __future__ import annotations

import torch

LATENT_EPS = 1e-6
"""The published code gives the norms inside attention this epsilon whatever ``rms_norm_eps`` is (1e-5 in Moonlight)."""


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x`` [..., width] over its root mean square, in F32, then times ``weight`` [width] in ``x``'s dtype."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
