"""Many prompts that share passes, within any memory, against one prompt at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoint import write_small

from weightkit.errors import GenerationError, NonFiniteError, Problems, SpaceError, TokenizerError
from weightkit.generation import Generation, Runtime, read_prompts
from weightkit.layouts import open_checkpoint
from weightkit.transforms import cast, shard
from weightkit.writer import write

PROMPTS = ["6 乘 7 等于？", "hi", [5, 6, 7, 8, 9, 10, 11], "a longer one, with some more words in it", [1]]


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many") / "fp8"
    write_small(folder)
    return folder


@pytest.fixture(scope="module")
def runtime(fp8: Path) -> Iterator[Runtime]:
    with Runtime(fp8, device="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def alone(runtime: Runtime) -> list[Generation]:
    return [runtime.generate(prompt, max_new_tokens=8) for prompt in PROMPTS]


def tokens(results: list[Generation]) -> list[tuple[int, ...]]:
    return [result.token_ids for result in results]


def test_results_are_those_of_one_at_a_time(runtime: Runtime, alone: list[Generation]) -> None:
    together = runtime.generate_many(PROMPTS, max_new_tokens=8)
    assert tokens(together) == tokens(alone)
    assert [result.text for result in together] == [result.text for result in alone]
    assert [result.prompt_ids for result in together] == [result.prompt_ids for result in alone]


def test_logits_are_those_of_one_at_a_time(runtime: Runtime) -> None:
    ids = runtime.encode_many(PROMPTS)
    runs = [runtime.model.new_cache() for _ in ids]
    with torch.inference_mode():
        together = runtime._logits(list(zip(ids, runs, strict=True)), [""] * len(ids))
        for row, prompt in zip(together, ids, strict=True):
            alone = runtime.model(torch.tensor([prompt]))[0, -1]
            torch.testing.assert_close(row, alone, rtol=0, atol=2e-5 * float(alone.abs().max()))


def test_each_stops_at_its_own_end(runtime: Runtime, alone: list[Generation], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "eos_ids", frozenset({alone[0].token_ids[2], alone[3].token_ids[5]}))
    expected = [runtime.generate(prompt, max_new_tokens=8) for prompt in PROMPTS]
    assert len({len(result.token_ids) for result in expected}) > 1
    together = runtime.generate_many(PROMPTS, max_new_tokens=8)
    assert tokens(together) == tokens(expected)
    assert [result.stopped_by for result in together] == [result.stopped_by for result in expected]


def test_each_is_drawn_as_if_alone(runtime: Runtime) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.2, "top_p": 0.9, "seed": 3}
    expected = [runtime.generate(prompt, **options) for prompt in PROMPTS]
    assert tokens(runtime.generate_many(PROMPTS, **options)) == tokens(expected)


def test_long_prompts_go_through_attention_in_parts(
    runtime: Runtime, alone: list[Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightkit.generation.runtime.PREFILL_TOKENS", 3)
    assert tokens(runtime.generate_many(PROMPTS, max_new_tokens=8)) == tokens(alone)


@pytest.mark.parametrize("form", ["fp8", "bf16-mp2"])
@pytest.mark.parametrize(("memory_bytes", "host_bytes"), [(0, 0), (200_000, 0), (300_000, 1 << 22)])
def test_memory_changes_only_what_is_read(
    fp8: Path, alone: list[Generation], tmp_path: Path, form: str, memory_bytes: int, host_bytes: int
) -> None:
    path = fp8
    if form != "fp8":
        path = tmp_path / form
        write(shard(cast(open_checkpoint(fp8), "bf16"), mp=2), path)
    with Runtime(path, device="cpu", memory_bytes=memory_bytes, host_bytes=host_bytes, stream=True) as streamed:
        results = streamed.generate_many(PROMPTS, max_new_tokens=8)
        use = streamed.weights.cache_use
    assert tokens(results) == tokens(alone)
    assert use.misses > 0
    assert (use.host_hits > 0) == (host_bytes > 0)


def test_one_pass_reads_each_weight_once_for_all(fp8: Path, alone: list[Generation]) -> None:
    """Without any cache: together they read much less than one after the other."""
    with Runtime(fp8, device="cpu", memory_bytes=0) as streamed:
        streamed.generate_many(PROMPTS, max_new_tokens=4)
        together = streamed.weights.bytes_read
        for prompt in PROMPTS:
            streamed.generate(prompt, max_new_tokens=4)
        assert together < (streamed.weights.bytes_read - together) / 2


def test_more_than_fits_goes_in_several_passes(
    runtime: Runtime, alone: list[Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_reserved", 40)
    waves = runtime._waves(runtime.encode_many(PROMPTS), 8)
    assert len(waves) > 1
    assert [ids for wave in waves for ids in wave] == runtime.encode_many(PROMPTS)
    assert tokens(runtime.generate_many(PROMPTS, max_new_tokens=8)) == tokens(alone)


def test_all_bad_prompts_are_told_before_any_work(fp8: Path) -> None:
    with Runtime(fp8, device="cpu") as opened:
        opened.max_tokens = 30
        with pytest.raises(Problems, match=r"(?s)prompt 2.*leaves no room.*prompt 3.*outside the vocabulary"):
            opened.generate_many([[1], [1] * 40, [9999]])
        with pytest.raises(GenerationError, match="no prompts"):
            opened.generate_many([])
        assert opened.weights.bytes_read == 0


def test_a_missing_tokenizer_is_told_once(fp8: Path, tmp_path: Path) -> None:
    for path in fp8.iterdir():
        if path.name != "tokenizer.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with Runtime(tmp_path, device="cpu") as opened, pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        opened.generate_many(["a", "b"])


def test_non_finite_logits_name_the_prompt(tmp_path: Path) -> None:
    stored = write_small(tmp_path / "whole")
    broken = stored["model.embed_tokens.weight"].clone()
    broken[77] = float("nan")
    write_small(tmp_path / "broken", stored={**stored, "model.embed_tokens.weight": broken})
    message = "after the prompt of prompt 2, first in the embedding"
    with Runtime(tmp_path / "broken", device="cpu") as opened, pytest.raises(NonFiniteError, match=message):
        opened.generate_many([[5, 6], [76, 77, 78]], max_new_tokens=2)


def test_too_little_memory_names_the_least_that_works(fp8: Path) -> None:
    def opened(host_memory: int, **options: Any) -> Runtime:
        return Runtime(fp8, device="cpu", host_memory=host_memory, **options)

    with opened(1 << 20) as small, pytest.raises(SpaceError, match=r"--host-memory: not enough.*at least") as caught:
        small.stream([1, 2, 3])
    least = int((float(str(caught.value).split("expected ")[1].split(" MB")[0]) + 0.1) * 1e6)
    with opened(least) as enough:
        assert len(enough.generate([1, 2, 3], max_new_tokens=2).token_ids) == 2


def test_no_stream_is_refused_where_weights_do_not_fit(fp8: Path) -> None:
    with Runtime(fp8, device="cpu", host_memory=1 << 30, stream=False) as whole:
        plan = whole.plan([[1, 2, 3]], max_new_tokens=2, measure=False)
        assert len(whole.generate([1, 2, 3], max_new_tokens=2).token_ids) == 2
        sizes = whole.weights.sizes
    assert not plan.is_streamed
    memory = plan.budget.working + 2 * sizes.largest + 1000
    assert memory < plan.budget.working + sizes.total
    with Runtime(fp8, device="cpu", host_memory=memory) as streamed:
        assert len(streamed.generate([1, 2, 3], max_new_tokens=2).token_ids) == 2
        assert streamed.weights.is_streamed
    message = r"--host-memory: the weights do not fit(.|\n)*at least(.|\n)*Leave out --no-stream"
    with Runtime(fp8, device="cpu", host_memory=memory, stream=False) as refused:
        with pytest.raises(SpaceError, match=message):
            refused.stream([1, 2, 3], max_new_tokens=2)
        assert refused.weights.bytes_read == 0


def test_the_plan_foresees_what_is_read(fp8: Path) -> None:
    """Where nothing is kept, what routing does not decide is foreseen to the byte."""
    with Runtime(fp8, device="cpu", memory_bytes=0, stream=True) as opened:
        ids = opened.encode_many(PROMPTS)
        plan = opened.plan(ids, max_new_tokens=4, measure=False)
        assert opened.weights.bytes_read == 0
        assert plan.is_streamed
        assert (plan.prompts, plan.passes, plan.rate) == (5, 1, None)
        assert plan.token_bytes == plan.token_read_bytes
        results = opened.generate_many(PROMPTS, max_new_tokens=4)
        read = opened.weights.bytes_read
    foreseen = plan.prompt_bytes + 3 * plan.token_bytes
    assert 0.8 * foreseen < read < 1.2 * foreseen
    assert results[0].cache.device_hits == 0


def test_prompts_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n  two \r\n三\n", encoding="utf-8")
    assert read_prompts(path) == ["one", "two", "三"]
    records = [{"prompt": "a"}, {"messages": [{"role": "user", "content": "b"}]}, {"token_ids": [1, 2]}]
    path.write_text("\n".join(map(json.dumps, records)))
    assert read_prompts(path) == ["a", records[1]["messages"], [1, 2]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no prompts in the file"),
        (b"\xff\xfe", "not UTF-8 at byte 0"),
        (b'{"prompt": 5}', "prompt of the wrong kind: expected text, found 5"),
        (
            b'{"prompt": "a"}\n{"text": "b"}',
            "2: not one prompt: expected one of prompt, messages or token_ids, found text",
        ),
        (b'{"prompt": "a"}\nb\n[1]', r"(?s)2 problems.*not JSON.*not one prompt"),
        (b'{"token_ids": [1, true]}', "token_ids of the wrong kind"),
        (b'{"messages": []}', "messages of the wrong kind"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "prompts"
    path.write_bytes(content)
    with pytest.raises((GenerationError, Problems), match=message):
        read_prompts(path)
