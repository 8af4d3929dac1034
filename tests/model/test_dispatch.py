"""Routing in blocks, which tokens go to which expert, and the sum over experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers_oracle import V2, V2_LITE, V3

from weightkit.family import Architecture
from weightkit.model import Dispatch, Layer, MoE, Parallel, Rope, TensorWeights, attention, mlp, model

LAYER = "model.layers.1"
PREFIX = f"{LAYER}.mlp"
Tensors = dict[str, torch.Tensor]


def moe_tensors(config: dict[str, Any], seed: int = 0) -> Tensors:
    """Random F32 weights of one MoE, their shapes written out."""
    hidden, width, experts = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
    shapes = {f"{PREFIX}.gate.weight": (experts, hidden)}
    modules = {f"experts.{number}": width for number in range(experts)}
    modules["shared_experts"] = width * config["n_shared_experts"]
    for module, inner in modules.items():
        for projection in ("gate_proj", "up_proj"):
            shapes[f"{PREFIX}.{module}.{projection}.weight"] = (inner, hidden)
        shapes[f"{PREFIX}.{module}.down_proj.weight"] = (hidden, inner)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(s, generator=generator) * s[-1] ** -0.5 * 1.5 for name, s in shapes.items()}
    if config["topk_method"] == "noaux_tc":
        tensors[f"{PREFIX}.gate.e_score_correction_bias"] = 0.2 * torch.randn(experts, generator=generator)
    return tensors


def build(config: dict[str, Any], dtype: torch.dtype = torch.float32, device: str = "cpu") -> MoE:
    tensors = {k: v.to(device, torch.float32 if "gate." in k else dtype) for k, v in moe_tensors(config).items()}
    return MoE(Architecture.from_config(config), PREFIX, TensorWeights(tensors))


def tokens(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, V3["hidden_size"], generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("count", [0, 1, 7, 100])
def test_dispatch_is_brute_force(count: int) -> None:
    """Experts 3 and 10 have no token, expert 5 has all."""
    generator = torch.Generator().manual_seed(3)
    allowed = torch.tensor([0, 1, 2, 4, 6, 7, 8, 9, 11])
    drawn = [allowed[torch.randperm(9, generator=generator)[:2]].tolist() for _ in range(count)]
    ids = torch.tensor([[a, 5, b] for a, b in drawn], dtype=torch.int64).reshape(count, 3)
    dispatch = Dispatch.of(ids, 12)
    assert len(dispatch.counts) == 12
    for expert in range(12):
        pairs = [(t, slot) for t in range(count) for slot in range(3) if ids[t, slot] == expert]
        assert dispatch.counts[expert] == len(pairs)
        assert dispatch.rows(expert).tolist() == [t for t, _ in pairs]
        assert dispatch.places(expert).tolist() == [3 * t + slot for t, slot in pairs]
    assert dispatch.used == [expert for expert in range(12) if dispatch.counts[expert]]
    assert dispatch.rows(5).tolist() == list(range(count))


@pytest.mark.parametrize("config", [V3, V2, V2_LITE], ids=["v3", "v2", "v2-lite"])
def test_experts_are_the_sum_over_each_tokens_choice(config: dict[str, Any]) -> None:
    moe, x = build(config), tokens(50)
    ids, shares = moe.route(x)
    w = {name.removeprefix(f"{PREFIX}.experts."): tensor.double() for name, tensor in moe_tensors(config).items()}
    expected = torch.zeros(50, config["hidden_size"], dtype=torch.float64)
    for token, row in enumerate(x.double()):
        for expert, share in zip(ids[token].tolist(), shares[token].tolist(), strict=True):
            gate, up = (w[f"{expert}.{projection}.weight"] @ row for projection in ("gate_proj", "up_proj"))
            expected[token] += share * (w[f"{expert}.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up))
    found = moe.experts(x, ids, shares)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(moe.experts(x, ids, shares, moe.dispatch(ids)), found)


class NoShare(Parallel):
    """The part of a rank beyond the experts' number."""

    alone = False

    def share_of(self, count: int) -> range:
        return range(count, count)


def test_a_rank_without_experts_adds_zeros() -> None:
    moe, x = build(V3), tokens(5)
    ids, shares = moe.route(x)
    moe.parallel = NoShare()
    assert torch.equal(moe.experts(x, ids, shares), torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_added_in_f32_in_ascending_order_of_experts(dtype: torch.dtype) -> None:
    moe, x = build(V3, dtype), tokens(60, dtype)
    ids, shares = moe.route(x)
    expected = torch.zeros(60, V3["hidden_size"])
    for number in range(V3["n_routed_experts"]):
        token, slot = (ids == number).nonzero(as_tuple=True)
        output = moe.expert(number)(x[token]).float() * shares[token, slot, None]
        for i, t in enumerate(token.tolist()):
            expected[t] = expected[t] + output[i]
    assert torch.equal(moe.experts(x, ids, shares), expected.to(dtype))


def test_order_within_a_token_changes_no_bit() -> None:
    moe, x = build(V3), tokens(60)
    ids, shares = moe.route(x)
    turned = torch.tensor([2, 0, 3, 1])
    assert torch.equal(moe.experts(x, ids[:, turned], shares[:, turned]), moe.experts(x, ids, shares))


@pytest.mark.parametrize("config", [V3, V2, V2_LITE], ids=["v3", "v2", "v2-lite"])
@pytest.mark.parametrize("block", [8, 40, 64])
def test_routing_in_blocks_gives_equal_bits(
    config: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe, x = build(config), tokens(200, torch.bfloat16)
    ids, shares = moe.route(x)
    monkeypatch.setattr(mlp, "ROUTE_TOKENS", block)
    found_ids, found_shares = moe.route(x)
    assert torch.equal(found_ids, ids)
    assert torch.equal(found_shares, shares)


def test_experts_never_wait_for_a_result_on_the_host() -> None:
    """Each of these operators is a wait on a GPU; the starts of the experts are the only thing that is fetched."""
    moe, x = build(V3), tokens(60)
    ids, shares = moe.route(x)
    waits = {"nonzero", "_local_scalar_dense", "bincount", "masked_select", "unique"}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    called: list[str] = []
    with Watch():
        moe.experts(x, ids, shares)
    assert "index_add_" in called
    assert not waits & set(called)


def build_layer(dtype: torch.dtype = torch.float32) -> tuple[Layer, Rope, Tensors]:
    heads, hidden = V3["num_attention_heads"], V3["hidden_size"]
    shapes = {
        "self_attn.q_a_proj": (24, hidden),
        "self_attn.q_b_proj": (heads * 24, 24),
        "self_attn.kv_a_proj_with_mqa": (40, hidden),
        "self_attn.kv_b_proj": (heads * 28, 32),
        "self_attn.o_proj": (hidden, heads * 12),
    }
    generator = torch.Generator().manual_seed(4)
    tensors = moe_tensors(V3)
    for module, shape in shapes.items():
        tensors[f"{LAYER}.{module}.weight"] = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
    norms = {"self_attn.q_a_layernorm": 24, "self_attn.kv_a_layernorm": 32}
    norms |= {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    for module, width in norms.items():
        tensors[f"{LAYER}.{module}.weight"] = 1 + 0.3 * torch.randn(width, generator=generator)
    tensors = {k: v if "gate." in k else v.to(dtype) for k, v in tensors.items()}
    arch = Architecture.from_config(V3)
    rope = Rope.of(arch)
    return Layer(arch, 1, TensorWeights(tensors), rope), rope, tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_in_place_and_in_halves_gives_equal_bits(dtype: torch.dtype) -> None:
    layer, rope, _ = build_layer(dtype)
    hidden, rotation = tokens(3 * 20, dtype).view(3, 20, -1), rope.at(torch.arange(20))
    before = hidden.clone()
    whole = layer(hidden, rotation)
    assert torch.equal(hidden, before)
    assert torch.equal(layer.feed_forward(layer.attend(hidden, rotation)), whole)
    assert torch.equal(hidden, before)
    in_place = layer(hidden, rotation, out=hidden)
    assert in_place is hidden
    assert torch.equal(hidden, whole)


def test_layer_in_parts_is_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, rope, tensors = build_layer()
    hidden, rotation = tokens(3 * 20).view(3, 20, -1), rope.at(torch.arange(20))
    whole = layer(hidden, rotation)
    asked: list[str] = []

    class Recorded(TensorWeights):
        def get(self, name: str) -> torch.Tensor:
            asked.append(name)
            return super().get(name)

    monkeypatch.setattr(attention, "PREFILL_SIZE_BYTES", 1)
    monkeypatch.setattr(model, "FEED_TOKENS", 23)
    monkeypatch.setattr(mlp, "ROUTE_TOKENS", 11)
    parts = Layer(layer.arch, 1, Recorded(tensors), rope)
    assert (parts(hidden, rotation) - whole).abs().max() < 2e-6 * whole.abs().max()
    every_token = [name for name in asked if ".experts." not in name and "layernorm" not in name]
    assert len(set(every_token)) == 5 + 2 + 3  # attention, router and bias, shared experts
    assert len(every_token) == len(set(every_token))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_sum_repeats_its_bits_after_one_wait() -> None:
    moe, x = build(V3, torch.bfloat16, "cuda"), tokens(5000, torch.bfloat16).cuda()
    ids, shares = moe.route(x)
    expected = moe.experts(x, ids, shares)
    for _ in range(5):
        assert torch.equal(moe.experts(x, ids, shares), expected)
    dispatch = moe.dispatch(ids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = moe.experts(x, ids, shares, dispatch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)
