"""Configs that claim what no model has: refused, in bounded time and memory, with an error of ours."""

from __future__ import annotations

import pytest
from tiny import V3

from weightkit.errors import ConfigError
from weightkit.family import Architecture, expert_of, layer_of


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**12),
        ("num_hidden_layers", 10**5000),
        ("num_nextn_predict_layers", 10**9),
        ("n_routed_experts", 10**10),
        ("hidden_size", 2**40),
        ("rope_theta", 10**400),
        ("rms_norm_eps", -(10**400)),
    ],
    ids=["layers", "layers-long", "mtp", "experts", "hidden", "theta", "eps"],
)
def test_a_claim_beyond_any_model_is_refused_by_name(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=field):
        Architecture.from_config(V3.config() | {field: value})


def test_claims_that_multiply_beyond_any_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="99,968 in each of 9,001 layers"):
        Architecture.from_config(V3.config() | {"num_hidden_layers": 9_000, "n_routed_experts": 99_968})


def test_indexer_types_that_are_no_names() -> None:
    config = V3.config() | {
        "model_type": "glm_moe_dsa",
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": 8,
        "indexer_types": [["full"], {}, 3, "full"],
    }
    with pytest.raises(ConfigError, match="indexer_types"):
        Architecture.from_config(config)


def test_a_number_too_long_for_a_layer_is_none() -> None:
    assert layer_of(f"model.layers.{'9' * 5000}.mlp.gate.weight") is None
    assert expert_of(f"model.layers.3.mlp.experts.{'9' * 5000}.up_proj.weight") is None
    assert layer_of("model.layers.61.mlp.gate.weight") == 61
