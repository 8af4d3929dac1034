"""An engine is started once it is known what is left to compute, for that alone, and for nothing where nothing is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import click.testing
import pytest
from folders import tree
from tiny import V3, write_tiny

import weightkit as wk
from weightkit.checkpoint.tensors import LazyTensor
from weightkit.cli.app import group
from weightkit.compute import CpuEngine, EngineSupply
from weightkit.durable import only_writer
from weightkit.errors import DeviceError, SpaceError, TargetError
from weightkit.layouts import lay_out_published
from weightkit.writer import execute, make_plan, target
from weightkit.writer.executor import Run
from weightkit.writer.plan import Plan, PlannedFile


class Starts:
    """Starts the CPU, and keeps what for."""

    def __init__(self) -> None:
        self.work: list[list[LazyTensor]] = []

    def __call__(self, work: Sequence[LazyTensor]) -> EngineSupply:
        self.work.append(list(work))
        return CpuEngine()


def no_gpu(work: Sequence[LazyTensor]) -> EngineSupply:
    raise DeviceError("no CUDA device is usable")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start") / "source"
    write_tiny(folder, replace(V3, layers=3, dense_layers=1, mtp_layers=0))
    return folder


def planned(source: Path, folder: Path) -> Plan:
    return make_plan(lay_out_published(wk.cast(wk.open_checkpoint(source), "bf16")), folder)


def test_for_all_at_first_and_never_again(source: Path, tmp_path: Path) -> None:
    starts, plan = Starts(), planned(source, tmp_path / "out")
    execute(plan, engine=starts, progress=False)
    assert starts.work == [plan.computed]
    execute(plan, engine=starts, progress=False)
    assert len(starts.work) == 1
    execute(plan, engine=starts, progress=False, force=True)
    assert starts.work[1:] == [plan.computed]


def test_for_the_files_that_are_left(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts, plan, place = Starts(), planned(source, tmp_path / "out"), Run.place
    first, *others = plan.files
    assert first.computed
    assert sum(len(file.computed) for file in others)

    def stop(run: Run, file: PlannedFile, sha256: str) -> None:
        if file is not first:
            raise KeyboardInterrupt
        place(run, file, sha256)

    monkeypatch.setattr(Run, "place", stop)
    with pytest.raises(wk.WeightkitError, match="stopped"):
        execute(plan, engine=starts, jobs=1, progress=False)
    monkeypatch.setattr(Run, "place", place)
    execute(plan, engine=starts, jobs=1, progress=False)
    assert starts.work == [plan.computed, [tensor for file in others for tensor in file.computed]]


def test_not_for_copies(source: Path, tmp_path: Path) -> None:
    starts = Starts()
    execute(make_plan(lay_out_published(wk.open_checkpoint(source)), tmp_path / "out"), engine=starts, progress=False)
    assert starts.work == []


def test_not_for_a_write_that_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts, plan = Starts(), planned(source, tmp_path / "out")
    with pytest.raises(TargetError, match="another process"), only_writer(tmp_path / "out"):
        execute(plan, engine=starts, progress=False)
    (tmp_path / "out/model.safetensors").write_bytes(b"")
    with pytest.raises(TargetError, match="holds files"):
        execute(plan, engine=starts, progress=False)
    (tmp_path / "out/model.safetensors").unlink()
    monkeypatch.setattr(target, "free_disk_bytes", lambda path: 0)
    with pytest.raises(SpaceError):
        execute(plan, engine=starts, progress=False)
    assert starts.work == []


def test_an_engine_that_cannot_be_started_changes_nothing(source: Path, tmp_path: Path) -> None:
    plan = planned(source, tmp_path / "out")
    with pytest.raises(DeviceError):
        execute(plan, engine=no_gpu, progress=False)
    assert not (tmp_path / "out").exists()
    execute(plan, progress=False)
    before = tree(tmp_path / "out")
    with pytest.raises(DeviceError):
        execute(plan, engine=no_gpu, progress=False, force=True)
    assert tree(tmp_path / "out") == before


def by_call(source: Path, folder: Path) -> None:
    wk.write(wk.cast(wk.open_checkpoint(source), "bf16"), folder, progress=False)


def by_command(source: Path, folder: Path) -> None:
    call = ["cast", str(source), str(folder), "--to", "bf16", "--quiet"]
    click.testing.CliRunner().invoke(group, call, catch_exceptions=False)


@pytest.mark.parametrize("convert", [by_call, by_command])
def test_calls_and_commands(
    convert: Callable[[Path, Path], None], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = list[tuple[str, int]]()

    def start(device: str, work: Sequence[LazyTensor]) -> EngineSupply:
        started.append((device, len(work)))
        return CpuEngine()

    monkeypatch.setattr("weightkit.writer.api.start_engine", start)
    monkeypatch.setattr("weightkit.compute.start_engine", start)
    for _ in range(2):
        convert(source, tmp_path / "out")
    assert started == [("auto", planned(source, tmp_path / "out").computed_tensors)]
    assert (tmp_path / "out/weightkit.lock.json").exists()
