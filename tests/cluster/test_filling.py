"""A task's engine and environment, without a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch  # noqa: F401 - what a GPU says comes out of it
from folders import tree
from tiny import V3, write_tiny

import weightkit as wk
from weightkit.checkpoint import Checkpoint
from weightkit.checkpoint.tensors import LazyTensor
from weightkit.cluster import filling
from weightkit.cluster.filling import NodeEngine, Order, Place, write_file
from weightkit.cluster.news import News
from weightkit.compute import CpuEngine, Engine, EngineSupply, Started, StartingEngine, starting
from weightkit.compute.engines import DeviceName
from weightkit.durable import only_writer
from weightkit.errors import DeviceError, Interrupted
from weightkit.layouts import lay_out_published
from weightkit.writer import make_plan
from weightkit.writer.plan import Plan


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "_engines", {})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("filling") / "source"
    write_tiny(folder, replace(V3, layers=2, mtp_layers=0))
    return wk.open_checkpoint(folder)


def planned(checkpoint: Checkpoint, target: Path) -> Plan:
    return make_plan(lay_out_published(checkpoint), target)


def orders(plan: Plan, **endpoints: str) -> Iterator[Order]:
    """Of each file, while this process holds the target."""
    plan.target.mkdir()
    with only_writer(plan.target) as hold:
        hold.announce()
        place = Place(plan.target, hold.name)
        for file in plan.files:
            yield Order(place, file, plan.target / file.name, None, plan.stamps, "auto", endpoints)


def show_a_gpu(monkeypatch: pytest.MonkeyPatch, opened: Callable[[Iterable[LazyTensor]], Engine]) -> None:
    """As if the driver showed one, and torch could start it as ``opened`` does."""
    monkeypatch.setattr(starting, "count_gpus", lambda: 1)
    monkeypatch.setattr(starting, "_torch_lacks_cuda", lambda: False)
    monkeypatch.setattr(starting, "_open", opened)


def wait(engine: EngineSupply) -> None:
    """Until it has started, or failed."""
    assert isinstance(engine, NodeEngine)
    if isinstance(engine._supply, StartingEngine):  # not yet failed
        engine._supply.wait(120)


def last_word(order: Order) -> News:
    """A task whose GPU failed may go on holding it; what it has said by then is all that it says."""
    return next(news for news in write_file(order) if news.error is not None or news.result)


def fill(order: Order) -> None:
    assert last_word(order).error is None


def test_one_engine_with_the_first_tasks_kernels_however_small(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, made = list[Iterable[LazyTensor]](), list[EngineSupply]()

    def open_any(samples: Iterable[LazyTensor], say: Callable[[str], None]) -> Engine:
        opened.append(samples)
        return CpuEngine()

    show_a_gpu(monkeypatch, open_any)
    plan = planned(wk.cast(source, "bf16"), tmp_path / "out")
    computed = [bool(file.computed) for file in plan.files]
    for order in orders(plan):
        fill(order)
        made.append(filling._engine(order))
    assert sum(computed) > 1
    engines = {id(engine) for engine, needed in zip(made, computed, strict=True) if needed}
    assert len(engines) == 1
    wait(made[computed.index(True)])
    assert [len(list(samples)) > 0 for samples in opened] == [True]
    wk.write(wk.cast(source, "bf16"), tmp_path / "here", device="cpu", progress=False)
    for file in plan.files:
        assert (tmp_path / "out" / file.name).read_bytes() == tree(tmp_path / "here")[file.name]


def test_none_for_copies(source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "start_engine", lambda *_, **__: pytest.fail("started"))
    for order in orders(planned(source, tmp_path / "out")):
        fill(order)


def test_a_failure_is_in_the_log(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def open_any(samples: Iterable[LazyTensor], say: Callable[[str], None]) -> Engine:
        raise RuntimeError("driver too old")

    show_a_gpu(monkeypatch, open_any)
    for order in orders(planned(wk.cast(source, "bf16"), tmp_path / "out")):
        fill(order)
    (engine,) = filling._engines.values()
    wait(engine)
    assert [engine.failure, engine.failure] == ["RuntimeError: driver too old"] * 2
    assert isinstance(engine.now(), CpuEngine)
    assert capsys.readouterr().err.count("The GPU cannot be used (RuntimeError: driver too old).") == 1


class Breaking(CpuEngine):
    def start_dequantize(self, *_: object) -> Started:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")


class BreakingSupply:
    def now(self) -> Engine:
        return Breaking()


@pytest.mark.parametrize(("device", "waits"), [("cuda", 3), ("auto", 0)])
def test_a_task_keeps_its_broken_gpu_until_the_run_is_over(
    device: DeviceName, waits: int, source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would give it to the next. Under ``auto`` the CPU takes over, and the task may be tried again there."""
    monkeypatch.setattr(filling, "start_engine", lambda *_, **__: BreakingSupply())
    order = replace(next(orders(planned(wk.cast(source, "bf16"), tmp_path / "out"))), device=device)
    slept = list[float]()
    monkeypatch.setattr(filling, "time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setattr(filling, "is_held", lambda *_: len(slept) < 3)
    *_, last = write_file(order)
    assert isinstance(last.error, DeviceError)
    assert len(slept) == waits


def test_a_gpu_that_fails_on_the_way_is_not_asked_again(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch says is told as a ``DeviceError``; under ``auto`` the same process computes the file on its CPU."""
    monkeypatch.setattr(filling, "start_engine", lambda *_, **__: BreakingSupply())
    plan = planned(wk.cast(source, "bf16"), tmp_path / "out")
    told = list[str]()
    for order in orders(plan):
        for device in ("cuda", "auto", "auto", "cuda"):
            last = last_word(replace(order, device=device))
            told.append(f"{device} {last.error.found if last.error else bool(last.result)} {last.gpu_failure}")
        break
    why = "CUDA error: an illegal memory access was encountered"
    reason = f"the GPU failed: {why}"
    assert told == [f"cuda {why} {reason}", f"auto {why} {reason}", f"auto True {reason}", f"cuda {why} {reason}"]


def test_a_task_that_is_not_wanted_any_more_does_nothing(source: Checkpoint, tmp_path: Path) -> None:
    """One that begins when its run is over."""
    *_, order = orders(planned(source, tmp_path / "out"))
    (news,) = write_file(order)
    assert isinstance(news.error, Interrupted)
    assert not order.partial.exists()


def test_the_process_gets_its_environment_back(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[tuple[str | None, str | None]]()
    variables = ("HF_ENDPOINT", "AWS_REGION")

    def engine(order: Order) -> EngineSupply:
        seen.append((os.environ.get(variables[0]), os.environ.get(variables[1])))
        return CpuEngine()

    monkeypatch.setattr(filling, "_engine", engine)
    monkeypatch.setenv("HF_ENDPOINT", "https://here.example")
    monkeypatch.delenv("AWS_REGION", raising=False)
    order = next(
        given := orders(planned(source, tmp_path / "out"), HF_ENDPOINT="https://there.example", AWS_REGION="x")
    )
    fill(order)
    given.close()  # type: ignore[attr-defined]
    assert seen == [("https://there.example", "x")]
    assert [os.environ.get(name) for name in variables] == ["https://here.example", None]
