"""Reading and refusing ``config.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from family_configs import FP8, SMALL, V2_LITE, V3, V3_BF16, V32, YARN

from weightkit.errors import ConfigError, UnsupportedError
from weightkit.examine.loaders import CLASSES, config_problems
from weightkit.examine.rope import rope_notes
from weightkit.family import Architecture, blueprint


def test_published_v3_config() -> None:
    arch = Architecture.from_config(V3)
    assert (arch.member, arch.hidden_size, arch.q_lora_rank) == ("DeepSeek-V3 family", 7168, 1536)
    assert arch.is_fp8
    assert arch.block_size == (128, 128)
    assert arch.quantization is not None
    assert arch.quantization.scale_fmt is None
    assert arch.rope_scaling == YARN
    assert arch.rope_theta == 10000.0
    assert arch.total_layers == 62
    assert [arch.is_moe_layer(layer) for layer in (0, 2, 3, 60, 61)] == [False, False, True, True, True]


def test_absent_fields_take_the_members_own_defaults() -> None:
    config = {key: value for key, value in V2_LITE.items() if key not in ("num_nextn_predict_layers", "topk_method")}
    arch = Architecture.from_config({**config, "n_group": None, "topk_group": None})
    assert (arch.num_nextn_predict_layers, arch.topk_method, arch.n_group, arch.topk_group) == (0, "greedy", 1, 1)
    assert arch.q_lora_rank is None
    assert not arch.has_router_bias
    assert arch.block_size is None


def test_scale_fmt_of_v31() -> None:
    arch = Architecture.from_config({**V3, "quantization_config": {**FP8, "scale_fmt": "ue8m0"}})
    assert arch.quantization is not None
    assert arch.quantization.scale_fmt == "ue8m0"


@pytest.mark.parametrize(
    ("parameters", "theta", "scaled"),
    [
        ({"rope_theta": 1000000, "rope_type": "default"}, 1000000.0, False),
        ({**YARN, "rope_theta": 50000.0, "rope_type": "yarn"}, 50000.0, True),
    ],
)
def test_rope_parameters_of_newer_configs(parameters: dict[str, Any], theta: float, scaled: bool) -> None:
    config = {key: value for key, value in V3.items() if key not in ("rope_theta", "rope_scaling")}
    arch = Architecture.from_config({**config, "rope_parameters": parameters})
    assert arch.rope_theta == theta
    assert (arch.rope_scaling is not None) is scaled


def test_dtype_of_unquantized_weights() -> None:
    assert Architecture.from_config({**V3, "torch_dtype": "float16"}).dtype == "F16"
    newer = {key: value for key, value in V3.items() if key != "torch_dtype"}
    assert Architecture.from_config({**newer, "dtype": "float32"}).dtype == "F32"
    assert Architecture.from_config(newer).dtype == "BF16"


def test_all_problems_are_reported_together() -> None:
    config = {**V3, "kv_lora_rank": 0, "hidden_size": "wide", "norm_topk_prob": 1}
    del config["vocab_size"]
    with pytest.raises(ConfigError) as caught:
        Architecture.from_config(config, where="some/config.json")
    text = str(caught.value)
    assert text.startswith("some/config.json: 4 problems")
    assert "kv_lora_rank: expected at least 1, found 0" in text
    assert "hidden_size: expected an integer, found 'wide'" in text
    assert "vocab_size: missing" in text
    assert "norm_topk_prob: expected true or false, found 1" in text


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "n_routed_experts", "q_lora_rank", "rope_theta"])
def test_config_booleans_are_not_numbers(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: expected an? .*, found True"):
        Architecture.from_config({**V3, key: True})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 257}, "257 experts for a token, of 256"),
        ({"n_group": 7, "topk_group": 4}, "256 routed experts do not divide into 7 groups"),
        ({"topk_group": 9}, "9 groups for a token, of 8"),
        ({"first_k_dense_replace": 62}, "62 dense layers of 61"),
        ({"qk_rope_head_dim": 63}, "rotation takes pairs"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor: expected a positive finite number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: expected a positive finite number"),
        ({"scoring_func": "relu"}, "scoring_func: expected one of softmax, sigmoid, found 'relu'"),
        ({"torch_dtype": "int8"}, "torch_dtype: expected one of bfloat16"),
        ({"quantization_config": {**FP8, "weight_block_size": [64, 64]}}, "weight_block_size: expected"),
        ({"quantization_config": {**FP8, "weight_block_size": None}}, "weight_block_size: expected"),
        ({"quantization_config": {**FP8, "fmt": "e5m2"}}, "fmt: expected 'e4m3'"),
        ({"quantization_config": {**FP8, "scale_fmt": "e8m0"}}, "scale_fmt: expected 'ue8m0'"),
        ({"quantization_config": {**FP8, "ignored_layers": "lm_head"}}, "ignored_layers: expected a list of names"),
        (
            {"quantization_config": {**FP8, "ignored_layers": ["a"], "modules_to_not_convert": ["b"]}},
            "modules_to_not_convert and ignored_layers differ",
        ),
        ({"rope_scaling": {**YARN, "type": 3}}, r"rope_scaling\.type: expected a string, found 3"),
        ({"rope_scaling": {**YARN, "mscale": "1"}}, "mscale: expected a number, found '1'"),
        ({"rope_scaling": {**YARN, "mscale_all_dim": float("nan")}}, "mscale_all_dim: expected a positive"),
        ({"rope_scaling": {**YARN, "beta_fast": -1}}, "beta_fast: expected a positive"),
        ({"rope_scaling": {**YARN, "attention_factor": 0}}, "attention_factor: expected a positive"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta: YaRN divides by its logarithm"),
        ({"quantization_config": {"bits": 4}}, "quant_method: expected a string"),
        ({"quantization_config": "fp8"}, "quantization_config: expected an object"),
        ({"attention_bias": True}, "attention_bias is true"),
    ],
)
def test_impossible_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Architecture.from_config({**V3, **change})


def test_the_kind_and_theta_of_rope_in_either_dictionary() -> None:
    plain = {key: value for key, value in V3.items() if key not in ("rope_scaling", "rope_theta")}
    for field in ("rope_scaling", "rope_parameters"):
        arch = Architecture.from_config({**plain, field: {**YARN, "rope_type": None, "rope_theta": 50000}})
        assert (arch.rope_theta, arch.rope_scaling is None) == (50000.0, False)
    arch = Architecture.from_config({**V3, "rope_parameters": {"rope_type": "default", "rope_theta": None}})
    assert (arch.rope_theta, arch.rope_scaling) == (10000.0, None)


def test_exceptions_under_either_name() -> None:
    for given in ({"ignored_layers": ["a.b"]}, {"ignored_layers": ["a.b"], "modules_to_not_convert": ["a.b"]}):
        quantization = Architecture.from_config({**V3, "quantization_config": {**FP8, **given}}).quantization
        assert quantization is not None
        assert quantization.modules_to_not_convert == ("a.b",)
    quantization = Architecture.from_config({**V3, "quantization_config": {**FP8, "scale_fmt": "float"}}).quantization
    assert quantization is not None  # as transformers writes what the published config leaves out
    assert quantization.scale_fmt is None


@pytest.mark.parametrize("config", [V3, V3_BF16, V2_LITE, V32, SMALL], ids=["v3", "bf16", "v2-lite", "v3.2", "small"])
def test_verify_has_nothing_against_published_configs(config: dict[str, Any]) -> None:
    arch = Architecture.from_config(config)
    named = {**config, "architectures": list(CLASSES[arch.model_type])}
    assert list(config_problems(named, arch, Path("config.json"))) == []
    assert list(rope_notes(named)) == []


def test_pain_12_a_distilled_model_is_named() -> None:
    for model_type, kind in (("qwen2", "Qwen2ForCausalLM"), ("llama", "LlamaForCausalLM")):
        with pytest.raises(UnsupportedError, match="distilled") as caught:
            Architecture.from_config({"model_type": model_type, "architectures": [kind], "hidden_size": 5120})
        text = str(caught.value)
        assert f"model_type '{model_type}', architectures ['{kind}']" in text
        assert "not the MoE" in text
        assert "deepseek_v3 (V3" in text


def test_v4_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedError, match=r"layers\.N\.attn\.wq_a") as caught:
        Architecture.from_config({"model_type": "deepseek_v4", "architectures": ["DeepseekV4ForCausalLM"]})
    assert "F8_E8M0" in str(caught.value)
    assert "FP4" in str(caught.value)


@pytest.mark.parametrize("model_type", [None, 3, "kimi_k25", "glm4_moe", "deepseek_v33"])
def test_anything_else_is_refused_by_name(model_type: object) -> None:
    with pytest.raises(UnsupportedError) as caught:
        Architecture.from_config({**V3, "model_type": model_type})
    assert f"model_type {model_type!r}" in str(caught.value)


def test_other_quantization_is_recognised_but_has_no_blueprint() -> None:
    arch = Architecture.from_config({**V3, "quantization_config": {"quant_method": "awq", "bits": 4}})
    assert arch.quantization is not None
    assert (arch.quantization.method, arch.quantization.raw["bits"]) == ("awq", 4)
    assert not arch.is_fp8
    assert arch.block_size is None
    with pytest.raises(UnsupportedError, match="found awq"):
        blueprint(arch)


def test_an_indexer_needs_its_fields_and_a_query_latent() -> None:
    with pytest.raises(ConfigError, match="index_topk: missing"):
        Architecture.from_config({key: value for key, value in V32.items() if key != "index_topk"})
    with pytest.raises(ConfigError, match="wq_b reads the query's latent"):
        Architecture.from_config({**V32, "q_lora_rank": None})


def test_shared_indexers_of_glm() -> None:
    glm = {**SMALL, "model_type": "glm_moe_dsa", "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
    arch = Architecture.from_config({**glm, "indexer_types": ["full", "shared", "shared", "full"]})
    assert arch.indexer_layers == {0, 3, 4}
    with pytest.raises(ConfigError, match="indexer_types: expected 4 of 'full' or 'shared'"):
        Architecture.from_config({**glm, "indexer_types": ["full"]})


def test_an_architecture_is_hashable() -> None:
    assert len({Architecture.from_config(V3), Architecture.from_config(dict(V3)), Architecture.from_config(SMALL)}) == 2
