"""Rotary position embedding, plain and with YaRN, as the published ``modeling_deepseek.py`` computes it.

YaRN (Peng et al., 2023, arXiv:2309.00071) lets fast-turning pairs of dimensions keep their frequency, divides that of
slow-turning pairs by ``factor``, and blends linearly between. DeepSeek scales the softmax on top (``softmax_scale``).
All of it is computed in F32 in the published order of operations: at position 100,000 one more rounding of a frequency
turns a pair by a hundredth of a radian.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from weightkit.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from weightkit.family import Architecture


@dataclass(frozen=True)
class Rotation:
    """The rotation of each position and pair of dimensions: ``cos`` and ``sin``, both [seq, rope/2] F32."""

    cos: torch.Tensor
    sin: torch.Tensor

    def apply(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rotate ``x`` [batch, seq, ..., rope], whose pairs are neighbours (x0, x1), (x2, x3), ...

        The result, in ``x``'s dtype, holds the pairs' first halves and then their second. The published code re-orders
        so too, and as queries and keys agree, their products do not notice. Computed in F32, rounded once.

        Args:
            x: what to rotate.
            out: where to put the result, of ``x``'s shape and dtype; it may be ``x`` itself. None for a new tensor.
        """
        middle = (1,) * (x.dim() - 3)
        cos, sin = (t.view(t.shape[0], *middle, t.shape[1]) for t in (self.cos, self.sin))
        even, odd = x[..., 0::2], x[..., 1::2]
        first = (even * cos).sub_(odd * sin)  # F32, as cos and sin are
        second = (odd * cos).add_(even * sin)
        if out is None:
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        half = x.shape[-1] // 2
        out[..., :half], out[..., half:] = first, second
        return out


@dataclass(frozen=True)
class Rope:
    """The frequencies of a model's rotary dimensions.

    Attributes:
        frequencies: [rope/2] F32, radians a position.
        magnitude: factor on cos and sin (``mscale`` over ``mscale_all_dim``; 1 for all published members).
        softmax_scale: factor on the products of queries and keys.
    """

    frequencies: torch.Tensor
    magnitude: float
    softmax_scale: float

    @classmethod
    def of(cls, arch: Architecture) -> Rope:
        """The rotary embedding that a config asks for, in ``rope_scaling`` or the newer ``rope_parameters``.

        Raises:
            UnsupportedError: a kind of scaling other than YaRN.
            ConfigError: YaRN without its ``factor``.
        """
        scaling: dict[str, Any] = dict(arch.rope_scaling or {})
        base, dim = arch.rope_theta, arch.qk_rope_head_dim
        softmax_scale = (arch.qk_nope_head_dim + dim) ** -0.5
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind == "default":
            return cls(_frequencies(base, dim), 1.0, softmax_scale)
        if kind != "yarn":
            raise UnsupportedError(
                "this kind of rope scaling", where="rope_scaling", expected="yarn or none", found=kind
            )
        scaling.setdefault("original_max_position_embeddings", arch.max_position_embeddings)
        if scaling.get("factor") is None:
            raise ConfigError("YaRN needs a factor", where="rope_scaling.factor", expected="a number", found="nothing")
        factor, all_dim = float(scaling["factor"]), float(scaling.get("mscale_all_dim") or 0.0)
        magnitude = scaling.get("attention_factor")
        if magnitude is None:
            own = scaling.get("mscale")
            magnitude = _mscale(factor, 1.0 if own is None else float(own)) / _mscale(factor, all_dim)
        return cls(
            _yarn_frequencies(base, dim, scaling), float(magnitude), softmax_scale * _mscale(factor, all_dim) ** 2
        )

    def at(self, positions: torch.Tensor) -> Rotation:
        """The rotations at ``positions`` [seq] (integers), on their device."""
        angles = positions.float()[:, None] * self.frequencies.to(positions.device)
        return Rotation(angles.cos() * self.magnitude, angles.sin() * self.magnitude)


def _frequencies(base: float, dim: int) -> torch.Tensor:
    """base^(-2i/dim), [dim/2] F32."""
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def _yarn_frequencies(base: float, dim: int, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Frequencies blended between kept (fast pairs) and divided by ``factor`` (slow pairs), [dim/2] F32."""
    kept = _frequencies(base, dim)
    divided = 1.0 / (float(scaling["factor"]) * base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    length = float(scaling["original_max_position_embeddings"])

    def pair_that_turns(times: float) -> float:
        # the (fractional) dimension whose pair makes so many full turns over the original context
        return dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(base))

    low = pair_that_turns(float(scaling.get("beta_fast") or 32))
    high = pair_that_turns(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the published guard against dividing by zero
    keep = 1.0 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return divided * (1.0 - keep) + kept * keep


def _mscale(factor: float, weight: float) -> float:
    """YaRN's temperature: 0.1 * weight * ln(factor) + 1, and 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
