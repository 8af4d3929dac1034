"""The demo's JSON."""

from __future__ import annotations

from typing import Any

import pytest
from family_configs import SMALL, V2_LITE, V3, V32

from weightkit.family import Architecture, blueprint, demo_arguments, demo_limits, in_demo

# The fields of the demo's ModelArgs, written out by hand: any other key is a TypeError there.
ACCEPTED = {
    "max_batch_size",
    "max_seq_len",
    "dtype",
    "scale_fmt",
    "vocab_size",
    "dim",
    "inter_dim",
    "moe_inter_dim",
    "n_layers",
    "n_dense_layers",
    "n_heads",
    "n_routed_experts",
    "n_shared_experts",
    "n_activated_experts",
    "n_expert_groups",
    "n_limited_groups",
    "score_func",
    "route_scale",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "original_seq_len",
    "rope_theta",
    "rope_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
}
ACCEPTED_V32 = ACCEPTED | {"index_n_heads", "index_head_dim", "index_topk"}


def arch_of(config: dict[str, Any]) -> Architecture:
    return Architecture.from_config(config)


def test_arguments_of_v3() -> None:
    assert demo_arguments(arch_of(V3), dtype="fp8") == {
        "vocab_size": 129280,
        "dim": 7168,
        "inter_dim": 18432,
        "moe_inter_dim": 2048,
        "n_layers": 61,
        "n_dense_layers": 3,
        "n_heads": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "n_activated_experts": 8,
        "n_expert_groups": 8,
        "n_limited_groups": 4,
        "route_scale": 2.5,
        "score_func": "sigmoid",
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "dtype": "fp8",
        "max_seq_len": 16384,
        "original_seq_len": 4096,
        "rope_theta": 10000.0,
        "rope_factor": 40.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
    }
    assert demo_limits(arch_of(V3)) == []


def test_arguments_of_v2_lite() -> None:
    arguments = demo_arguments(arch_of(V2_LITE), dtype="bf16")
    assert (arguments["q_lora_rank"], arguments["mscale"], arguments["score_func"]) == (0, 0.707, "softmax")
    assert (arguments["n_expert_groups"], arguments["n_limited_groups"], arguments["dtype"]) == (1, 1, "bf16")
    assert demo_limits(arch_of(V2_LITE)) == []


@pytest.mark.parametrize("config", [V3, V2_LITE, SMALL, {**V3, "rope_scaling": None}])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_only_names_that_the_demo_accepts(config: dict[str, Any], dtype: Any) -> None:
    assert set(demo_arguments(arch_of(config), dtype=dtype)) <= ACCEPTED


def test_v32_has_a_demo_of_its_own() -> None:
    arguments = demo_arguments(arch_of(V32), dtype="fp8")
    assert set(arguments) <= ACCEPTED_V32
    assert (arguments["index_topk"], arguments["scale_fmt"]) == (2048, "ue8m0")
    assert "scale_fmt" not in demo_arguments(arch_of(V32), dtype="bf16")
    assert any("indexer" in limit for limit in demo_limits(arch_of(V32)))


def test_yarn_is_on_exactly_where_the_model_has_it() -> None:
    for original in (4096, 32768):
        scaling = {**V3["rope_scaling"], "original_max_position_embeddings": original}
        arguments = demo_arguments(arch_of({**V3, "rope_scaling": scaling}), dtype="bf16")
        assert arguments["max_seq_len"] > arguments["original_seq_len"] == original  # the demo's condition for YaRN
    plain = demo_arguments(arch_of({**V3, "rope_scaling": None}), dtype="bf16")
    assert plain["max_seq_len"] <= plain["original_seq_len"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"hidden_size": 2048}, "bias"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"rms_norm_eps": 1e-5}, "epsilon"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"n_shared_experts": 0}, "shared experts"),
        ({"rope_scaling": {**V3["rope_scaling"], "mscale": 0.5}}, "mscale"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "mscale": 0.0, "mscale_all_dim": 0.0}}, "YaRN"),
    ],
)
def test_what_the_demo_cannot_run_is_said(change: dict[str, Any], word: str) -> None:
    limits = demo_limits(arch_of({**V3, **change}))
    assert len(limits) == 1
    assert word in limits[0]


def test_in_demo_leaves_out_mtp_and_stored_frequencies() -> None:
    records = blueprint(arch_of({**V32, "num_hidden_layers": 4, "n_routed_experts": 8, "num_experts_per_tok": 2}))
    left_out = [record for record in records.values() if not in_demo(record)]
    assert left_out
    assert {record.layer for record in left_out} == {4}
    kimi = blueprint(arch_of({**SMALL, "model_type": "kimi_k2", "num_nextn_predict_layers": 0}))
    assert [name for name, record in kimi.items() if not in_demo(record)] == [
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(4)
    ]
