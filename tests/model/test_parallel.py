"""The forward pass divided among ranks against the whole one: ranks are threads here, processes in the room above."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_checkpoint import write_small
from tiny import KIMI, MOONLIGHT, V3, V3_INT4, Tiny, write_tiny
from transformers_oracle import V2_LITE

from weightkit import manifests
from weightkit.checkpoint import Checkpoint, Reader
from weightkit.checkpoint.tensors import stored_parts
from weightkit.compute import CpuEngine, evaluate
from weightkit.errors import PlanError
from weightkit.layouts import open_checkpoint, rank_share
from weightkit.layouts.declare import architecture_of
from weightkit.model import Model, Parallel, TensorWeights
from weightkit.ranks.ranks import Ranks
from weightkit.transforms import cast, shard
from weightkit.writer import write


class Meeting:
    """Where the threads of one run meet."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=300)
        self.held: list[torch.Tensor] = [torch.empty(0)] * size


class ThreadRanks(Ranks):
    """Ranks that are threads of one process."""

    def __init__(self, rank: int, meeting: Meeting) -> None:
        super().__init__(rank, len(meeting.held))
        self.meeting = meeting

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.meeting.held[self.rank] = tensor
        self.meeting.barrier.wait()
        found = [part.clone() for part in self.meeting.held]
        self.meeting.barrier.wait()
        return found

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(torch.stack(self.gather(tensor)).sum(dim=0))


def on_ranks(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What ``work`` returns on each of ``size`` ranks."""
    meeting = Meeting(size)

    def run(rank: int) -> Any:
        try:
            with torch.inference_mode():
                return work(ThreadRanks(rank, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@pytest.fixture(autouse=True)
def one_thread_a_rank() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_memory(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> TensorWeights:
    """The tensors of a cast checkpoint, evaluated."""
    engine, tensors = CpuEngine(), {}
    with Reader() as reader:
        for name, lazy in checkpoint.tensors.items():
            values = torch.from_numpy(np.array(evaluate(lazy, reader, engine)))
            stored = {"BF16": torch.bfloat16, "F32": torch.float32}[lazy.dtype]
            tensors[name] = values.view(stored).view(lazy.shape).to(dtype)
    return TensorWeights(tensors)


def greedy(model: Model, prompt: list[list[int]], count: int) -> tuple[torch.Tensor, list[int]]:
    """Logits after the prompt [batch, seq], and ``count`` tokens that follow its first sequence, through the cache."""
    cache, tokens = model.new_cache(), []
    logits = after_prompt = model(torch.tensor(prompt), cache)
    for _ in range(count):
        tokens.append(int(logits[0, -1].argmax()))
        logits = model(torch.tensor([[tokens[-1]]] * len(prompt)), cache)
    return after_prompt, tokens


def tiny(model: Tiny) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write_tiny(folder, model)
        return folder

    return make


def small(**options: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write_small(folder, fp8=False, **options)
        return folder

    return make


def pico(_: Path) -> Path:
    path = manifests.load("pico").path
    assert path is not None
    return path


#: The form, how it is made, and the degrees that are tried.
CASES = {
    "pico-fp8": (pico, (2, 8)),
    "bf16": (small(), (2, 4)),
    "v2-lite": (small(**V2_LITE), (2, 4)),
    "tied": (small(tie_word_embeddings=True), (2,)),
    "tiny-fp8": (tiny(V3), (4,)),
    "int4": (tiny(V3_INT4), (4,)),
    "kimi": (tiny(KIMI), (2,)),
    "moonlight": (tiny(MOONLIGHT), (4,)),
}


@pytest.mark.parametrize("case", CASES)
def test_ranks_give_the_logits_and_tokens_of_one_process(case: str, tmp_path: Path) -> None:
    make, degrees = CASES[case]
    checkpoint = cast(open_checkpoint(make(tmp_path / "model")), "bf16")
    arch = architecture_of(checkpoint)
    ids = torch.randint(0, arch.vocab_size, (2, 9), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.inference_mode():
        expected, tokens = greedy(Model(arch, in_memory(checkpoint)), ids, 8)
    for size in degrees:

        def work(ranks: Ranks, size: int = size) -> tuple[torch.Tensor, list[int]]:
            weights = in_memory(rank_share(checkpoint, ranks.rank, size))
            return greedy(Model(arch, weights, parallel=Parallel(ranks)), ids, 8)

        found = on_ranks(size, work)
        for logits, continued in found:
            assert torch.equal(logits, found[0][0])  # not nearly: a rank of its own opinion would leave the others
            assert continued == tokens
        assert float((found[0][0] - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


def test_in_bf16_partial_sums_are_added_in_f32(tmp_path: Path) -> None:
    checkpoint = cast(open_checkpoint(small()(tmp_path / "model")), "bf16")
    arch = architecture_of(checkpoint)
    ids = [[5, 6, 7, 8, 9, 10]]
    with torch.inference_mode():
        exact, _ = greedy(Model(arch, in_memory(checkpoint)), ids, 0)
        alone, _ = greedy(Model(arch, in_memory(checkpoint, torch.bfloat16)), ids, 0)
    seen: list[torch.dtype] = []

    def work(ranks: Ranks) -> torch.Tensor:
        weights = in_memory(rank_share(checkpoint, ranks.rank, 4), torch.bfloat16)
        added = ranks.sum
        ranks.sum = lambda tensor: seen.append(tensor.dtype) or added(tensor)  # type: ignore[method-assign,func-returns-value]
        return greedy(Model(arch, weights, parallel=Parallel(ranks)), ids, 0)[0]

    found = on_ranks(4, work)[0]
    assert set(seen) == {torch.float32}
    # two roundings for one: not far beyond the error that BF16 has anyway
    assert float((found - exact).abs().max()) < 2 * float((alone - exact).abs().max())


def files_read(checkpoint: Checkpoint) -> set[str]:
    return {Path(part.path).name for lazy in checkpoint.tensors.values() for part in stored_parts(lazy)}


@pytest.mark.parametrize("form", ["fp8", "int4", "ep"])
def test_of_rank_files_each_rank_needs_its_own_whole_and_no_other(form: str, tmp_path: Path) -> None:
    write_tiny(tmp_path / "model", V3_INT4 if form == "int4" else V3)
    kind = {"ep": 4} if form == "ep" else {"mp": 4}
    write(shard(open_checkpoint(tmp_path / "model"), **kind), tmp_path / "ranks", progress=False)
    for rank in range(4):
        checkpoint = cast(open_checkpoint(tmp_path / "ranks", replicas_of=rank), "bf16")
        share = rank_share(checkpoint, rank, 4)
        file = f"model{rank}-{next(iter(kind))}4.safetensors"
        assert files_read(share) == {file}
        if form == "ep":
            continue  # what every file holds whole is cut
        # all of it: where bytes follow each other without a gap, ranges as long as the data are the data
        ranges = {(part.offset, part) for lazy in share.tensors.values() for part in stored_parts(lazy)}
        end = min(offset for offset, _ in ranges)
        itemsize = {"F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4}
        for offset, part in sorted(ranges, key=lambda item: item[0]):
            assert offset == end
            end += int(np.prod(part.shape)) * itemsize[part.dtype]
        assert end == (tmp_path / "ranks" / file).stat().st_size


def test_of_the_published_layout_ranks_read_what_their_files_would_hold(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model", V3)
    checkpoint = cast(open_checkpoint(tmp_path / "model"), "bf16")
    shares = [rank_share(checkpoint, rank, 4) for rank in range(4)]
    experts = [{name for name in share.tensors if ".experts." in name} for share in shares]
    assert sum(map(len, experts)) == len(set().union(*experts)) == 2 * 8 * 3
    assert not any(".layers.3." in name for share in shares for name in share.tensors)  # the MTP layer
    assert shares[1]["model.layers.0.self_attn.o_proj.weight"].shape == (144, 128)
    assert shares[1]["lm_head.weight"].shape == (16, 144)


def test_an_illegal_degree_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model", V3)
    with pytest.raises(PlanError, match="cannot be split over 3 ranks"):
        rank_share(open_checkpoint(tmp_path / "model"), 0, 3)
