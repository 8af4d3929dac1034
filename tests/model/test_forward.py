"""The forward pass against transformers' on the same weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers_oracle import GLM5, V2, V2_LITE, V3, V32, YARN, published_tensors, transformers_model

from weightkit.errors import MissingTensorError, UnsupportedError
from weightkit.family import Architecture
from weightkit.model import Model, Rope, TensorWeights, attention

KIMI: dict[str, Any] = {**V3, "n_group": 1, "topk_group": 1, "q_lora_rank": None, "routed_scaling_factor": 2.827}
MEMBERS: dict[str, dict[str, Any]] = {
    "v3": V3,
    "v3-yarn": {
        **V3,
        "rope_scaling": {**YARN, "original_max_position_embeddings": 32},
        "max_position_embeddings": 1280,
    },
    # mscale and mscale_all_dim that differ turn up as a factor on cos and sin
    "v3-mscale": {**V3, "rope_scaling": {**YARN, "mscale": 0.9, "mscale_all_dim": 0.4}},
    "v3-not-normalized": {**V3, "norm_topk_prob": False},
    "one-group": KIMI,
    "v2-lite": {**V2_LITE, "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    "v2": V2,
}


def build(config: dict[str, Any]) -> tuple[torch.nn.Module, dict[str, torch.Tensor], Model]:
    oracle = transformers_model(copy.deepcopy(config))
    tensors = published_tensors(oracle)
    return oracle, tensors, Model(Architecture.from_config(config), TensorWeights(tensors))


def token_ids(batch: int, seq: int) -> torch.Tensor:
    return torch.randint(0, V3["vocab_size"], (batch, seq), generator=torch.Generator().manual_seed(1))


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("member", MEMBERS)
def test_logits_agree_with_transformers(member: str) -> None:
    oracle, _, model = build(MEMBERS[member])
    ids = token_ids(2, 70)
    with torch.inference_mode():
        expected = oracle(ids).logits
        found = model(ids)
    assert found.dtype == torch.float32
    assert difference(found, expected) < 1e-4


@pytest.mark.parametrize("config", [V32, {**V32, "rope_scaling": YARN}, GLM5], ids=["v3.2", "v3.2-yarn", "glm-5"])
def test_sparse_members_agree_where_they_are_dense(config: dict[str, Any]) -> None:
    oracle, _, model = build(config)
    ids = token_ids(2, config["index_topk"])
    with torch.inference_mode():
        assert difference(model(ids), oracle(ids).logits) < 1e-4


def test_more_tokens_than_the_indexer_picks_are_refused() -> None:
    _, _, model = build(V32)
    cache = model.new_cache()
    model(token_ids(1, 30), cache)
    model(token_ids(1, 2), cache)
    with pytest.raises(UnsupportedError, match="at most 32 tokens, found 33"):
        model(token_ids(1, 1), cache)


@pytest.mark.parametrize("scaling", [YARN, None], ids=["yarn", "plain"])
def test_logits_agree_beyond_4096_positions(scaling: dict[str, Any] | None) -> None:
    config = {**V3, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "rope_scaling": scaling}
    config["max_position_embeddings"] = 163840
    oracle, _, model = build(config)
    ids = token_ids(1, 4200)
    with torch.inference_mode():
        expected = oracle.model(ids).last_hidden_state
        hidden = model.hidden_states(ids)
        found, expected = model.logits(hidden[:, 4096:]), oracle.lm_head(expected[:, 4096:])
    assert difference(found, expected) < 1e-4


def test_yarn_matters_for_the_logits() -> None:
    """The comparisons above would be empty if YaRN changed nothing in so small a model."""
    _, tensors, with_yarn = build(MEMBERS["v3-yarn"])
    without = Model(Architecture.from_config({**MEMBERS["v3-yarn"], "rope_scaling": None}), TensorWeights(tensors))
    ids = token_ids(1, 70)
    assert difference(without(ids), with_yarn(ids)) > 1e-2


def test_newer_rope_parameters_mean_the_same() -> None:
    config = dict(MEMBERS["v3-yarn"])
    older = Rope.of(Architecture.from_config(config))
    scaling = config.pop("rope_scaling")
    config["rope_parameters"] = {**scaling, "rope_type": scaling["type"], "rope_theta": config.pop("rope_theta")}
    newer = Rope.of(Architecture.from_config(config))
    assert torch.equal(newer.frequencies, older.frequencies)
    assert (newer.magnitude, newer.softmax_scale) == (older.magnitude, older.softmax_scale)


def test_bf16_is_as_near_to_f32_as_transformers_is() -> None:
    """Near ties of the router flip experts in BF16, so single logits differ wildly; the average must not."""
    config = {**V3, "rope_scaling": YARN}
    oracle, tensors, model = build(config)
    ids = token_ids(4, 70)
    rounded = {k: v if k.endswith("_bias") else v.bfloat16() for k, v in tensors.items()}
    with torch.inference_mode():
        exact = model(ids)
        ours = Model(model.arch, TensorWeights(rounded))(ids)
        theirs = oracle.bfloat16()(ids).logits.float()
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().mean() < 1.3 * (theirs - exact).abs().mean()


@pytest.mark.parametrize("member", ["v3-yarn", "v2"])
def test_prefill_then_decode_equals_one_pass(member: str) -> None:
    _, _, model = build(MEMBERS[member])
    ids = token_ids(2, 24)
    whole = model(ids)
    cache = model.new_cache()
    parts = [model(ids[:, :11], cache), model(ids[:, 11:18], cache)]  # a prompt in two chunks
    parts += [model(ids[:, i : i + 1], cache) for i in range(18, 24)]
    assert difference(torch.cat(parts, dim=1), whole) < 1e-5
    assert cache.length == 24


def test_cache_forgets_what_is_truncated() -> None:
    _, _, model = build(V3)
    ids = token_ids(1, 12)
    cache = model.new_cache()
    model(ids[:, :8], cache)
    expected = model(ids[:, 8:], cache)
    cache.truncate(6)
    model(token_ids(1, 5), cache)
    cache.truncate(6)
    model(ids[:, 6:8], cache)
    assert difference(model(ids[:, 8:], cache), expected) < 1e-5


def test_cache_holds_latents_only() -> None:
    _, _, model = build(V3)
    cache = model.new_cache().layers[0]
    hidden = model.embed(token_ids(2, 5))
    model.layers[0](hidden, model.rope.at(torch.arange(5)), cache)
    assert cache.append(torch.zeros(2, 0, 40)).shape == (2, 5, V3["kv_lora_rank"] + V3["qk_rope_head_dim"])


def test_absorbed_attention_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, model = build(V3)
    ids = token_ids(2, 40)
    whole, cache = model(ids), model.new_cache()
    monkeypatch.setattr(attention, "SCORES_SIZE_BYTES", 4 * 2 * 4 * 40 * 7)  # seven queries a block
    found = torch.cat([model(ids[:, :3], cache), model(ids[:, 3:], cache)], dim=1)
    assert difference(found, whole) < 1e-5


def test_layers_can_be_run_one_by_one() -> None:
    _, _, model = build(V3)
    ids = token_ids(2, 9)
    hidden, rotation = model.embed(ids), model.rope.at(torch.arange(9))
    for layer in model.layers:
        hidden = layer(hidden, rotation)
    assert torch.equal(model.logits(hidden), model(ids))


def test_only_routed_experts_are_asked_for() -> None:
    _, tensors, model = build(V3)
    asked: list[str] = []

    class Recorded(TensorWeights):
        def get(self, name: str) -> torch.Tensor:
            asked.append(name)
            return super().get(name)

    recorded = Model(model.arch, Recorded(tensors))
    recorded(token_ids(1, 1))
    experts = [name for name in asked if ".experts." in name]
    moe_layers = V3["num_hidden_layers"] - V3["first_k_dense_replace"]
    assert len(experts) == moe_layers * V3["num_experts_per_tok"] * 3
    assert len(set(experts)) == len(experts)
    assert not [name for name in asked if name.startswith("model.layers.0.mlp.gate.")]


def test_observer_sees_each_linear_map_and_its_input() -> None:
    _, tensors, model = build(V3)
    inputs: dict[str, torch.Size] = {}
    Model(model.arch, TensorWeights(tensors), lambda name, x: inputs.setdefault(name, x.shape))(token_ids(1, 30))
    quantizable = {n for n in tensors if n.endswith("_proj.weight") or n.endswith("kv_a_proj_with_mqa.weight")}
    assert quantizable - set(inputs) <= {n for n in quantizable if ".experts." in n}  # experts without a token
    assert set(inputs) <= quantizable
    assert all(shape[-1] == tensors[name].shape[1] for name, shape in inputs.items())


def test_tied_embedding_is_the_head() -> None:
    _, tensors, model = build(V3)
    tied = {k: v for k, v in tensors.items() if k != "lm_head.weight"}
    ids = token_ids(1, 5)
    arch = Architecture.from_config({**V3, "tie_word_embeddings": True})
    found = Model(arch, TensorWeights(tied))(ids)
    expected = Model(model.arch, TensorWeights({**tied, "lm_head.weight": tied["model.embed_tokens.weight"]}))(ids)
    assert torch.equal(found, expected)


def test_missing_weight_is_named() -> None:
    _, tensors, model = build(V3)
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    with pytest.raises(MissingTensorError, match=r"model\.layers\.1\.self_attn\.o_proj\.weight"):
        Model(model.arch, TensorWeights(tensors))(token_ids(1, 2))
