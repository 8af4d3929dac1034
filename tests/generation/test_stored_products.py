"""Generating with weights multiplied as they are stored: tokens from any budgets, and what is said of memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_kernels import PlainKernels
from threads import one_thread  # noqa: F401 - a fixture
from tiny import V3, V3_INT4, write_tiny

from weightkit.errors import DeviceError, SpaceError
from weightkit.generation import Runtime
from weightkit.generation.memory import grouped_bytes
from weightkit.generation.passes import run_pass
from weightkit.layouts import open_checkpoint
from weightkit.model.packed import Packed
from weightkit.model.products import Products
from weightkit.model.streamed import Streamed
from weightkit.transforms import cast
from weightkit.writer import write

PROMPTS = [[3, 9, 27, 40], [5, 6]]


@pytest.fixture(scope="module", params=["fp8", "int4"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored") / str(request.param)
    write_tiny(folder, replace({"fp8": V3, "int4": V3_INT4}[request.param], layers=2, mtp_layers=0))
    return folder


def opened(path: Path, **options: object) -> Runtime:
    runtime = Runtime(path, device="cpu", dtype="bf16", **options)  # type: ignore[arg-type]
    kernels = PlainKernels()
    runtime.weights.products = Products(kernels, kernels)
    runtime.eos_ids = frozenset()  # random weights stop at random
    return runtime


def test_tokens_do_not_depend_on_memory(path: Path) -> None:
    found = []
    for memory_bytes, host_bytes in ((None, None), (60_000, 1 << 18), (0, 0)):
        with opened(path, memory_bytes=memory_bytes, host_bytes=host_bytes, jobs=2) as runtime:
            alone = runtime.generate(PROMPTS[0], max_new_tokens=4).token_ids
            together = [result.token_ids for result in runtime.generate_many(PROMPTS, max_new_tokens=3)]
            assert runtime.weights.is_streamed == (memory_bytes is not None)
        found.append((alone, together))
    assert all(tokens == found[0] for tokens in found[1:])


def test_new_tokens_of_two_take_the_products_of_each(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's for each sequence, an MLP's for both at once; and attention's weights are read once for both."""
    rows, read, started = [], Counter[str](), Streamed._start

    def counted(store: Streamed, unit: Any, *args: Any, **options: Any) -> Any:
        read[unit.key] += ".self_attn." in unit.key
        return started(store, unit, *args, **options)

    monkeypatch.setattr(Streamed, "_start", counted)
    for prompts in (PROMPTS[:1], PROMPTS):
        with opened(path, memory_bytes=0, jobs=1) as runtime:
            caches = [runtime.model.new_cache() for _ in prompts]
            run = partial(run_pass, runtime.model, runtime.weights, most_tokens=8)
            run(list(zip(prompts, caches, strict=True)))
            kernels = runtime.weights.products._fp8  # type: ignore[union-attr]
            assert isinstance(kernels, PlainKernels)
            kernels.rows.clear()
            read.clear()
            run([([7], cache) for cache in caches])
            rows.append(Counter(kernels.rows))
            assert max(read.values()) == 1
    # two layers, four projections: both of the queries, the latents', the outputs'; only experts are in int4
    attention = 2 * 4 if path.name == "fp8" else 0
    shared = rows[0][1] - attention
    assert shared > 0
    assert rows[1] == +Counter({1: 2 * attention, 2: shared})


def test_dequantize_refuses_the_kernels(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = PlainKernels()
    monkeypatch.setattr(Products, "of", lambda *_: Products(kernels, kernels))
    found = {}
    for dequantize in (False, True):
        with Runtime(path, device="cpu", dtype="bf16", dequantize=dequantize) as runtime:
            assert runtime.weights.multiplies_stored is not dequantize
            found[dequantize] = runtime.prefill(PROMPTS[0], runtime.model.new_cache())
    monkeypatch.undo()
    with Runtime(path, device="cpu", dtype="bf16") as runtime:
        assert torch.equal(found[True], runtime.prefill(PROMPTS[0], runtime.model.new_cache()))


def test_a_gpu_whose_memory_runs_out_is_a_device_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the thread that computes, or in a reader's, where a copy fails."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.50 GiB.\nmore")

    monkeypatch.setattr(Packed, "read", fail)
    with (
        opened(path) as runtime,
        pytest.raises(DeviceError, match=r"3\.50 GiB\.\nName a smaller --gpu-memory") as raised,
    ):
        runtime.generate(PROMPTS[0], max_new_tokens=1)
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_dequantized_logits_are_those_of_the_cast(path: Path, tmp_path: Path) -> None:
    write(cast(open_checkpoint(path), "bf16"), tmp_path / "bf16", device="cpu", progress=False)
    found = []
    for source in (path, tmp_path / "bf16"):
        with Runtime(source, device="cuda", dequantize=True) as runtime:
            found.append(runtime.prefill(PROMPTS[0], runtime.model.new_cache()).cpu())
    assert torch.equal(*found)


def test_what_all_weights_need_is_what_they_take_as_stored(path: Path) -> None:
    with opened(path, host_memory=1 << 30, jobs=1) as runtime:
        runtime.plan(PROMPTS[:1], max_new_tokens=2, measure=False)
        assert runtime._budget is not None
        assert runtime.weights.packed_bytes < runtime.weights.sizes.dense
        least = runtime._budget.working + runtime.weights.packed_bytes
    with opened(path, stream=False, host_memory=least, jobs=1) as runtime:
        plan = runtime.plan(PROMPTS[:1], max_new_tokens=2, measure=False)
        assert "as stored, and multiplied with so; " in plan.render()
        assert not plan.is_streamed
    with (
        opened(path, stream=False, host_memory=least - 1, jobs=1) as runtime,
        pytest.raises(SpaceError, match="not to be streamed"),
    ):
        runtime.plan(PROMPTS[:1], max_new_tokens=2, measure=False)


def test_products_of_experts_at_once_are_counted(path: Path) -> None:
    with Runtime(path, device="cpu", dtype="bf16") as dense, opened(path) as stored:
        for runtime in (dense, stored):
            runtime.plan(PROMPTS, max_new_tokens=2)
        more = stored._budget.working - dense._budget.working  # type: ignore[union-attr]
        reserved = stored._reserved
        assert reserved is not None
        rows = min(2 * reserved, 2048)  # two experts a token
        assert more == grouped_bytes(stored.model.arch, 2, reserved) == rows * (144 * (2 * 2 + 8) + 4 * 128 * 2)
