"""Strips that a device computes while the next is read: their order, their bytes, and what failures leave."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from folders import tree
from tiny import V3, write_tiny

import weightkit as wk
from weightkit.checkpoint.reading import Bytes, Reader
from weightkit.compute import CpuEngine, Engine, Started
from weightkit.compute.engines import Scales
from weightkit.errors import DeviceError
from weightkit.layouts import lay_out_published
from weightkit.layouts.ranks import lay_out_ranks
from weightkit.transforms import cast_to_fp8
from weightkit.writer import execute, files, make_plan, stream
from weightkit.writer import pieces as cutting

SMALL = replace(V3, layers=2, mtp_layers=0)


class Device(CpuEngine):
    """Computes on the CPU, and lets nobody have the bytes but as a GPU does.

    Args:
        fail_at: the number of the strip whose bytes cannot be had.
    """

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.fail_at = fail_at
        self.events: list[str] = []
        self.pinned = self.undone = 0

    def now(self) -> Device:
        return self

    def start_dequantize(self, weight: Bytes, scale: Scales, dtype: str) -> Started:
        return self.defer(self.dequantize(weight, scale, dtype))

    def start_quantize_blocks(
        self, values: Bytes, shape: tuple[int, int], dtype: str, power_of_two: bool
    ) -> tuple[Started, Started]:
        codes, scales = self.quantize_blocks(values, shape, dtype, power_of_two)
        started = self.defer(codes)
        return started, Deferred(self, None, scales.reshape(-1).view(np.uint8))

    def result(self, data: Bytes) -> Bytes:
        """In the scratch that holds what is computed at once, as a GPU's results do."""
        for purpose in ("dequantized", "quantized"):
            out = self.buffer(purpose, len(data))
            out[:] = data
        return out

    def defer(self, data: Bytes) -> Deferred:
        number = sum(event.startswith("start") for event in self.events)
        self.events.append(f"start {number}")
        return Deferred(self, number, data.copy())


class Deferred:
    is_here = False

    def __init__(self, device: Device, number: int | None, data: Bytes) -> None:
        self.device, self.number, self.data = device, number, data

    def bytes(self) -> Bytes:
        self.land()
        return self.device.result(self.data)

    def copy_to(self, start: int, out: Bytes) -> None:
        self.land()
        out[:] = self.data[start : start + len(out)]

    def land(self) -> None:
        if self.number is None:
            return  # scales come with codes
        if self.number == self.device.fail_at:
            raise DeviceError("the GPU failed", where="cuda:0")
        if self.device.events[-1] != (event := f"land {self.number}"):
            self.device.events.append(event)

    def pin(self, memory: Bytes) -> Callable[[], None]:
        assert len(memory) == stream.BUFFER_BYTES * stream.BUFFERS
        self.device.pinned += 1

        def undo() -> None:
            self.device.undone += 1

        return undo


class After:
    """The CPU for the first strips, then another engine."""

    def __init__(self, count: int, engine: Engine | None) -> None:
        self.count, self.engine, self.cpu = count, engine, CpuEngine()

    def now(self) -> Engine:
        self.count -= 1
        if self.count >= 0:
            return self.cpu
        if self.engine is None:
            raise DeviceError("the GPU cannot be used", where="--device")
        return self.engine


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("overlap") / "fp8"
    write_tiny(folder, SMALL, shards=2)
    wk.write(wk.cast(wk.open_checkpoint(folder), "bf16"), folder.with_name("bf16"), device="cpu", progress=False)
    return folder


@pytest.fixture(scope="module")
def expected(source: Path) -> dict[str, bytes]:
    """The source in BF16, as the CPU alone makes it."""
    return tree(source.with_name("bf16"))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "STRIP_BYTES", 64 << 10)
    monkeypatch.setattr(stream, "BUFFER_BYTES", 20 << 10)


def run(source: Path, to: str, target: Path, engine: object) -> dict[str, bytes]:
    if to == "fp8":
        made = cast_to_fp8(wk.open_checkpoint(source.with_name("bf16")))
    else:
        made = wk.cast(wk.open_checkpoint(source), to)
    execute(make_plan(lay_out_published(made), target), engine=engine, jobs=1, progress=False)  # type: ignore[arg-type]
    return tree(target)


@pytest.mark.parametrize(
    ("to", "cpu_first"), [("bf16", 0), ("bf16", 7), ("f16", 3), ("f32", 1), ("fp8", 0), ("fp8", 5)]
)
def test_same_bytes_whenever_the_device_takes_over(to: str, cpu_first: int, source: Path, tmp_path: Path) -> None:
    device = Device()
    assert run(source, to, tmp_path / "out", After(cpu_first, device)) == run(source, to, tmp_path / "cpu", CpuEngine())
    landed = [event for event in device.events if event.startswith("land")]
    assert len(landed) * 2 == len(device.events) > 20
    assert landed == [f"land {number}" for number in range(len(landed))]
    assert device.pinned == device.undone
    assert (device.pinned > 0) == (to != "f16")  # whose values are looked at first


def test_what_is_there_already_outlives_what_was_begun_before_it(source: Path, tmp_path: Path) -> None:
    """Values of F16 are looked at in the scratch in which those of ranks' parts that cut blocks lie."""
    fileset = lay_out_ranks(wk.cast(wk.open_checkpoint(source), "f16"), 8)
    made = []
    for engine in (CpuEngine(), Device()):
        target = tmp_path / type(engine).__name__
        execute(make_plan(fileset, target), engine=engine, jobs=1, progress=False)
        made.append(tree(target))
    assert made[0] == made[1]


def begun_at_once(events: list[str]) -> list[int]:
    """How many strips are begun and not landed, after each event."""
    return list(itertools.accumulate(1 if event.startswith("start") else -1 for event in events))


def test_the_next_strip_is_begun_before_one_is_waited_for(source: Path, tmp_path: Path) -> None:
    device = Device()
    run(source, "bf16", tmp_path / "out", device)
    begun = begun_at_once(device.events)
    assert max(begun) == 2
    assert begun.count(2) > len(begun) // 4
    assert begun[-1] == 0


def test_none_is_begun_early_from_a_spool(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its room is made by what was written."""
    monkeypatch.setattr(files, "SpoolingReader", Reader)
    device = Device()
    run(source, "bf16", tmp_path / "out", device)
    assert max(begun_at_once(device.events)) == 1


@pytest.mark.parametrize("fail_at", [0, 9])
def test_a_strip_that_fails_is_made_again(
    fail_at: int, source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    device = Device(fail_at)
    with pytest.raises(DeviceError, match="the GPU failed"):
        run(source, "bf16", tmp_path / "out", device)
    assert device.events.count(f"land {fail_at}") == 0
    assert device.pinned == device.undone
    assert run(source, "bf16", tmp_path / "out", Device()) == expected


def test_a_gpu_that_fails_to_start_ends_the_write_which_goes_on(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(DeviceError, match="the GPU cannot be used"):
        run(source, "bf16", tmp_path / "out", After(12, None))
    assert run(source, "bf16", tmp_path / "out", Device()) == expected
