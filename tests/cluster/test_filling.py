"""A task's engine and environment, without a cluster."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from folders import tree
from tiny import V3, write_tiny

import weightkit as wk
from weightkit.checkpoint import Checkpoint
from weightkit.checkpoint.tensors import LazyTensor
from weightkit.cluster import filling
from weightkit.cluster.filling import Order, Place, write_file
from weightkit.compute import CpuEngine, Engine, EngineSupply, StartingEngine, starting
from weightkit.durable import only_writer
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


def fill(order: Order) -> None:
    *_, last = write_file(order)
    assert last.error is None
    assert last.result


def test_one_engine_with_the_first_tasks_kernels_however_small(
    source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, made = list[Iterable[LazyTensor]](), list[EngineSupply]()

    def open_any(samples: Iterable[LazyTensor]) -> Engine:
        opened.append(samples)
        return CpuEngine()

    monkeypatch.setattr(starting, "has_driver", lambda: True)
    monkeypatch.setattr(starting, "_open_any", open_any)
    plan = planned(wk.cast(source, "bf16"), tmp_path / "out")
    computed = [bool(file.computed) for file in plan.files]
    for order in orders(plan):
        fill(order)
        made.append(filling._engine(order))
    assert sum(computed) > 1
    engines = {id(engine) for engine, needed in zip(made, computed, strict=True) if needed}
    assert len(engines) == 1
    started = made[computed.index(True)]
    assert isinstance(started, StartingEngine)
    started.wait(10)
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
    def open_any(samples: Iterable[LazyTensor]) -> Engine:
        raise RuntimeError("driver too old")

    monkeypatch.setattr(starting, "has_driver", lambda: True)
    monkeypatch.setattr(starting, "_open_any", open_any)
    for order in orders(planned(wk.cast(source, "bf16"), tmp_path / "out")):
        fill(order)
    for engine in filling._engines.values():
        assert isinstance(engine, StartingEngine)
        engine.wait(10)
    assert capsys.readouterr().err.count("The GPU cannot be used (RuntimeError: driver too old).") == 1


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
