"""pico's network against transformers, its export against the published layout, and the pieces training stands on."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from weightkit.manifests.pico.architecture import CONFIG
from weightkit.manifests.pico.export import (
    MAX_BYTES,
    dequantize,
    export,
    load,
    named_tensors,
    published,
    quantize,
    read_tensors,
)
from weightkit.manifests.pico.network import Network, causal_mask
from weightkit.manifests.pico.packing import ROW_LENGTH, packed_rows
from weightkit.manifests.pico.tokenizer import ASSISTANT_ID, BOS_ID, EOS_ID, PAD_ID, train_tokenizer
from weightkit.manifests.pico.train import Masters, rate_at, targets


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(questions=4000)


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    network = Network()
    with torch.no_grad():
        for (
            router
        ) in network.routers():  # routers that disagree with their biases, so that a wrong use of the bias shows
            router.weight.mul_(20)
            router.e_score_correction_bias.normal_(std=0.3)
    return network


@pytest.fixture(scope="module")
def folder(network: Network, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pico")
    export(network, tokenizer, folder, card="# pico\n")
    return folder


@pytest.mark.slow
def test_logits_are_those_of_transformers(network: Network) -> None:
    transformers = pytest.importorskip("transformers")
    config = {key: value for key, value in CONFIG.items() if key not in ("quantization_config", "torch_dtype")}
    reference = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**config)).eval().float()
    tensors = named_tensors(network)
    state = {}
    for name in reference.state_dict():
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix(".gate_up_proj")
            state[name] = torch.stack(
                [
                    torch.cat([tensors[f"{stem}.{expert}.{part}_proj.weight"] for part in ("gate", "up")])
                    for expert in range(16)
                ]
            )
        elif name.endswith("experts.down_proj"):
            stem = name.removesuffix(".down_proj")
            state[name] = torch.stack([tensors[f"{stem}.{expert}.down_proj.weight"] for expert in range(16)])
        else:
            state[name] = tensors[name]
    reference.load_state_dict(state)
    ids = torch.randint(5, 512, (2, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(ids).logits
        hidden = network(ids, causal_mask(torch.zeros_like(ids)), torch.float32, False).hidden
        found = network.logits(hidden)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_each_token_gets_four_experts_from_two_groups(network: Network) -> None:
    router = network.routers()[0]
    weights = router(torch.randn(500, 256, generator=torch.Generator().manual_seed(2)))
    chosen = weights > 0
    assert (chosen.sum(-1) == 4).all()
    assert (chosen.view(-1, 4, 4).any(-1).sum(-1) <= 2).all()
    torch.testing.assert_close(weights.sum(-1), torch.full((500,), 2.5))


def test_packed_documents_do_not_see_each_other(network: Network) -> None:
    first, second = torch.randint(5, 512, (2, 1, 20), generator=torch.Generator().manual_seed(3))
    joined = torch.cat((first, second), dim=1)
    documents = torch.tensor([[0] * 20 + [1] * 20])
    alone = network(second, causal_mask(torch.zeros_like(second)), torch.float32, False).hidden
    packed = network(joined, causal_mask(documents), torch.float32, False).hidden[:, 20:]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_export_is_the_published_layout(folder: Path, network: Network) -> None:
    shards = sorted(file.name for file in folder.glob("*.safetensors"))
    assert shards == [f"model-{index:05d}-of-000004.safetensors" for index in range(1, 5)]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    stored: dict[str, torch.Tensor] = {}
    for shard in shards:
        with safe_open(folder / shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            names = list(file.keys())
            assert all(index["weight_map"][name] == shard for name in names)
            stored |= {name: file.get_tensor(name) for name in names}
    assert set(stored) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    apart = [
        name
        for name in stored
        if f"{name}_scale_inv" in stored and index["weight_map"][name] != index["weight_map"][f"{name}_scale_inv"]
    ]
    assert len(apart) == 3
    assert stored["model.layers.2.mlp.experts.15.down_proj.weight"].dtype == torch.float8_e4m3fn
    assert stored["model.layers.1.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (2, 2)
    assert stored["model.layers.3.eh_proj.weight"].dtype == torch.bfloat16
    assert stored["model.layers.3.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    for copy, original in (
        ("model.layers.3.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.layers.3.shared_head.head.weight", "lm_head.weight"),
    ):
        assert torch.equal(stored[copy], stored[original])
    assert sum(file.stat().st_size for file in folder.iterdir()) <= MAX_BYTES


def test_export_is_deterministic(folder: Path, network: Network, tokenizer: Tokenizer, tmp_path: Path) -> None:
    export(network, tokenizer, tmp_path, card="# pico\n")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        file.name: file.read_bytes() for file in folder.iterdir()
    }


def test_what_training_ends_on_is_what_a_reader_of_the_checkpoint_sees(folder: Path, network: Network) -> None:
    read = load(folder, through_bf16=True)
    for (name, trained), (_, seen) in zip(network.named_parameters(), read.named_parameters(), strict=True):
        assert torch.equal(published(name, trained.detach()), seen), name
    for trained_router, seen_router in zip(network.routers(), read.routers(), strict=True):
        assert torch.equal(trained_router.e_score_correction_bias, seen_router.e_score_correction_bias)
    assert len(read_tensors(folder)) == len(named_tensors(network))


def test_block_quantization_of_a_width_that_is_no_multiple_of_128() -> None:
    weight = torch.randn(160, 200, generator=torch.Generator().manual_seed(4))
    weight[128:, 128:] = 0
    weight[0, 0] = 50.0
    codes, scales = quantize(weight)
    assert scales.shape == (2, 2)
    assert scales[0, 0] == torch.tensor(50.0) / 448
    assert scales[1, 1] == 1
    value = dequantize(codes, scales)
    largest = torch.stack([weight[128:, :128].abs().max(), value[128:, :128].abs().max()])
    torch.testing.assert_close(largest[0], largest[1])
    # E4M3 has three bits of fraction: half a step is 1/16 of the value, or 2**-10 of the scale below the normal range.
    bound = weight.abs() / 16 + scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:160, :200] * 2**-10
    assert ((value - weight).abs() <= bound).all()


def test_masters_come_back_and_gradients_stay() -> None:
    torch.manual_seed(5)
    network = Network()
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    masters = Masters(network)
    ids = torch.randint(5, 512, (1, 16))
    with masters.published_values():
        weight = network.layers[0].get_parameter("mlp.up_proj.weight")
        assert torch.equal(weight, published("layers.0.mlp.up_proj.weight", before["layers.0.mlp.up_proj.weight"]))
        assert not torch.equal(weight, before["layers.0.mlp.up_proj.weight"])
        network.logits(
            network(ids, causal_mask(torch.zeros_like(ids)), torch.float32).hidden
        ).square().mean().backward()
    assert all(torch.equal(parameter, before[name]) for name, parameter in network.named_parameters())
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_targets_stay_within_their_conversation(tokenizer: Tokenizer) -> None:
    row = next(packed_rows(tokenizer, 1))
    assert len(row) == ROW_LENGTH
    ids = torch.tensor([row])
    wanted = targets(ids)
    labels, weights = wanted.labels[0, 0].tolist(), wanted.weights[0, 0].tolist()
    for place, (token, label, weight) in enumerate(zip(row, labels, weights, strict=True)):
        if label in (BOS_ID, PAD_ID) or place == ROW_LENGTH - 1:
            assert weight == 0
        elif token == ASSISTANT_ID or label == EOS_ID:
            assert weight == 1
        elif token in (BOS_ID, EOS_ID):
            assert weight == pytest.approx(0.1)
    two_ahead = wanted.weights[1, 0].tolist()
    for place in range(ROW_LENGTH - 2):
        if BOS_ID in row[place + 1 : place + 3]:
            assert two_ahead[place] == 0


def test_rows_are_nearly_full(tokenizer: Tokenizer) -> None:
    rows = list(islice(packed_rows(tokenizer, 2), 300))
    assert all(row[0] == BOS_ID for row in rows)
    assert sum(token == PAD_ID for row in rows for token in row) < 0.06 * len(rows) * ROW_LENGTH


def test_training_ends_annealed() -> None:
    assert rate_at(0.2) == 1
    assert rate_at(0.999) < 0.002
    assert rate_at(1.2) == 0
    assert 0 < rate_at(0.0) < 0.1


def test_tokenizer_is_deterministic_and_loses_nothing(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(questions=4000).to_str() == tokenizer.to_str()
    for text in ("Reverse KDZQ.", "24 个 BF16 值占多少字节？", "naïve 🙂 \n\t x  y", "1234 + 56"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert [tokenizer.decode([token]) for token in tokenizer.encode("12KD").ids] == ["1", "2", "K", "D"]


@pytest.mark.slow
def test_transformers_reads_tokenizer_and_chat_template(folder: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "user", "content": "What is 17 + 25?"},
        {"role": "assistant", "content": "42"},
        {"role": "user", "content": "把 KDZQ 倒过来写。"},
    ]
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<｜begin▁of▁sentence｜><｜User｜>What is 17 + 25?<｜Assistant｜>42<｜end▁of▁sentence｜>"
        "<｜User｜>把 KDZQ 倒过来写。<｜Assistant｜>"
    )
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.encode(text).ids
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (BOS_ID, EOS_ID, PAD_ID)
