"""A GPU that fails at its work: the CPU goes on where nobody insists on the GPU, and the bytes are the same."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from folders import tree
from tiny import V3, write_tiny

import weightkit as wk
from weightkit.checkpoint.reading import Bytes
from weightkit.compute import CpuEngine, StartingEngine
from weightkit.compute.engines import Scales, Started
from weightkit.durable import STATE_DIR
from weightkit.errors import DeviceError
from weightkit.layouts import lay_out_published
from weightkit.writer import execute, executor, make_plan
from weightkit.writer.plan import Plan


class Breaks(CpuEngine):
    """A GPU that computes so many strips, and none after that."""

    def __init__(self, strips: int) -> None:
        super().__init__()
        self.strips, self.asked = strips, itertools.count()

    def start_dequantize(self, weight: Bytes, scale: Scales, dtype: str) -> Started:
        if next(self.asked) >= self.strips:
            raise DeviceError("the GPU failed", where="cuda:0", found="CUDA error: an illegal memory access")
        return super().start_dequantize(weight, scale, dtype)


class Bar(executor.ProgressBar):
    """Keeps what is added and told."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options | {"shown": False})  # type: ignore[arg-type]
        self.added, self.most, self.lines = 0, 0, list[str]()
        self.adding = threading.Lock()
        bars.append(self)

    def add(self, count: int = 1) -> None:
        with self.adding:
            self.added += count
            self.most = max(self.most, self.added)

    def tell(self, text: str) -> None:
        self.lines.append(text)


bars: list[Bar] = []


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setattr(executor, "ProgressBar", Bar)
    bars.clear()
    write_tiny(tmp_path / "source", replace(V3, layers=3, dense_layers=1, mtp_layers=0))
    return make_plan(lay_out_published(wk.cast(wk.open_checkpoint(tmp_path / "source"), "bf16")), tmp_path / "out")


def starting(strips: int, *, required: bool) -> StartingEngine:
    engine = StartingEngine(lambda say: Breaks(strips), required=required)
    engine.wait()
    return engine


@pytest.mark.parametrize("strips", [0, 1, 7])
@pytest.mark.parametrize("jobs", [1, 3])
def test_the_cpu_goes_on(planned: Plan, tmp_path: Path, strips: int, jobs: int) -> None:
    execute(planned, engine=starting(strips, required=False), jobs=jobs)
    (bar,) = bars
    assert bar.lines == [
        "The GPU is given up (the GPU failed: CUDA error: an illegal memory access). The CPU goes on; the bytes"
        " are the same."
    ]
    assert (bar.added, bar.most) == (planned.bytes_written, planned.bytes_written)
    found = tree(planned.target)
    execute(planned, force=True)
    assert tree(planned.target) == found


def test_a_gpu_that_was_asked_for_is_an_error_and_the_next_run_continues(planned: Plan) -> None:
    with pytest.raises(DeviceError, match="illegal memory access"):
        execute(planned, engine=starting(7, required=True), jobs=1)
    assert (planned.target / STATE_DIR).exists()
    execute(planned, engine=CpuEngine(), jobs=1)
    found = tree(planned.target)
    execute(planned, force=True)
    assert tree(planned.target) == found
