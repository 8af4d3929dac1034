"""Files of which a part is made while they are written: in their order, never continued, named only when allowed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from folders import read_safetensors
from tiny import V3, write_tiny

import weightkit as wk
from weightkit.checkpoint.reading import Bytes
from weightkit.checkpoint.tensors import Promised, size_bytes
from weightkit.errors import Interrupted
from weightkit.layouts import lay_out_published
from weightkit.writer import Plan, files, make_plan, stream
from weightkit.writer.executor import open_run
from weightkit.writer.journal import read_history

GATE, UP = (f"model.layers.1.mlp.shared_experts.{module}_proj.weight" for module in ("gate", "up"))


class Maker:
    """Delivers ``fill`` over and over, until the ``last`` delivery."""

    def __init__(self, plan: Plan, fill: int, last: int = 1000) -> None:
        self.plan, self.fill, self.left = plan, fill, last
        self.taken: list[str] = []
        self.settled: list[str] = []

    def take(self, name: str) -> Bytes:
        if len(self.taken) == self.left:
            raise Interrupted("no more", where=name)
        self.taken.append(name)
        (tensor,) = (file.tensors[name] for file in self.plan.files if name in file.tensors)
        return np.full(size_bytes(tensor), self.fill, np.uint8)

    def settle(self, file: str) -> None:
        assert (self.plan.target / f"{file}.partial").exists()
        assert not (self.plan.target / file).exists()
        self.settled.append(file)


def planned(tmp_path: Path, recipe: str = "one") -> Plan:
    """Two weights of a BF16 checkpoint are promised."""
    if not (tmp_path / "source").exists():
        write_tiny(tmp_path / "source", V3)
    checkpoint = wk.cast(wk.open_checkpoint(tmp_path / "source"), "bf16")
    tensors = dict(checkpoint.tensors)
    for name in (GATE, UP):
        tensors[name] = Promised(recipe, "I32", (512, 72))
    return make_plan(lay_out_published(replace(checkpoint, tensors=tensors)), tmp_path / "out")


def write(plan: Plan, maker: Maker) -> None:
    with open_run(plan, engine=None, progress=False, force=False, promises=maker) as run:
        assert run is not None
        for file in plan.files:
            run.write_file(file)
        run.seal()


def test_what_is_promised_is_asked_for_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    maker = Maker(plan, 7)
    write(plan, maker)
    assert maker.taken == [GATE, UP]
    (path,) = {file.name for file in plan.files if GATE in file.tensors}
    assert maker.settled == [path]
    found = read_safetensors(tmp_path / "out" / path)
    assert found[GATE] == found[UP] == ("I32", (512, 72), bytes([7]) * (4 * 512 * 72))
    wk.write(wk.cast(wk.open_checkpoint(tmp_path / "source"), "bf16"), tmp_path / "cast", device="cpu", progress=False)
    for file in plan.files:
        ours, theirs = (read_safetensors(folder / file.name) for folder in (tmp_path / "out", tmp_path / "cast"))
        assert {name for name in ours if ours[name] != theirs[name]} == {GATE, UP} & ours.keys()


@pytest.mark.parametrize("last", [0, 1])
def test_made_anew_they_may_be_others_and_never_meet_in_one_file(
    last: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop within a file that holds what is made: the next run begins it again; files that are copied go on."""
    monkeypatch.setattr(stream, "BUFFER_BYTES", 16 << 10)
    monkeypatch.setattr(files, "BUFFER_BYTES", 16 << 10)
    monkeypatch.setattr(files, "DURABLE_EVERY_BYTES", 32 << 10)
    plan = planned(tmp_path)
    with pytest.raises(Interrupted, match="no more"):
        write(plan, Maker(plan, 7, last))
    history = read_history(tmp_path / "out")
    assert history is not None
    (promised,) = {file.name for file in plan.files if GATE in file.tensors}
    assert promised not in history.files
    assert (tmp_path / "out" / f"{promised}.partial").stat().st_size > 0
    maker = Maker(plan, 9)
    write(plan, maker)
    assert maker.taken == [GATE, UP]
    found = read_safetensors(tmp_path / "out" / promised)
    assert set(found[GATE][2]) == set(found[UP][2]) == {9}
    assert not list((tmp_path / "out").glob("*.partial"))


def test_a_file_waits_for_its_name(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    whole, allowed = threading.Event(), threading.Event()
    (promised,) = (file for file in plan.files if GATE in file.tensors)

    class Waiting(Maker):
        def settle(self, file: str) -> None:
            super().settle(file)
            whole.set()
            assert allowed.wait(60)

    with open_run(plan, engine=None, progress=False, force=False, promises=Waiting(plan, 3)) as run:
        assert run is not None
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(run.write_file, promised)
            assert whole.wait(60)
            assert not run.is_done(promised)
            allowed.set()
            writing.result()
        assert run.is_done(promised)


def test_another_recipe_is_another_plan(tmp_path: Path) -> None:
    """Settings and calibration are part of what a plan's hash is over: an unfinished write is not continued with
    others."""
    first, same, other = planned(tmp_path), planned(tmp_path), planned(tmp_path, recipe="two")
    assert first.hash == same.hash != other.hash
    with pytest.raises(Interrupted):
        write(first, Maker(first, 7, 1))
    with pytest.raises(wk.errors.TargetError, match="an unfinished write with other options"):
        write(other, Maker(other, 7))


def test_who_finds_it_complete_has_nothing_to_do(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    write(plan, Maker(plan, 7))
    with open_run(plan, engine=None, progress=False, force=False, promises=Maker(plan, 8, 0)) as run:
        assert run is None
