"""The two forms of attention against a plain one in F64; slices of sequences and groups of heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers_oracle import V2, V2_LITE, V3, YARN

from weightkit.family import Architecture
from weightkit.model import Attention, LayerCache, Observer, Rope, Rotation, TensorWeights, attention

PREFIX = "model.layers.0.self_attn"
MEMBERS: dict[str, dict[str, Any]] = {
    "v3": V3,
    "v3-yarn": {**V3, "rope_scaling": {**YARN, "original_max_position_embeddings": 16}},
    "v2": V2,
    "v2-lite": {**V2_LITE, "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    "value-as-wide-as-query": {**V3, "v_head_dim": 24},
    "value-wider-than-query": {**V3, "v_head_dim": 40},
}
BATCH, SEQ = 5, 40
Tensors = dict[str, torch.Tensor]


def attention_tensors(config: dict[str, Any], seed: int = 0) -> Tensors:
    """Random F32 weights of one attention, their shapes written out."""
    heads, nope, rope = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    hidden, kv_lora, q_lora, v = (config[k] for k in ("hidden_size", "kv_lora_rank", "q_lora_rank", "v_head_dim"))
    shapes: dict[str, tuple[int, ...]] = {
        "kv_a_proj_with_mqa": (kv_lora + rope, hidden),
        "kv_a_layernorm": (kv_lora,),
        "kv_b_proj": (heads * (nope + v), kv_lora),
        "o_proj": (hidden, heads * v),
    }
    if q_lora is None:
        shapes["q_proj"] = (heads * (nope + rope), hidden)
    else:
        shapes |= {
            "q_a_proj": (q_lora, hidden),
            "q_a_layernorm": (q_lora,),
            "q_b_proj": (heads * (nope + rope), q_lora),
        }
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{PREFIX}.{module}.weight": torch.randn(shape, generator=generator) * shape[-1] ** -0.5 * 2
        if len(shape) == 2
        else 1 + 0.3 * torch.randn(shape, generator=generator)
        for module, shape in shapes.items()
    }


def build(
    config: dict[str, Any], dtype: torch.dtype = torch.float32, observe: Observer | None = None, device: str = "cpu"
) -> tuple[Attention, Rotation, torch.Tensor]:
    """An attention, the rotation of its tokens, and hidden states [BATCH, SEQ, hidden]."""
    arch = Architecture.from_config(config)
    tensors = {name: tensor.to(device, dtype) for name, tensor in attention_tensors(config).items()}
    rope = Rope.of(arch)
    x = torch.randn(BATCH, SEQ, arch.hidden_size, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    one = Attention(arch, PREFIX, TensorWeights(tensors), rope.softmax_scale, observe)
    return one, rope.at(torch.arange(SEQ, device=device)), x


def absorbed(one: Attention, rotation: Rotation, x: torch.Tensor) -> torch.Tensor:
    """All but the first token by the absorbed form, which follows cached tokens."""
    cache = LayerCache()
    first = one(x[:, :1], Rotation(rotation.cos[:1], rotation.sin[:1]), cache)
    return torch.cat((first, one(x[:, 1:], Rotation(rotation.cos[1:], rotation.sin[1:]), cache)), dim=1)


def plain(config: dict[str, Any], rotation: Rotation, scale: float, x: torch.Tensor) -> torch.Tensor:
    """MLA as its equations stand, in F64, head by head: [batch, seq, hidden]."""
    w = {name.split(".")[-2]: tensor.double() for name, tensor in attention_tensors(config).items()}
    nope, rank, v_dim = config["qk_nope_head_dim"], config["kv_lora_rank"], config["v_head_dim"]
    width = nope + config["qk_rope_head_dim"]
    x, turn = x.double(), torch.complex(rotation.cos.double(), rotation.sin.double())

    def norm(y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return y / (y.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def rotate(y: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    q = x @ w["q_proj"].T if "q_proj" in w else norm(x @ w["q_a_proj"].T, w["q_a_layernorm"]) @ w["q_b_proj"].T
    compressed = x @ w["kv_a_proj_with_mqa"].T
    kv = norm(compressed[..., :rank], w["kv_a_layernorm"]) @ w["kv_b_proj"].T
    k_rope = rotate(compressed[..., rank:])
    later = torch.ones(SEQ, SEQ, dtype=torch.bool).triu(1)
    outputs = []
    for head in range(config["num_attention_heads"]):
        own, own_kv = q[..., head * width :][..., :width], kv[..., head * (nope + v_dim) :][..., : nope + v_dim]
        scores = own[..., :nope] @ own_kv[..., :nope].transpose(1, 2) + rotate(own[..., nope:]) @ k_rope.transpose(1, 2)
        outputs.append((scores * scale).masked_fill(later, float("-inf")).softmax(-1) @ own_kv[..., nope:])
    return torch.cat(outputs, dim=-1) @ w["o_proj"].T


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest output."""
    return float((found.double() - expected.double()).abs().max() / expected.abs().max())


@pytest.mark.parametrize("member", MEMBERS)
def test_both_forms_are_the_plain_one_to_f32_rounding(member: str) -> None:
    one, rotation, x = build(MEMBERS[member])
    expected = plain(MEMBERS[member], rotation, one.softmax_scale, x)
    assert difference(one(x, rotation), expected) < 3e-6
    assert difference(absorbed(one, rotation, x), expected) < 3e-6


@pytest.mark.parametrize("member", ["v3-yarn", "v2-lite"])
def test_bf16_expanded_is_as_near_as_absorbed(member: str) -> None:
    exact_one, rotation, x = build(MEMBERS[member])
    one, _, rounded = build(MEMBERS[member], torch.bfloat16)
    exact = exact_one(x, rotation)
    found, other = (form.float() - exact for form in (one(rounded, rotation), absorbed(one, rotation, rounded)))
    assert found.square().mean() < 1.2 * other.square().mean()


@pytest.mark.parametrize(("query", "value"), [(24, 12), (24, 24), (16, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flash_kernel_is_eligible_and_causal(query: int, value: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(2, 33, 3, query, generator=generator).to(dtype) for _ in range(2))
    v = torch.randn(2, 33, 3, value, generator=generator).to(dtype)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where no flash kernel takes the shapes
        found = attention.causal_attention(q, k, v, 0.3)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * 0.3
    scores = scores.masked_fill(torch.ones(33, 33, dtype=torch.bool).triu(1), float("-inf"))
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v.double())
    assert (found.shape, found.dtype) == (expected.shape, dtype)
    assert difference(found, expected) < (1e-6 if dtype == torch.float32 else 1e-2)


def room_for(one: Attention, x: torch.Tensor, sequences: float) -> int:
    """The budget in which so many sequences of ``x`` go at once."""
    widths = one.arch
    head = 2 * 24 + 16 + widths.v_head_dim + 2 * max(24, widths.v_head_dim) + widths.v_head_dim
    return int(sequences * SEQ * 4 * head * x.element_size())


@pytest.mark.parametrize("member", ["v3-yarn", "v2-lite", "value-wider-than-query"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequences", [1, 2, 3])
def test_slices_of_sequences_give_equal_bits(
    member: str, dtype: torch.dtype, sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, rotation, x = build(MEMBERS[member], dtype)
    cache, sliced_cache = LayerCache(), LayerCache()
    assert len(list(one.slices(x))) == 1
    whole = one(x, rotation, cache)
    monkeypatch.setattr(attention, "PREFILL_SIZE_BYTES", room_for(one, x, sequences))
    assert [part.stop - part.start for part in one.slices(x)] == {1: [1] * 5, 2: [2, 2, 1], 3: [3, 2]}[sequences]
    assert torch.equal(one(x, rotation, sliced_cache), whole)
    assert torch.equal(one(x, rotation), whole)
    latents = cache.append(x.new_empty(BATCH, 0, 40))
    assert latents.shape == (BATCH, SEQ, 32 + 8)
    assert torch.equal(sliced_cache.append(x.new_empty(BATCH, 0, 40)), latents)


def test_a_long_sequence_is_a_slice_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    one, rotation, x = build(MEMBERS["v3-yarn"])
    monkeypatch.setattr(attention, "LONE_TOKENS", SEQ)
    assert [part.stop - part.start for part in one.slices(x)] == [1] * BATCH
    assert len(list(one.slices(x[:, 1:]))) == 1
    together = one(x, rotation)
    for i in range(BATCH):
        assert torch.equal(one(x[i : i + 1], rotation)[0], together[i])


@pytest.mark.parametrize("share", [0.0, 0.26, 0.8])
def test_a_sequence_larger_than_the_budget_goes_in_groups_of_heads(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, rotation, x = build(MEMBERS["v3-yarn"])
    whole = one(x, rotation)
    calls: list[int] = []

    def counted(query: torch.Tensor, *others: Any) -> torch.Tensor:
        calls.append(query.shape[2])
        return plain_kernel(query, *others)

    plain_kernel = attention.causal_attention
    monkeypatch.setattr(attention, "causal_attention", counted)
    monkeypatch.setattr(attention, "PREFILL_SIZE_BYTES", room_for(one, x, share))
    assert difference(one(x, rotation), whole) < 1e-6
    assert calls == {0.0: [1] * 4, 0.26: [1] * 4, 0.8: [3, 1]}[share] * BATCH


def test_observer_sees_every_input_once_whatever_the_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    one, rotation, x = build(V3, observe=lambda name, inputs: seen.setdefault(name, []).append(inputs.clone()))
    one(x, rotation)
    whole = {name: torch.cat(inputs) for name, inputs in seen.items()}
    seen.clear()
    monkeypatch.setattr(attention, "PREFILL_SIZE_BYTES", room_for(one, x, 2))
    one(x, rotation)
    linear_maps = {name for name in one.names if "_proj" in name}
    assert set(whole) == set(seen) == linear_maps
    for name, inputs in seen.items():
        assert len(inputs) == 3
        assert torch.equal(torch.cat(inputs), whole[name]), name
    cache = LayerCache()
    output = one(x, rotation, cache)
    latents = cache.append(x.new_empty(BATCH, 0, 40))
    assert torch.equal(whole[f"{PREFIX}.kv_b_proj.weight"], latents[..., : V3["kv_lora_rank"]])
    o_proj = attention_tensors(V3)[f"{PREFIX}.o_proj.weight"]
    assert difference(whole[f"{PREFIX}.o_proj.weight"] @ o_proj.T, output) < 1e-6
    assert torch.equal(whole[f"{PREFIX}.q_a_proj.weight"], x)


def test_slices_ask_for_each_weight_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one, rotation, x = build(V3)
    asked: list[str] = []

    class Recorded(TensorWeights):
        def get(self, name: str) -> torch.Tensor:
            asked.append(name)
            return super().get(name)

    one.weights = Recorded(attention_tensors(V3))
    monkeypatch.setattr(attention, "PREFILL_SIZE_BYTES", 1)
    one(x, rotation)
    assert asked == one.names  # each once, in the order that is promised


def test_decoding_continues_what_slices_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    one, rotation, x = build(MEMBERS["v3-yarn"])
    whole = one(x, rotation)
    monkeypatch.setattr(attention, "PREFILL_SIZE_BYTES", 1)
    cache, outputs = LayerCache(), []
    for start, end in ((0, 30), (30, 38), (38, 39), (39, 40)):
        outputs.append(one(x[:, start:end], Rotation(rotation.cos[start:end], rotation.sin[start:end]), cache))
    assert difference(torch.cat(outputs, dim=1), whole) < 2e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("member", ["v3-yarn", "v2-lite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_slices_give_equal_bits_and_the_cpus_values(
    member: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {**MEMBERS[member], "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    one, rotation, x = build(wide, dtype, device="cuda")
    exact_one, exact_rotation, exact_x = build(wide)
    whole = one(x, rotation)
    assert difference(whole.cpu(), exact_one(exact_x, exact_rotation)) < (1e-5 if dtype == torch.float32 else 4e-2)
    assert torch.equal(one(x, rotation), whole)
    monkeypatch.setattr(attention, "LONE_TOKENS", SEQ)
    assert torch.equal(one(x, rotation), torch.cat([one(x[i : i + 1], rotation) for i in range(BATCH)]))
