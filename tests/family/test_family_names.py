"""Renames between the published names and the demo's."""

from __future__ import annotations

from typing import Any

import pytest
from family_configs import SMALL, V2_LITE, V32

from weightkit.errors import CheckpointError
from weightkit.family import Architecture, blueprint, rename_expert, to_demo, to_published

PAIRS = [
    ("model.embed_tokens.weight", "embed.weight"),
    ("model.norm.weight", "norm.weight"),
    ("lm_head.weight", "head.weight"),
    ("model.layers.0.input_layernorm.weight", "layers.0.attn_norm.weight"),
    ("model.layers.0.post_attention_layernorm.weight", "layers.0.ffn_norm.weight"),
    ("model.layers.0.self_attn.q_proj.weight", "layers.0.attn.wq.weight"),
    ("model.layers.0.self_attn.q_a_proj.weight_scale_inv", "layers.0.attn.wq_a.scale"),
    ("model.layers.0.self_attn.q_a_layernorm.weight", "layers.0.attn.q_norm.weight"),
    ("model.layers.0.self_attn.q_b_proj.weight", "layers.0.attn.wq_b.weight"),
    ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "layers.0.attn.wkv_a.weight"),
    ("model.layers.0.self_attn.kv_a_layernorm.weight", "layers.0.attn.kv_norm.weight"),
    ("model.layers.0.self_attn.kv_b_proj.weight", "layers.0.attn.wkv_b.weight"),
    ("model.layers.0.self_attn.o_proj.weight", "layers.0.attn.wo.weight"),
    ("model.layers.0.mlp.gate_proj.weight", "layers.0.ffn.w1.weight"),
    ("model.layers.0.mlp.down_proj.weight", "layers.0.ffn.w2.weight"),
    ("model.layers.0.mlp.up_proj.weight", "layers.0.ffn.w3.weight"),
    ("model.layers.3.mlp.gate.weight", "layers.3.ffn.gate.weight"),
    ("model.layers.3.mlp.gate.e_score_correction_bias", "layers.3.ffn.gate.bias"),
    ("model.layers.3.mlp.experts.255.down_proj.weight_scale_inv", "layers.3.ffn.experts.255.w2.scale"),
    ("model.layers.3.mlp.shared_experts.up_proj.weight", "layers.3.ffn.shared_experts.w3.weight"),
    # V3.2: names that are the demo's already must not be renamed on the way back.
    ("model.layers.3.self_attn.indexer.wq_b.weight_scale_inv", "layers.3.attn.indexer.wq_b.scale"),
    ("model.layers.3.self_attn.indexer.k_norm.bias", "layers.3.attn.indexer.k_norm.bias"),
    # A layer's own head is not the model's.
    ("model.layers.61.shared_head.head.weight", "layers.61.shared_head.head.weight"),
    ("model.layers.61.embed_tokens.weight", "layers.61.embed.weight"),
]


@pytest.mark.parametrize(("published", "demo"), PAIRS)
def test_a_name_and_back(published: str, demo: str) -> None:
    assert to_demo(published) == demo
    assert to_published(demo) == published


@pytest.mark.parametrize("config", [V2_LITE, V32, SMALL], ids=["V2-Lite", "V3.2", "small"])
def test_round_trip_over_a_whole_blueprint(config: dict[str, Any]) -> None:
    """V3.2 has every name that V3 has."""
    names = list(blueprint(Architecture.from_config(config)))
    demo = [to_demo(name) for name in names]
    assert len(set(demo)) == len(names)
    assert [to_published(name) for name in demo] == names


def test_pain_21_only_whole_components_are_renamed() -> None:
    # Each holds a renamed word as a part: mlp, gate, norm, embed_tokens, o_proj, scale.
    for name in (
        "model.layers.3.mlp2.thing.weight",
        "model.layers.3.mlp.gate_proj2.weight",
        "model.layers.3.mlp.experts.0.no_proj.weight",
        "model.layers.3.self_attn.my_o_proj.weight_scale",
        "model.layers.3.embed_tokens2.weight",
    ):
        assert to_demo(name).split(".")[-2:] == name.split(".")[-2:]
    assert to_demo("model.layers.3.mlp2.thing.weight") == "layers.3.mlp2.thing.weight"


def test_rename_expert() -> None:
    name = "model.layers.5.mlp.experts.5.up_proj.weight_scale_inv"
    assert rename_expert(name, 3) == "model.layers.5.mlp.experts.3.up_proj.weight_scale_inv"


@pytest.mark.parametrize("name", ["", "model", "model.norm", "lm_head", "layers.0.attn.wo.weight", "transformer.h.0.w"])
def test_unknown_published_names_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="not of this layout"):
        to_demo(name)


@pytest.mark.parametrize("name", ["", "head", "norm", "model.norm.weight", "lm_head.weight", "layersx.0.weight"])
def test_unknown_demo_names_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="not of this layout"):
        to_published(name)
