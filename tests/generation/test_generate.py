"""Generation from checkpoints on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoint import CONFIG, computed_tensors, write_small
from transformers_oracle import published_tensors, transformers_model

from weightkit.errors import GenerationError, NonFiniteError, TokenizerError
from weightkit.generation import Runtime, Sampling, generate
from weightkit.layouts import open_checkpoint
from weightkit.transforms import cast, shard, strip_mtp
from weightkit.writer import write

PROMPT = "6 乘 7 等于？"


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation") / "fp8"
    write_small(folder)
    return folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return write_small(tmp_path_factory.mktemp("stored") / "fp8")


@pytest.fixture
def runtime(fp8: Path) -> Any:
    with Runtime(fp8, device="cpu") as opened:
        yield opened


def edit(folder: Path, name: str, **fields: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_greedy_tokens_are_those_of_transformers(runtime: Runtime, stored: dict[str, torch.Tensor]) -> None:
    oracle = transformers_model(CONFIG)
    values = computed_tensors(stored)
    with torch.no_grad():
        for name, tensor in published_tensors(oracle).items():  # views of the oracle's own weights
            tensor.copy_(values[name])
    ids = runtime.encode(PROMPT)
    found = runtime.generate(PROMPT, max_new_tokens=16)
    with torch.inference_mode():
        for token in found.token_ids:
            assert int(oracle(torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


def test_fp8_and_its_cast_generate_the_same(fp8: Path) -> None:
    checkpoint = open_checkpoint(fp8)
    expected = generate(checkpoint, PROMPT, device="cpu", max_new_tokens=12)
    found = generate(strip_mtp(cast(checkpoint, "bf16")), PROMPT, device="cpu", max_new_tokens=12)
    assert found.token_ids == expected.token_ids
    assert found.text == expected.text


def test_stream_adds_up_to_the_result(runtime: Runtime) -> None:
    stream = runtime.stream(PROMPT, max_new_tokens=20)
    pieces = list(stream)
    result = stream.result
    assert "".join(pieces) == result.text
    assert len(result.token_ids) == 20
    assert result.stopped_by == "length"
    assert result.prompt_ids == tuple(runtime.encode(PROMPT))
    assert result.prefill_s > 0
    assert result.tokens_per_s is not None
    assert result.bytes_read == runtime.weights.bytes_read > 0
    assert (result.device, result.dtype) == ("cpu", "float32")


def test_text_goes_through_the_chat_template_unless_told_otherwise(runtime: Runtime) -> None:
    assert runtime.tokenizer is not None
    chat = runtime.tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert runtime.encode("hi") == chat
    assert runtime.encode([{"role": "user", "content": "hi"}]) == chat
    assert runtime.encode("hi", chat=False) == runtime.tokenizer.encode("hi")
    assert runtime.encode([1, 2, 3]) == [1, 2, 3]


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("as_list", [True, False])
def test_stops_at_an_end_token(runtime: Runtime, tmp_path: Path, fp8: Path, where: str, as_list: bool) -> None:
    usual = runtime.generate(PROMPT, max_new_tokens=8).token_ids
    end = next(token for i, token in enumerate(usual) if i > 1 and token not in usual[:i])
    folder = copy_folder(fp8, tmp_path / "ends")
    edit(folder, where, eos_token_id=[end, 999] if as_list else end)
    found = generate(folder, PROMPT, device="cpu", max_new_tokens=8)
    assert found.stopped_by == "eos"
    assert found.token_ids == usual[: usual.index(end) + 1]
    assert found.text == runtime.generate(PROMPT, max_new_tokens=usual.index(end)).text


def copy_folder(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_second_prompt_reads_only_what_is_new(fp8: Path) -> None:
    with Runtime(fp8, device="cpu") as runtime:
        runtime.generate(PROMPT, max_new_tokens=4)
        before = runtime.weights.bytes_read
        runtime.generate(PROMPT, max_new_tokens=4)
        embedding_rows = (len(set(runtime.encode(PROMPT))) + 3) * CONFIG["hidden_size"] * 2
        assert runtime.weights.bytes_read - before <= embedding_rows


@pytest.mark.parametrize("memory_bytes", [0, 300_000])
def test_little_memory_changes_only_what_is_read(runtime: Runtime, fp8: Path, memory_bytes: int) -> None:
    expected = runtime.generate(PROMPT, max_new_tokens=6)
    with Runtime(fp8, device="cpu", memory_bytes=memory_bytes) as small:
        found = small.generate(PROMPT, max_new_tokens=6)
        assert small.weights.kept_bytes <= memory_bytes
    assert found.token_ids == expected.token_ids
    assert found.bytes_read > expected.bytes_read


def test_long_prompt_in_several_passes(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = runtime.generate(PROMPT, max_new_tokens=4)
    monkeypatch.setattr("weightkit.generation.runtime.PREFILL_TOKENS", 5)
    assert runtime.generate(PROMPT, max_new_tokens=4).token_ids == whole.token_ids


def test_seed_decides_the_draw(runtime: Runtime) -> None:
    def draw(seed: int) -> tuple[int, ...]:
        return runtime.generate(PROMPT, max_new_tokens=12, temperature=1.5, seed=seed).token_ids

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_top_p_draws_from_the_fewest_likeliest() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    generator = torch.Generator().manual_seed(0)

    def drawn(top_p: float) -> set[int]:
        sampling = Sampling(temperature=1.0, top_p=top_p)
        return {sampling.choose(logits, generator) for _ in range(200)}

    assert drawn(0.01) == {1}
    assert drawn(0.6) == {1, 3}
    assert drawn(0.85) == {1, 2, 3}
    assert drawn(1.0) == {0, 1, 2, 3}


def test_temperature_sharpens() -> None:
    logits = torch.tensor([0.0, 1.0])
    generator = torch.Generator().manual_seed(0)

    def share(temperature: float) -> float:
        return sum(Sampling(temperature).choose(logits, generator) for _ in range(2000)) / 2000

    assert share(1.0) == pytest.approx(0.731, abs=0.04)
    assert share(0.5) == pytest.approx(0.881, abs=0.03)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([1] * 64, {}, "leaves no room.*fewer than 64 tokens, found 64"),
        ([], {}, "prompt is empty"),
        ([1, 264], {}, "outside the vocabulary.*0 to 263, found 264"),
        ([1], {"max_new_tokens": 0}, "at least 1"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
    ],
)
def test_bad_requests_are_refused_before_any_work(
    tmp_path: Path, fp8: Path, prompt: list[int], options: dict[str, Any], message: str
) -> None:
    folder = copy_folder(fp8, tmp_path / "short")
    edit(folder, "config.json", max_position_embeddings=64)
    with Runtime(folder, device="cpu") as runtime:
        with pytest.raises(GenerationError, match=message):
            runtime.stream(prompt, **options)
        assert runtime.weights.bytes_read == 0


def test_context_ends_the_answer(tmp_path: Path, fp8: Path) -> None:
    folder = copy_folder(fp8, tmp_path / "short")
    edit(folder, "config.json", max_position_embeddings=64)
    found = generate(folder, [1] * 60, device="cpu", max_new_tokens=100)
    assert found.stopped_by == "length"
    assert len(found.token_ids) == 4


def test_ids_need_no_tokenizer(tmp_path: Path, fp8: Path) -> None:
    folder = copy_folder(fp8, tmp_path / "bare")
    (folder / "tokenizer.json").unlink()
    (folder / "tiktoken.model").write_bytes(b"IQ== 0\n")
    with Runtime(folder, device="cpu") as runtime:
        assert len(runtime.generate([1, 2, 3], max_new_tokens=3).token_ids) == 3
        with pytest.raises(TokenizerError, match="tiktoken"):
            runtime.stream("text")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.1.self_attn.o_proj.weight_scale_inv", "after the prompt, first in layer 1"),
        ("model.embed_tokens.weight", "after the prompt, first in the embedding"),
        ("model.norm.weight", "after the prompt, in the final norm or the head"),
    ],
)
def test_pain_14_non_finite_logits_name_the_layer(
    tmp_path: Path, stored: dict[str, torch.Tensor], name: str, place: str
) -> None:
    """pains 14: a smoke test demands finite logits."""
    write_small(tmp_path, stored={**stored, name: torch.full_like(stored[name], float("nan"))})
    with pytest.raises(NonFiniteError, match=place):
        generate(tmp_path, PROMPT, device="cpu")


def test_non_finite_logits_name_the_step(tmp_path: Path, stored: dict[str, torch.Tensor], runtime: Runtime) -> None:
    """One token's embedding is broken, and it is the model's second word."""
    second = runtime.generate(PROMPT, max_new_tokens=2).token_ids[1]
    assert second not in runtime.encode(PROMPT)
    broken = stored["model.embed_tokens.weight"].clone()
    broken[second] = float("inf")
    write_small(tmp_path, stored={**stored, "model.embed_tokens.weight": broken})
    with pytest.raises(NonFiniteError, match="after new token 2, first in the embedding"):
        generate(tmp_path, PROMPT, device="cpu")


def test_pain_14_f16_overflow_is_refused_with_advice(tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
    name = "model.layers.2.mlp.shared_experts.down_proj.weight_scale_inv"
    write_small(tmp_path, stored={**stored, name: stored[name] * 1e6})
    with pytest.raises(NonFiniteError, match=r"first in layer 2(.|\n)*F16 overflows"):
        generate(tmp_path, PROMPT, device="cpu", dtype="f16")


def test_pain_20_rank_files_generate_without_a_launcher(runtime: Runtime, fp8: Path, tmp_path: Path) -> None:
    write(shard(cast(open_checkpoint(fp8), "bf16"), mp=2), tmp_path / "mp2")
    found = generate(tmp_path / "mp2", PROMPT, device="cpu", max_new_tokens=12)
    assert found.token_ids == runtime.generate(PROMPT, max_new_tokens=12).token_ids


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_generates_the_same_in_f32(runtime: Runtime, fp8: Path) -> None:
    found = generate(fp8, PROMPT, device="cuda", dtype="f32", max_new_tokens=12)
    assert found.device == "cuda"
    assert found.token_ids == runtime.generate(PROMPT, max_new_tokens=12).token_ids


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_computes_in_the_config_dtype(fp8: Path) -> None:
    assert generate(fp8, PROMPT, device="auto", max_new_tokens=12).dtype == "bfloat16"
