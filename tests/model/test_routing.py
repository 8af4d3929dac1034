"""Routing on scores written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers_oracle import V2, V3

from weightkit.errors import ConfigError, UnsupportedError
from weightkit.family import Architecture
from weightkit.model import MoE, Rope, TensorWeights

PREFIX = "model.layers.1.mlp"


def route(config: dict[str, Any], logits: list[float], bias: list[float] | None = None) -> dict[int, float]:
    """Expert id to share for one token whose router logits are given."""
    n = len(logits)
    config = {**config, "hidden_size": n, "n_routed_experts": n}
    tensors = {f"{PREFIX}.gate.weight": torch.diag(torch.tensor(logits))}
    if bias is not None:
        tensors[f"{PREFIX}.gate.e_score_correction_bias"] = torch.tensor(bias)
    moe = MoE(Architecture.from_config(config), PREFIX, TensorWeights(tensors))
    ids, shares = moe.route(torch.ones(1, n))
    return dict(zip(ids[0].tolist(), shares[0].tolist(), strict=True))


def test_bias_chooses_but_does_not_weigh() -> None:
    config = {**V3, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "routed_scaling_factor": 1.0}
    shares = route(config, [2.0, 1.0, 0.0, -1.0], bias=[0.0, 0.0, 0.0, 5.0])
    sigmoid = torch.tensor([2.0, -1.0]).sigmoid()
    expected = (sigmoid / sigmoid.sum()).tolist()
    assert shares == pytest.approx({0: expected[0], 3: expected[1]})


def test_group_counts_by_its_two_best() -> None:
    """Group 0 holds the single best expert, group 1 the two best together."""
    config = {**V3, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    assert set(route(config, [9.0, -9.0, 2.0, 2.1], bias=[0.0] * 4)) == {2, 3}


def test_v2_group_counts_by_its_best() -> None:
    config = {**V2, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    assert set(route(config, [9.0, -9.0, 2.0, 2.1])) == {0, 1}


def test_excluded_group_stays_out_when_all_biased_scores_are_negative() -> None:
    config = {**V3, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    assert set(route(config, [1.0, 1.0, 0.0, 0.0], bias=[-5.0] * 4)) == {0, 1}


def test_shares_are_scaled_once() -> None:
    config = {**V3, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 3, "routed_scaling_factor": 2.5}
    assert sum(route(config, [3.0, 2.0, 1.0, 0.0], bias=[0.0] * 4).values()) == pytest.approx(2.5)


def test_softmax_shares_are_not_normalized_in_v2() -> None:
    config = {
        **V2,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 1,
        "routed_scaling_factor": 16.0,
    }
    assert route(config, [1.0, 0.0]) == pytest.approx({0: 16.0 * torch.tensor([1.0, 0.0]).softmax(0)[0].item()})


def test_unknown_rope_scaling_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="longrope"):
        Rope.of(Architecture.from_config({**V3, "rope_scaling": {"type": "longrope", "factor": 2}}))


def test_yarn_without_factor_is_refused() -> None:
    with pytest.raises(ConfigError, match="factor"):
        Rope.of(Architecture.from_config({**V3, "rope_scaling": {"type": "yarn"}}))
