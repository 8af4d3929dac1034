"""The blueprint against the published totals, and against names and shapes written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from family_configs import FP8, SMALL, V2_LITE, V3, V3_BF16, V32
from hypothesis import given, settings
from hypothesis import strategies as st

from weightkit.family import Architecture, Expected, Role, blueprint, expert_of, is_mtp, layer_of, totals


def records_of(config: dict[str, Any]) -> dict[str, Expected]:
    return blueprint(Architecture.from_config(config))


def test_published_totals_of_v3() -> None:
    records = records_of(V3).values()
    main = totals(record for record in records if not record.mtp)
    mtp = totals(record for record in records if record.mtp)
    everything = totals(records)
    assert main.elements == {"F8_E4M3": 669_065_609_216, "BF16": 1_960_795_136, "F32": 40_853_080}
    assert (main.tensors, main.size_bytes) == (90_427, 673_150_611_808)
    assert mtp.elements == {"F8_E4M3": 11_505_434_624, "BF16": 1_957_991_424, "F32": 702_520}
    assert (mtp.tensors, mtp.size_bytes) == (1_564, 15_424_227_552)
    assert everything.elements == {"F8_E4M3": 680_571_043_840, "BF16": 3_918_786_560, "F32": 41_555_600}
    assert (everything.tensors, everything.size_bytes) == (91_991, 688_574_839_360)
    assert everything.total_elements == 684_531_386_000
    assert len(records) == 91_991


def test_v3_as_bf16() -> None:
    records = records_of(V3_BF16).values()
    assert totals(record for record in records if not record.mtp).size_bytes == 1_342_052_868_096
    assert totals(records).size_bytes == 1_368_979_721_216


V2 = {
    **V2_LITE,
    "hidden_size": 5120,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
KIMI_K2 = {
    **V3,
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "first_k_dense_replace": 1,
    "num_attention_heads": 64,
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 0,
}
MOONLIGHT = {
    **V3_BF16,
    "hidden_size": 2048,
    "vocab_size": 163840,
    "num_hidden_layers": 27,
    "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
}
GLM_5 = {
    **V3_BF16,
    "model_type": "glm_moe_dsa",
    "hidden_size": 6144,
    "vocab_size": 154880,
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "q_lora_rank": 2048,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "intermediate_size": 12288,
    "n_group": 1,
    "topk_group": 1,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
}


@pytest.mark.parametrize(
    ("config", "published"),
    [
        (V2, 235_741_434_880),
        (V2_LITE, 15_706_484_224),
        (V32, 685_396_921_376),
        (KIMI_K2, 1_026_470_731_056),  # what Kimi-K2-Base reports
        (MOONLIGHT, 15_960_111_936),
        (GLM_5, 753_864_139_008),
        ({**GLM_5, "quantization_config": FP8}, 753_910_024_032),
    ],
    ids=["V2", "V2-Lite", "V3.2-Exp", "Kimi-K2", "Moonlight", "GLM-5", "GLM-5-FP8"],
)
def test_element_counts_that_the_repositories_report(config: dict[str, Any], published: int) -> None:
    assert totals(records_of(config).values()).total_elements == published


def test_kimi_k2_instruct_as_audited_from_its_headers() -> None:
    found = totals(records_of(KIMI_K2).values())
    assert (found.tensors, found.size_bytes) == (139_644, 1_029_173_256_720)


def test_glm_5_dtypes() -> None:
    assert totals(records_of(GLM_5).values()).elements == {"BF16": 753_864_119_552, "F32": 19_456}


def attention_by_hand() -> dict[str, tuple[str, tuple[int, ...], int | None]]:
    return {
        "self_attn.q_a_proj.weight": ("F8_E4M3", (24, 200), None),
        "self_attn.q_a_proj.weight_scale_inv": ("F32", (1, 2), None),
        "self_attn.q_a_layernorm.weight": ("BF16", (24,), None),
        "self_attn.q_b_proj.weight": ("F8_E4M3", (96, 24), 0),
        "self_attn.q_b_proj.weight_scale_inv": ("F32", (1, 1), 0),
        "self_attn.kv_a_proj_with_mqa.weight": ("F8_E4M3", (48, 200), None),
        "self_attn.kv_a_proj_with_mqa.weight_scale_inv": ("F32", (1, 2), None),
        "self_attn.kv_a_layernorm.weight": ("BF16", (40,), None),
        "self_attn.kv_b_proj.weight": ("F8_E4M3", (112, 40), 0),
        "self_attn.kv_b_proj.weight_scale_inv": ("F32", (1, 1), 0),
        "self_attn.o_proj.weight": ("F8_E4M3", (200, 48), 1),
        "self_attn.o_proj.weight_scale_inv": ("F32", (2, 1), 1),
        "input_layernorm.weight": ("BF16", (200,), None),
        "post_attention_layernorm.weight": ("BF16", (200,), None),
    }


def mlp_by_hand(path: str, width: int, split: bool) -> dict[str, tuple[str, tuple[int, ...], int | None]]:
    blocks = -(-width // 128)
    rows, columns = (0, 1) if split else (None, None)
    return {
        f"{path}.gate_proj.weight": ("F8_E4M3", (width, 200), rows),
        f"{path}.gate_proj.weight_scale_inv": ("F32", (blocks, 2), rows),
        f"{path}.up_proj.weight": ("F8_E4M3", (width, 200), rows),
        f"{path}.up_proj.weight_scale_inv": ("F32", (blocks, 2), rows),
        f"{path}.down_proj.weight": ("F8_E4M3", (200, width), columns),
        f"{path}.down_proj.weight_scale_inv": ("F32", (2, blocks), columns),
    }


def small_by_hand() -> dict[str, tuple[str, tuple[int, ...], int | None]]:
    moe: dict[str, tuple[str, tuple[int, ...], int | None]] = {
        "mlp.gate.weight": ("BF16", (6, 200), None),
        "mlp.gate.e_score_correction_bias": ("F32", (6,), None),
    }
    for expert in range(6):
        moe |= mlp_by_hand(f"mlp.experts.{expert}", 130, split=False)
    moe |= mlp_by_hand("mlp.shared_experts", 130, split=True)
    mtp: dict[str, tuple[str, tuple[int, ...], int | None]] = {
        "embed_tokens.weight": ("BF16", (60, 200), 0),
        "enorm.weight": ("BF16", (200,), None),
        "hnorm.weight": ("BF16", (200,), None),
        "eh_proj.weight": ("BF16", (200, 400), None),
        "shared_head.norm.weight": ("BF16", (200,), None),
        "shared_head.head.weight": ("BF16", (60, 200), 0),
    }
    dense = mlp_by_hand("mlp", 300, split=True)
    layers = [dense, dense, moe, moe, {**moe, **mtp}]
    found: dict[str, tuple[str, tuple[int, ...], int | None]] = {
        "model.embed_tokens.weight": ("BF16", (60, 200), 0),
        "model.norm.weight": ("BF16", (200,), None),
        "lm_head.weight": ("BF16", (60, 200), 0),
    }
    for layer, kind in enumerate(layers):
        found |= {f"model.layers.{layer}.{name}": what for name, what in {**attention_by_hand(), **kind}.items()}
    return found


def test_every_tensor_of_a_small_model_by_hand() -> None:
    records = records_of(SMALL)
    assert {name: (r.dtype, r.shape, r.split_dim) for name, r in records.items()} == small_by_hand()
    assert all(name == record.name for name, record in records.items())


def test_pain_17_mtp_index_and_expert_count_come_from_the_config() -> None:
    records = records_of(SMALL)
    assert {record.layer for record in records.values() if record.mtp} == {4}
    assert {record.expert for record in records.values()} == {None, 0, 1, 2, 3, 4, 5}
    two = records_of({**SMALL, "num_nextn_predict_layers": 2})
    assert {record.layer for record in two.values() if record.mtp} == {4, 5}
    none = records_of({**SMALL, "num_nextn_predict_layers": 0})
    assert not any(record.mtp for record in none.values())
    assert none == {name: record for name, record in records.items() if not record.mtp}


def test_weights_and_scales_name_each_other() -> None:
    records = records_of(V3)
    weights = [record for record in records.values() if record.dtype == "F8_E4M3"]
    # 5 in attention, 3 in each of 3 dense layers, 3 in each of 256 + 1 experts of 59 MoE layers.
    expected = 62 * 5 + 3 * 3 + 59 * 257 * 3
    assert len(weights) == sum(record.weight_name is not None for record in records.values()) == expected
    for weight in weights:
        scale = records[weight.scale_name or ""]
        assert scale.weight_name == weight.name
        assert (scale.split_dim, scale.expert, scale.layer, scale.role) == (
            weight.split_dim,
            weight.expert,
            weight.layer,
            weight.role,
        )


def test_order_is_the_models() -> None:
    names = list(records_of(SMALL))
    assert names[0] == "model.embed_tokens.weight"
    layers = [layer_of(name) for name in names[1:]]
    first_mtp = layers.index(4)
    assert layers[:first_mtp] == [*sorted(layer for layer in layers[: first_mtp - 2] if layer is not None), None, None]
    assert set(layers[first_mtp:]) == {4}


@pytest.mark.parametrize(
    ("name", "role", "component"),
    [
        ("model.embed_tokens.weight", Role.EMBEDDING, "embedding"),
        ("lm_head.weight", Role.HEAD, "head"),
        ("model.norm.weight", Role.NORM, "norm"),
        ("model.layers.0.self_attn.q_a_layernorm.weight", Role.ATTENTION, "attention"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", Role.DENSE_MLP, "dense"),
        ("model.layers.2.mlp.gate.weight", Role.ROUTER, "router"),
        ("model.layers.2.mlp.gate.e_score_correction_bias", Role.ROUTER_BIAS, "router"),
        ("model.layers.2.mlp.experts.5.up_proj.weight", Role.ROUTED_EXPERT, "routed"),
        ("model.layers.2.mlp.shared_experts.up_proj.weight", Role.SHARED_EXPERT, "shared"),
        ("model.layers.4.eh_proj.weight", Role.MTP, "mtp"),
        ("model.layers.4.mlp.experts.0.up_proj.weight", Role.ROUTED_EXPERT, "mtp"),
    ],
)
def test_roles_and_components(name: str, role: Role, component: str) -> None:
    record = records_of(SMALL)[name]
    assert (record.role, record.component) == (role, component)


def test_pain_18_the_router_bias_is_f32_and_nothing_else() -> None:
    for config in (V3, V3_BF16, KIMI_K2):
        bias = records_of({**config, "num_hidden_layers": 4})["model.layers.3.mlp.gate.e_score_correction_bias"]
        assert bias.allows("F32")
        assert not bias.allows("BF16")


def test_what_is_not_certain_allows_both_dtypes() -> None:
    norm = records_of({**V32, "num_hidden_layers": 4})["model.layers.0.self_attn.indexer.k_norm.weight"]
    assert norm.allows("BF16")
    assert norm.allows("F32")
    assert not norm.allows("F16")
    frequencies = [record for record in records_of(MOONLIGHT).values() if record.role is Role.ROTARY]
    assert len(frequencies) == 27
    assert all(record.optional for record in frequencies)


def test_v2_lite_has_no_bias_no_query_latent_no_mtp_no_scales() -> None:
    records = records_of(V2_LITE)
    assert "model.layers.26.mlp.gate.weight" in records
    assert records["model.layers.0.self_attn.q_proj.weight"].shape == (16 * 192, 2048)
    assert not any("e_score" in name or "q_a_proj" in name or "scale" in name for name in records)
    assert max(record.layer or 0 for record in records.values()) == 26


def test_tied_embeddings_have_no_head() -> None:
    assert "lm_head.weight" not in records_of({**SMALL, "tie_word_embeddings": True})


def test_modules_to_not_convert_stay_unquantized() -> None:
    kept = ["lm_head", "model.layers.1.self_attn", "model.layers.2.mlp.experts.1.up_proj", "model.layers.2.mlp.exp"]
    records = records_of({**SMALL, "quantization_config": {**FP8, "modules_to_not_convert": kept}})
    assert records["model.layers.1.self_attn.o_proj.weight"].dtype == "BF16"
    assert "model.layers.1.self_attn.o_proj.weight_scale_inv" not in records
    assert records["model.layers.2.mlp.experts.1.up_proj.weight"].scale_name is None
    assert records["model.layers.2.mlp.experts.0.up_proj.weight"].dtype == "F8_E4M3"  # .exp is no whole component


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.61.mlp.gate.weight", 61),
        ("model.layers.610.mlp.gate.weight", 610),
        ("layers.3.attn.wq_a.weight", 3),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
        ("model.layersx.3.weight", None),
        ("model.layers.x.weight", None),
        ("model.layers.²", None),
        ("encoder.layers.3.weight", None),
        ("", None),
    ],
)
def test_layer_of_reads_whole_components(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


def test_is_mtp_goes_by_number_not_by_text() -> None:
    arch = Architecture.from_config(V3)
    assert is_mtp("model.layers.61.mlp.gate.weight", arch)
    assert is_mtp("layers.61.ffn.gate.weight", arch)
    assert not is_mtp("model.layers.6.mlp.experts.161.up_proj.weight", arch)
    assert not is_mtp("model.layers.60.mlp.experts.61.up_proj.weight", arch)
    assert is_mtp("model.layers.4.enorm.weight", Architecture.from_config(SMALL))


def test_expert_of() -> None:
    assert expert_of("model.layers.3.mlp.experts.17.up_proj.weight") == 17
    assert expert_of("layers.3.ffn.experts.17.w1.scale") == 17
    assert expert_of("model.layers.3.mlp.shared_experts.up_proj.weight") is None


@settings(max_examples=30, deadline=None)
@given(
    layers=st.integers(1, 5),
    dense=st.integers(0, 5),
    experts=st.integers(1, 4),
    nextn=st.integers(0, 2),
    shared=st.integers(0, 2),
    frequency=st.integers(1, 3),
)
def test_layers_and_experts_of_any_size(
    layers: int, dense: int, experts: int, nextn: int, shared: int, frequency: int
) -> None:
    config = {
        **SMALL,
        "num_hidden_layers": layers,
        "first_k_dense_replace": min(dense, layers),
        "n_routed_experts": 2 * experts,
        "n_shared_experts": shared,
        "num_nextn_predict_layers": nextn,
        "moe_layer_freq": frequency,
    }
    records = records_of(config)
    moe = sum(layer >= min(dense, layers) and layer % frequency == 0 for layer in range(layers)) + nextn
    assert sum(record.role is Role.ROUTED_EXPERT for record in records.values()) == moe * 2 * experts * 6
    assert sum(record.role is Role.SHARED_EXPERT for record in records.values()) == (moe * 6 if shared else 0)
    assert sum(record.role is Role.DENSE_MLP for record in records.values()) == (layers + nextn - moe) * 6
    assert all(record.mtp == (record.layer is not None and record.layer >= layers) for record in records.values())
    assert all(layer_of(name) == record.layer and expert_of(name) == record.expert for name, record in records.items())
