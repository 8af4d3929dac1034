"""An engine that is the CPU until the GPU is ready: when it changes over, what becomes of failures, and who waits."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import V3, V3_INT4, write_tiny

import weightkit as wk
from weightkit.checkpoint.reading import Bytes
from weightkit.checkpoint.tensors import BlockQuantized, Cast, Dequantized, LazyTensor, Stored, size_bytes
from weightkit.compute import CpuEngine, Engine, StartingEngine, evaluate, start_engine, starting
from weightkit.compute.engines import DeviceName, Scales
from weightkit.compute.trial import MadeUp
from weightkit.errors import DeviceError
from weightkit.layouts import lay_out_published
from weightkit.transforms import cast_to_fp8
from weightkit.writer import make_plan

Say = Callable[[str], None]


def fp8(rows: int, columns: int) -> Dequantized:
    scale = Stored("b", 0, "F32", (-(-rows // 128), -(-columns // 128)))
    return Dequantized(Stored("a", 0, "F8_E4M3", (rows, columns)), scale, "BF16")


LARGE = [fp8(2048, 2048)] * 4096  # 34 GB of BF16


def test_the_cpu_until_the_gpu_is_ready() -> None:
    ready, gpu = threading.Event(), CpuEngine()

    def open_gpu(say: Say) -> Engine:
        assert ready.wait(60)
        return gpu

    engine = StartingEngine(open_gpu, required=True)
    first = engine.now()
    assert isinstance(first, CpuEngine)
    assert first is not gpu
    assert engine.now() is first
    ready.set()
    engine.wait()
    assert engine.now() is gpu


def broken(say: Say) -> Engine:
    raise RuntimeError("driver too old\nand more")


def test_a_gpu_that_was_asked_for_and_fails_is_an_error_at_the_next_use() -> None:
    engine = StartingEngine(broken, required=True)
    engine.wait()
    for _ in range(2):
        with pytest.raises(DeviceError, match="RuntimeError: driver too old") as raised:
            engine.now()
        assert isinstance(raised.value.__cause__, RuntimeError)
        assert "and more" not in str(raised.value)


@pytest.mark.parametrize("before", [True, False])
def test_a_gpu_that_fails_under_auto_is_told_once(before: bool) -> None:
    fail, told = threading.Event(), list[str]()

    def open_gpu(say: Say) -> Engine:
        fail.wait(60)
        return broken(say)

    engine = StartingEngine(open_gpu, required=False)
    if before:
        engine.tell(told.append)
    fail.set()
    engine.wait()
    engine.tell(told.append) if not before else None
    assert isinstance(engine.now(), CpuEngine)
    assert isinstance(engine.now(), CpuEngine)
    assert told == [
        "The GPU cannot be used (RuntimeError: driver too old). The CPU computes; the bytes are the same.",
    ]


class SomeGpus(CpuEngine):
    """GPUs of which some are broken."""

    broken: set[int]

    def __init__(self, devices: Sequence[int]) -> None:
        super().__init__()
        self.devices = list(devices)

    def dequantize(self, weight: Bytes, scale: Scales, dtype: str) -> Bytes:
        if broken := self.broken & set(self.devices):
            raise DeviceError("the GPU failed", where=f"cuda:{min(broken)}", found="CUDA error: uncorrectable ECC")
        return super().dequantize(weight, scale, dtype)


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(starting, "count_gpus", lambda: 8)
    monkeypatch.setattr(starting, "_torch_lacks_cuda", lambda: False)
    monkeypatch.setattr(starting, "has_driver", lambda: True)
    monkeypatch.setattr(starting, "CudaEngine", SomeGpus)


@pytest.mark.usefixtures("eight_gpus")
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_one_broken_gpu_of_eight_is_told_and_left_out(device: DeviceName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SomeGpus, "broken", {3}, raising=False)
    engine, told = start_engine(device, LARGE), list[str]()
    assert isinstance(engine, StartingEngine)
    engine.wait()
    engine.tell(told.append)
    working = engine.now()
    assert isinstance(working, SomeGpus)
    assert working.devices == [0, 1, 2, 4, 5, 6, 7]
    assert told == [
        "GPU 3 cannot be used (the GPU failed: CUDA error: uncorrectable ECC). The others compute; the bytes"
        " are the same."
    ]


@pytest.mark.usefixtures("eight_gpus")
def test_eight_broken_gpus_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SomeGpus, "broken", set(range(8)), raising=False)
    engine, told = start_engine("auto", LARGE), list[str]()
    assert isinstance(engine, StartingEngine)
    engine.wait()
    engine.tell(told.append)
    assert not isinstance(engine.now(), SomeGpus)
    assert [message.partition(" (")[0] for message in told] == ["The GPU cannot be used"]


def test_none_is_no_failure() -> None:
    engine, told = StartingEngine(lambda say: None, required=False), list[str]()
    engine.tell(told.append)
    engine.wait()
    assert isinstance(engine.now(), CpuEngine)
    assert told == []


def test_cuda_without_a_gpu_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path / "source")
    checkpoint = wk.cast(wk.open_checkpoint(tmp_path / "source"), "bf16")
    monkeypatch.setattr(starting, "count_gpus", lambda: 0)
    with pytest.raises(DeviceError, match="no CUDA device is usable"):
        wk.write(checkpoint, tmp_path / "out", device="cuda", progress=False)
    monkeypatch.setattr(starting, "count_gpus", lambda: 1)
    monkeypatch.setattr(starting, "_torch_lacks_cuda", lambda: True)
    with pytest.raises(DeviceError, match="no CUDA device is usable"):
        wk.write(checkpoint, tmp_path / "out", device="cuda", progress=False)
    assert not (tmp_path / "out").exists()


def test_what_the_version_file_of_torch_says() -> None:
    assert starting._torch_lacks_cuda() == (torch.version.cuda is None)


def test_auto_starts_a_gpu_for_what_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = list[list[LazyTensor]]()
    monkeypatch.setattr(starting, "has_driver", lambda: True)
    monkeypatch.setattr(starting, "_open_any", lambda samples, say: opened.append(samples))
    assert isinstance(start_engine("auto", [fp8(7168, 2048)]), CpuEngine)
    assert isinstance(start_engine("cpu", LARGE), CpuEngine)
    assert isinstance(start_engine("auto", [Cast(Stored("a", 0, "BF16", (1 << 20, 1 << 20)), "F32")]), CpuEngine)
    engine = start_engine("auto", LARGE)
    assert isinstance(engine, StartingEngine)
    engine.wait()
    assert [[sample.shape for sample in samples] for samples in opened] == [[(2048, 2048)]]
    assert isinstance(start_engine("auto", [fp8(7168, 2048)], worth_bytes=0), StartingEngine)
    assert isinstance(start_engine("auto", [], worth_bytes=0), CpuEngine)
    monkeypatch.setattr(starting, "has_driver", lambda: False)
    assert isinstance(start_engine("auto", LARGE), CpuEngine)


@pytest.mark.parametrize("kind", ["bf16", "f32", "fp8", "gptq", "shard"])
def test_samples_can_be_computed(kind: str, tmp_path: Path) -> None:
    write_tiny(tmp_path / "source", replace(V3_INT4 if kind == "gptq" else V3, layers=2, mtp_layers=0))
    opened = wk.open_checkpoint(tmp_path / "source")
    if kind == "fp8":
        opened = wk.cast(opened, "bf16")
        wk.write(opened, tmp_path / "bf16", device="cpu", progress=False)
        made = lay_out_published(cast_to_fp8(wk.open_checkpoint(tmp_path / "bf16")))
    elif kind == "shard":
        made = wk.shard(wk.cast(opened, "bf16"), mp=2)
    else:
        made = lay_out_published(wk.cast(opened, "f32" if kind == "f32" else "bf16"))
    computed = make_plan(made, tmp_path / "out").computed
    samples = starting._samples(filter(starting.has_kernel, computed))
    assert 1 <= len(samples) <= 12
    for sample in samples:
        assert len(evaluate(sample, MadeUp(), CpuEngine())) == size_bytes(sample)


@pytest.mark.parametrize("first", ["codes", "scales"])
def test_codes_and_their_scales_are_of_one_kind(first: str) -> None:
    source = Stored("a", 0, "BF16", (2048, 2048))
    made = [
        BlockQuantized(source, scales=scales, power_of_two=False) for scales in (first == "scales", first != "scales")
    ]
    other = BlockQuantized(source, scales=False, power_of_two=True)
    assert len(starting._samples(made)) == 1
    assert len(starting._samples([*made, other])) == 2


def test_an_exit_waits_for_no_more_than_a_step() -> None:
    code = """
import time
from weightkit.compute import starting
def open_gpu(say):
    while True:
        time.sleep(0.1)
        starting._require_wanted()
starting.StartingEngine(open_gpu, required=False)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
