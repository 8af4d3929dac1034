"""The same bytes from the CPU, from GPUs, and from a write that changes over in the middle of a file."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folders import tree
from tiny import V3, V3_INT4, Tiny, write_tiny

import weightkit as wk
from weightkit.compute import CpuEngine, CudaEngine, Engine, StartingEngine, start_engine, starting
from weightkit.layouts import lay_out_published
from weightkit.transforms import cast_to_fp8
from weightkit.writer import execute, make_plan, stream
from weightkit.writer import pieces as cutting
from weightkit.writer.plan import Plan

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

#: Some 20 MB of FP8, rows that are no multiple of 128 among them.
MODERATE: Tiny = replace(V3, hidden=1152, vocab=512, intermediate=1100, moe=512, experts=4, top_k=2)


class After:
    """The CPU for the first strips of all files, then the GPUs."""

    def __init__(self, count: int) -> None:
        self.left, self.cpu, self.gpu = [None] * count, CpuEngine(), CudaEngine(range(torch.cuda.device_count()))

    def now(self) -> Engine:
        try:
            self.left.pop()
        except IndexError:
            return self.gpu
        return self.cpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    write_tiny(folder / "fp8", MODERATE)
    write_tiny(folder / "int4", V3_INT4)
    wk.write(wk.cast(wk.open_checkpoint(folder / "fp8"), "bf16"), folder / "bf16", device="cpu", progress=False)
    return folder


def plan(folder: Path, source: str, to: str, target: Path) -> Plan:
    opened = wk.open_checkpoint(folder / source)
    return make_plan(lay_out_published(cast_to_fp8(opened) if to == "fp8" else wk.cast(opened, to)), target)


CASTS = [("fp8", "bf16"), ("fp8", "f16"), ("fp8", "f32"), ("bf16", "fp8"), ("int4", "bf16")]


@pytest.mark.parametrize(("source", "to"), CASTS)
def test_same_bytes(source: str, to: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "STRIP_BYTES", 256 << 10)
    monkeypatch.setattr(stream, "BUFFER_BYTES", 100 << 10)
    execute(plan(folder, source, to, tmp_path / "cpu"), engine=CpuEngine(), jobs=2, progress=False)
    expected = tree(tmp_path / "cpu")
    started = start_engine("cuda", plan(folder, source, to, tmp_path / "x").computed)
    assert isinstance(started, StartingEngine)
    execute(plan(folder, source, to, tmp_path / "hybrid"), engine=started, jobs=2, progress=False)
    started.wait(60)
    assert isinstance(started.now(), CudaEngine)
    execute(plan(folder, source, to, tmp_path / "gpu"), engine=started, jobs=2, progress=False)
    execute(plan(folder, source, to, tmp_path / "after"), engine=After(5), jobs=2, progress=False)
    for name in ("hybrid", "gpu", "after"):
        assert tree(tmp_path / name) == expected, name


def test_strips_of_full_size(folder: Path, tmp_path: Path) -> None:
    for name, engine in (("cpu", CpuEngine()), ("gpu", CudaEngine()), ("after", After(2))):
        execute(plan(folder, "fp8", "bf16", tmp_path / name), engine=engine, progress=False)
    assert tree(tmp_path / "cpu") == tree(tmp_path / "gpu") == tree(tmp_path / "after")


def test_the_driver_counts_as_torch_does() -> None:
    assert starting.count_gpus() == torch.cuda.device_count()
    assert not starting._torch_lacks_cuda()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_threads_are_dealt_out_over_the_gpus() -> None:
    engine, found = CudaEngine(range(torch.cuda.device_count())), list[int]()
    for _ in range(torch.cuda.device_count()):
        thread = threading.Thread(target=lambda: found.append(engine._lane().device.index))
        thread.start()
        thread.join()
    assert sorted(found) == list(range(torch.cuda.device_count()))
