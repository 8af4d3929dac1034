"""Weights that do not fit: the same values from any budgets, budgets that are held to, and a true account."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_checkpoint import computed_tensors, write_small
from tiny import V3, V3_INT4, write_tiny

from weightkit.checkpoint.direct import DirectReader, measure_read_rate
from weightkit.checkpoint.tensors import size_bytes, stored_parts
from weightkit.errors import FormatError, GenerationError, MissingTensorError, SpaceError
from weightkit.layouts import open_checkpoint
from weightkit.model import CheckpointWeights, streamed
from weightkit.model.memory import Arena
from weightkit.model.packed import Packed
from weightkit.model.stores import Resident
from weightkit.model.streamed import Streamed
from weightkit.transforms import cast, shard
from weightkit.writer import write

BUDGETS = [(0, 0), (0, 300_000), (150_000, 0), (150_000, 120_000), (400_000, 400_000), (1 << 30, 0)]
FORMS = ("fp8", "bf16", "int4", "mp2", "bf16-mp2")


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("streamed")
    small = replace(V3, mtp_layers=0)
    write_tiny(folder / "fp8", small)
    write_tiny(folder / "int4", replace(V3_INT4, mtp_layers=0))
    source = open_checkpoint(folder / "fp8")
    write(cast(source, "bf16"), folder / "bf16")
    write(shard(source, mp=2), folder / "mp2")
    write(shard(cast(source, "bf16"), mp=2), folder / "bf16-mp2")
    return {form: folder / form for form in FORMS}


def always_of(path: Path, layer: int) -> list[str]:
    """The weights of a layer that every token needs."""
    names = cast(open_checkpoint(path), "bf16").tensors
    return [name for name in names if f".layers.{layer}." in name and ".experts." not in name]


def walk(weights: CheckpointWeights, names: Sequence[str], seed: int) -> list[tuple[str, torch.Tensor]]:
    """Ask for weights as a model does: announced a few at a time, used whole, multiplied with, some never used."""
    draw, found = random.Random(seed), []
    for _ in range(40):
        some = draw.sample(names, 12)
        weights.upcoming(draw.sample(names, 3))
        weights.prefetch(some)
        found += [(name, weights.get(name)) for name in some[: draw.randrange(13)]]
    return found


@pytest.mark.parametrize("form", FORMS)
def test_values_do_not_depend_on_memory(forms: dict[str, Path], form: str) -> None:
    checkpoint = open_checkpoint(forms[form])
    with CheckpointWeights(checkpoint, device="cpu") as whole:
        names = [name for layer in range(3) for name in always_of(forms[form], layer)]
        names += [f"model.layers.2.mlp.experts.{n}.{m}_proj.weight" for n in range(8) for m in ("gate", "up", "down")]
        expected = {name: whole.get(name) for name in names}
        assert whole.is_resident
    for memory_bytes, host_bytes in BUDGETS:
        with (
            CheckpointWeights(
                checkpoint, device="cpu", memory_bytes=memory_bytes, host_bytes=host_bytes, stream=True, jobs=3
            ) as weights,
            torch.inference_mode(memory_bytes == 150_000),
        ):
            for name, tensor in walk(weights, names, seed=memory_bytes):  # all still held: none was overwritten
                assert torch.equal(tensor, expected[name]), (name, memory_bytes, host_bytes)
            assert weights.kept_bytes <= memory_bytes
            assert weights.host_kept_bytes <= host_bytes


def test_products_are_those_of_the_whole_weight(forms: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightkit.model.stores.UNIT_BYTES", 128 * 144 * 2)  # rows of 144 in BF16: 128 a strip
    checkpoint = open_checkpoint(forms["bf16"])
    name = "model.layers.0.mlp.gate_proj.weight"
    x = torch.randn(5, 144)
    with CheckpointWeights(checkpoint, device="cpu", memory_bytes=0) as streamed:
        found, weight = streamed.linear(name, x), streamed.get(name)
    with CheckpointWeights(checkpoint, device="cpu") as resident:
        assert torch.equal(resident.get(name), weight)
        assert torch.equal(resident.linear(name, x), found)
    assert weight.shape == (512, 144)
    torch.testing.assert_close(found, x @ weight.T)


def experts_of(layer: int, numbers: Sequence[int]) -> list[str]:
    return [f"model.layers.{layer}.mlp.experts.{n}.{m}_proj.weight" for n in numbers for m in ("gate", "up", "down")]


def read_bytes(checkpoint_path: Path, names: Sequence[str]) -> int:
    """Bytes of files that the weights are made from."""
    tensors = cast(open_checkpoint(checkpoint_path), "bf16").tensors
    return sum(size_bytes(part) for name in names for part in stored_parts(tensors[name]))


def test_the_account_is_true(forms: dict[str, Path]) -> None:
    """Three experts on the device, three more in host memory; the rest is read again."""
    names = experts_of(1, range(8))
    one = read_bytes(forms["fp8"], names[:1])
    with CheckpointWeights(
        open_checkpoint(forms["fp8"]), device="cpu", memory_bytes=9 * 18_688, host_bytes=1 << 18, stream=True
    ) as weights:
        assert one == 18_440  # and its region a multiple of 256
        for name in names[:9]:
            weights.get(name)
        assert (weights.cache_use.misses, weights.bytes_read) == (9, 9 * one)
        for name in names[:9]:
            weights.get(name)
        assert (weights.cache_use.device_hits, weights.bytes_read) == (9, 9 * one)
        for name in names[9:15]:
            weights.get(name)
        assert (weights.cache_use.misses, weights.bytes_read) == (15, 15 * one)
        for name in names[:6]:  # left the device for the six before
            weights.get(name)
        assert weights.cache_use.host_hits == 6
        assert weights.bytes_read == 15 * one


def test_what_leaves_the_device_is_not_read_again(forms: dict[str, Path]) -> None:
    """Together the two memories hold all of it, alone neither does."""
    names = experts_of(1, range(8)) + experts_of(2, range(8))
    with CheckpointWeights(
        open_checkpoint(forms["fp8"]), device="cpu", memory_bytes=500_000, host_bytes=1 << 19, stream=True, jobs=1
    ) as weights:
        for _ in range(4):
            weights.prefetch(names)
            for name in names:
                weights.get(name)
        assert read_bytes(forms["fp8"], names) == weights.bytes_read
        assert max(weights.kept_bytes, weights.host_kept_bytes) < read_bytes(forms["fp8"], names)


def test_weights_that_every_token_needs_come_first(forms: dict[str, Path]) -> None:
    with CheckpointWeights(
        open_checkpoint(forms["fp8"]), device="cpu", memory_bytes=600_000, stream=True, jobs=1
    ) as weights:
        always = always_of(forms["fp8"], 1)
        for name in (*always, *experts_of(1, range(8)), *experts_of(2, range(8))):
            weights.get(name)
        before = weights.bytes_read
        for name in always:
            weights.get(name)
        assert weights.bytes_read == before


@pytest.mark.parametrize("stream", [True, False])
def test_closing_gives_memory_back_at_once(
    forms: dict[str, Path], stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when cycles are collected: on a GPU the next checkpoint would not fit beside it."""
    made: list[weakref.ref[torch.Tensor]] = []

    def noted(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make_noted(*arguments: object) -> torch.Tensor:
            tensor = make(*arguments)
            made.append(weakref.ref(tensor))
            return tensor

        return make_noted

    monkeypatch.setattr(Streamed, "_allocate_device", noted(Streamed._allocate_device))
    monkeypatch.setattr(Streamed, "_allocate_host", noted(Streamed._allocate_host))
    monkeypatch.setattr(Resident, "_load", noted(Resident._load))
    names = experts_of(1, range(4))
    budgets = {"memory_bytes": 400_000, "host_bytes": 400_000} if stream else {}
    gc.disable()
    try:
        with CheckpointWeights(
            open_checkpoint(forms["fp8"]), device="cpu", stream=stream, jobs=2, **budgets
        ) as weights:
            weights.prefetch(names)
            for name in names:
                weights.get(name)
            assert any(reference() is not None for reference in made)
        assert [reference() for reference in made if reference() is not None] == []
        assert (weights.kept_bytes, weights.host_kept_bytes) == (0, 0)
    finally:
        gc.enable()


class Queue:
    """Stands in for a GPU's queue of copies."""

    def __init__(self, events: list[str], failed: bool) -> None:
        self.events, self.failed = events, failed

    def synchronize(self) -> None:
        self.events.append("copies are done")
        if self.failed:
            raise RuntimeError("CUDA error: unspecified launch failure")


@pytest.mark.parametrize("failed", [False, True])
def test_closing_on_a_gpu_waits_for_copies_and_empties_torchs_caches(
    forms: dict[str, Path], failed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver says how much is free to the next checkpoint: torch's caches of freed memory do not count. A device
    that has failed hides nothing of it, nor what went wrong."""
    events: list[str] = []

    def empty_caches() -> None:
        events.append("caches are emptied")
        if failed:
            raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(streamed, "empty_caches", empty_caches)
    monkeypatch.setattr(Arena, "release", lambda arena: events.append("released"))
    with CheckpointWeights(
        open_checkpoint(forms["fp8"]), device="cpu", memory_bytes=400_000, host_bytes=400_000, stream=True
    ) as weights:
        weights.get(experts_of(1, [0])[0])
        store = weights._store
        assert isinstance(store, Streamed)
        store._on_gpu, store._queue = True, Queue(events, failed)  # type: ignore[assignment]
    assert events == ["copies are done", "released", "released", "caches are emptied"]


def test_a_read_that_failed_keeps_no_memory_once_closed(
    forms: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def allocate(self: Streamed, count: int) -> torch.Tensor:
        made.append(weakref.ref(tensor := torch.empty(count, dtype=torch.uint8)))
        return tensor

    def fail(*_: object) -> None:
        raise FormatError("the file ends early")

    monkeypatch.setattr(Streamed, "_allocate_host", allocate)
    monkeypatch.setattr(Packed, "read", fail)
    gc.disable()
    try:
        with CheckpointWeights(
            open_checkpoint(forms["fp8"]), device="cpu", memory_bytes=400_000, host_bytes=400_000, stream=True, jobs=1
        ) as weights:
            weights.prefetch(experts_of(1, [0]))
        assert weights.is_open
        assert made
        assert [reference() for reference in made if reference() is not None] == []
    finally:
        gc.enable()


def test_missing_and_damaged_weights_are_raised_where_they_are_used(tmp_path: Path) -> None:
    contents = write_tiny(tmp_path / "int4", V3_INT4)
    module = next(name.removesuffix(".qweight") for name in contents if name.endswith(".qweight"))
    checkpoint = open_checkpoint(tmp_path / "int4")
    part = next(stored_parts(checkpoint[f"{module}.g_idx"]))
    with Path(part.path).open("r+b") as file:
        file.seek(part.offset)
        file.write(b"\xff\xff\xff\x0f")
    checkpoint = open_checkpoint(tmp_path / "int4")
    with CheckpointWeights(checkpoint, device="cpu", memory_bytes=200_000, host_bytes=200_000, stream=True) as weights:
        weights.prefetch(["no.such.weight", f"{module}.weight", "model.norm.weight"])
        weights.get("model.norm.weight")
        with pytest.raises(MissingTensorError, match=r"no\.such\.weight"):
            weights.get("no.such.weight")
        for _ in range(2):
            with pytest.raises(Exception, match=r"g_idx|group"):
                weights.get(f"{module}.weight")
        assert weights.kept_bytes <= 512


def test_streaming_may_be_refused(forms: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(forms["fp8"])
    with CheckpointWeights(checkpoint, device="cpu", stream=False) as weights:
        weights.limit(weights.sizes.dense, 0)
        assert weights.is_resident
        weights.limit(weights.sizes.dense - 1, 0)  # then as they are stored, which is less
        assert not weights.is_resident
        assert not weights.is_streamed
        with pytest.raises(SpaceError, match=r"expected room for .* found 100\.0 kB"):
            weights.limit(100_000, 0)
    with CheckpointWeights(checkpoint, device="cpu") as weights:
        weights.get("model.norm.weight")
        with pytest.raises(GenerationError, match="in use already"):
            weights.limit(1, 1)


def test_sizes_are_those_of_what_generation_needs(tmp_path: Path) -> None:
    stored = write_small(tmp_path)
    values = computed_tensors(stored)
    used = {name for name in values if not name.startswith("model.embed_tokens")}
    with CheckpointWeights(open_checkpoint(tmp_path), device="cpu") as weights:
        assert weights.sizes.dense == sum(values[name].nbytes for name in used)
        experts = sum(stored[name].nbytes for name in stored if ".experts." in name)
        assert experts <= weights.sizes.experts < experts * 1.01
        assert weights.sizes.expert_layers == len({name.split(".")[2] for name in stored if ".experts." in name})


DRIVER = """
import ctypes, gc, json, resource, sys
from pathlib import Path
from weightkit.layouts import open_checkpoint
from weightkit.model import CheckpointWeights
from weightkit.model.stores import Resident
from weightkit.model.streamed import Streamed
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
path, device_bytes, host_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def opened():
    return CheckpointWeights(open_checkpoint(path), device="cpu", memory_bytes=device_bytes, host_bytes=host_bytes,
                             stream=True, jobs=2)
names = [n for n in open_checkpoint(path).tensors if ".layers." in n and ".experts." not in n and n.endswith("weight")]
experts = [f"model.layers.{l}.mlp.experts.{n}.{m}_proj.weight" for l in (1, 2) for n in range(16)
           for m in ("gate", "up", "down")]
warm = opened()
for name in names:
    warm.get(name)  # compiles, starts threads
warm.close()
del warm
gc.collect()
ctypes.CDLL(None).malloc_trim(0)  # what was freed would hide what comes
weights = opened()
before = most = resident()
for _ in range(2):
    for start in range(0, len(experts), 24):
        weights.prefetch(experts[start : start + 24])
        for name in experts[start : start + 24]:
            weights.get(name)
            most = max(most, resident())
print(json.dumps({"grown": most - before, "read": weights.bytes_read}))
"""


def test_memory_grows_by_no_more_than_the_budgets(tmp_path: Path) -> None:
    wide = replace(V3, hidden=1024, moe=512, experts=16, mtp_layers=0, intermediate=512)  # 50 MB of experts
    write_tiny(tmp_path / "wide", wide)
    grown = {}
    for device_bytes, host_bytes in ((6 << 20, 8 << 20), (32 << 20, 0)):
        arguments = [str(tmp_path / "wide"), str(device_bytes), str(host_bytes)]
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, *arguments],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"},
        )  # tensors go back when freed
        found = json.loads(done.stdout)
        assert found["read"] > 50e6
        grown[device_bytes + host_bytes] = found["grown"]
    slack = 12 << 20  # readers' pieces of 4 MiB, one weight of 2 MiB dequantized
    assert all(found <= budget + slack for budget, found in grown.items()), grown
    assert grown[32 << 20] > 16 << 20  # else this measures nothing


@pytest.mark.parametrize("direct", [True, False])
def test_direct_reads_give_the_bytes_of_the_file(tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not direct:
        monkeypatch.setattr("weightkit.checkpoint.direct.open_direct", lambda file: None)
    content = random.Random(0).randbytes(9_000_001)
    path = tmp_path / "file"
    path.write_bytes(content)
    with DirectReader() as reader:
        for offset, count in ((0, 9_000_001), (1, 4 << 20), (4095, 5_000_000), (8_700_000, 300_001), (77, 100)):
            out = np.zeros(count, np.uint8)
            reader.read_range(str(path), offset, out)
            assert out.tobytes() == content[offset : offset + count]
        assert reader.bytes_read == 9_000_001 + (4 << 20) + 5_000_000 + 300_001 + 100
        with pytest.raises(Exception, match="ends early"):
            reader.read_range(str(path), 8_500_000, np.zeros(600_000, np.uint8))


def test_read_rate_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by a second whenever it is looked at: the start, before each of four reads, after each
    of two threads' last, and at the end."""
    for name, size in (("a", 1 << 20), ("b", 6 << 20), ("empty", 0)):
        (tmp_path / name).write_bytes(bytes(size))
    sizes = {str(path): path.stat().st_size for path in tmp_path.iterdir()}
    clock = itertools.count()
    monkeypatch.setattr("weightkit.checkpoint.direct.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    read = measure_read_rate(sizes, seconds=5, jobs=2).bytes_per_s * 7
    assert round(read) in {(4 + 5 * larger) << 20 for larger in range(5)}
    with pytest.raises(ValueError, match="no file"):
        measure_read_rate({str(tmp_path / "empty"): 0})
