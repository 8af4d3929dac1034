"""Normalization and rotation keep the bits of their formulas as written, whatever the block or the target."""

from __future__ import annotations

import pytest
import torch
from transformers_oracle import V3, YARN

from weightkit.family import Architecture
from weightkit.model import GatedMLP, Rope, TensorWeights, norm, rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64,), (7, 33), (2, 9, 1536)])
@pytest.mark.parametrize("block", [4, 16_384])
def test_norm_rounds_once_before_the_weight(
    dtype: torch.dtype, shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm, "NORM_ROWS", block)
    x, weight = (3 * random(*shape)).to(dtype), (1 + random(shape[-1])).to(dtype)
    before = x.clone()
    wide = x.float()
    expected = weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(dtype)
    found = rms_norm(x, weight, 1e-5)
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert torch.equal(x, before)


def test_norm_of_a_part_of_the_columns() -> None:
    x = random(2, 5, 40).bfloat16()
    weight = random(32).bfloat16()
    assert torch.equal(rms_norm(x[..., :32], weight, 1e-6), rms_norm(x[..., :32].contiguous(), weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 9, 8), (2, 9, 4, 8)])
def test_rotation_rounds_once_and_may_be_in_place(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    rotation = Rope.of(Architecture.from_config({**V3, "rope_scaling": YARN})).at(torch.arange(5, 14))
    x = random(*shape).to(dtype)
    wide = x.float().view(2, 9, -1, 4, 2)
    cos, sin = rotation.cos[:, None], rotation.sin[:, None]
    first = wide[..., 0] * cos - wide[..., 1] * sin
    second = wide[..., 1] * cos + wide[..., 0] * sin
    expected = torch.cat((first, second), dim=-1).to(dtype).view(shape)
    assert torch.equal(rotation.apply(x), expected)
    holder = torch.zeros(*shape[:-1], 20, dtype=dtype)
    holder[..., 12:] = x
    part = holder[..., 12:]
    rotation.apply(part, out=part)
    assert torch.equal(part, expected)
    assert not holder[..., :12].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_mlp_rounds_after_each_step(dtype: torch.dtype) -> None:
    weights = {
        f"mlp.{name}.weight": random(*shape).to(dtype)
        for name, shape in {"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}.items()
    }
    x = random(3, 5, 16).to(dtype)
    before = x.clone()
    gate, up = (torch.nn.functional.linear(x, weights[f"mlp.{name}.weight"]) for name in ("gate_proj", "up_proj"))
    expected = torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, weights["mlp.down_proj.weight"])
    assert torch.equal(GatedMLP("mlp", TensorWeights(weights))(x), expected)
    assert torch.equal(x, before)
