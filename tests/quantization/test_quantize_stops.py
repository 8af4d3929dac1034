"""Stopped anywhere and run again, a quantization ends byte for byte as if it had never been stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quantizing import GROUPS, run, small, weight_files, write_tokens
from tiny import V3, write_tiny

from weightkit.errors import Interrupted, TargetError
from weightkit.quantization import QuantizationReport, Settings
from weightkit.quantization.solver import Solver

pytestmark = pytest.mark.usefixtures("one_thread")

DRIVER = Path(__file__).with_name("quantize_driver.py")
STATE = ".weightkit/quantization"


def drive(mode: str, *arguments: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(DRIVER), mode, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four experts, three layers; 8 sequences of 32 tokens beside it."""
    write_tiny(tmp_path / "source", small(V3, experts=4))
    write_tokens(tmp_path / "tokens.npy", 8, 32)
    return tmp_path / "source"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What comes of ``source`` without a stop."""
    folder = tmp_path_factory.mktemp("finished")
    write_tiny(folder / "source", small(V3, experts=4))
    write_tokens(folder / "tokens.npy", 8, 32)
    run(folder / "source", folder / "int4", seq_len=32)
    return folder / "int4"


def stop_at(patch: pytest.MonkeyPatch, solution: int) -> None:
    """Ctrl-C at the n-th solution; layer 1 and layer 2 have 10 each."""
    solve, count = Solver.solve, 0

    def counting(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == solution:
            raise KeyboardInterrupt
        return solve(*arguments)

    patch.setattr(Solver, "solve", counting)


def stopped(source: Path, target: Path, solution: int, **options: Any) -> None:
    options = {"seq_len": 32, "snapshot_layers": 1, **options}
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, solution)
        with pytest.raises(Interrupted, match="finished layers are kept"):
            run(source, target, **options)


def test_death_at_every_kind_of_step(source: Path, tmp_path: Path) -> None:
    """Before or after each write, sync, rename and removal, and again in the run that continues; same bytes, the same
    records of all matrices, nothing left behind."""
    stride = 17
    found = drive("stops", source, tmp_path / "tokens.npy", tmp_path / "killed", 1, stride)
    assert found["steps"] > 100
    assert len(found["died"]) > 100 // stride
    assert len(set(found["died"])) >= 4


def test_death_in_any_part_of_a_layer(source: Path, tmp_path: Path) -> None:
    """While it is solved, before and after its report is kept, its file named, its states kept; before the seal, and
    when all but the state is done."""
    found = drive("places", source, tmp_path / "tokens.npy", tmp_path / "killed")
    places = {"solve", "allow", "keep_report", "begin_snapshot", "write_part", "finish_snapshot", "seal", "clear"}
    assert set(found["died"]) == places


@pytest.mark.parametrize(("solution", "snapshots"), [(1, 1), (7, 1), (10, 0), (15, 1), (15, 0), (20, 8)])
def test_ctrl_c_and_again(solution: int, snapshots: int, source: Path, finished: Path, tmp_path: Path) -> None:
    target = tmp_path / "int4"
    stopped(source, target, solution, snapshot_layers=snapshots)
    assert not (target / "model.safetensors.index.json").exists()
    report = run(source, target, seq_len=32, snapshot_layers=snapshots)
    assert weight_files(target) == weight_files(finished)
    assert report.resumed_layers == ((1,) if solution > 10 else ())
    whole = QuantizationReport.load(finished / "quantization_report.json")
    assert [layer.matrices for layer in report.layers] == [layer.matrices for layer in whole.layers]
    assert [layer.tokens_by_expert for layer in report.layers] == [layer.tokens_by_expert for layer in whole.layers]
    assert not (target / ".weightkit").exists()


def test_states_are_kept_and_used(source: Path, finished: Path, tmp_path: Path) -> None:
    """A continued run begins behind the last layer whose states were kept; damaged ones are not believed."""
    stopped(source, tmp_path / "int4", 15)
    kept = tmp_path / "int4" / STATE / "after-00001.bin"
    assert kept.stat().st_size == 8 * 32 * 64 * 4
    assert not list(kept.parent.glob("*.partial"))
    states = np.fromfile(kept, "<f4")
    states[:] = 0.5
    os.truncate(kept, kept.stat().st_size - 4)
    run(source, tmp_path / "int4", seq_len=32)
    assert weight_files(tmp_path / "int4") == weight_files(finished)
    stopped(source, tmp_path / "other", 15)
    states.tofile(tmp_path / "other" / STATE / "after-00001.bin")
    run(source, tmp_path / "other", seq_len=32)
    ours, theirs = weight_files(tmp_path / "other"), weight_files(finished)
    assert {name for name in ours if ours[name] != theirs[name]} == {"model-00004-of-000005.safetensors"}


def test_a_signal_stops_soon_with_one_message(source: Path, finished: Path, tmp_path: Path) -> None:
    script = (
        "import itertools, sys, time\n"
        "from weightkit.quantization.solver import Solver\n"
        "solve, numbers = Solver.solve, itertools.count(1)\n"
        "def endless(*arguments):\n"
        "    print('solving', flush=True)\n"
        "    while next(numbers) >= 3:\n"
        "        time.sleep(0.1)\n"
        "    return solve(*arguments)\n"
        "Solver.solve = endless\n"
        "from weightkit.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    options = ["--calibration", "tokens.npy", "--samples", "8", "--seq-len", "32", "--group-size", "16"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, "quantize", "source", "int4", *options, "--device", "cpu", "-q"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline() == "solving\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors == (
        "int4: stopped; finished layers are kept.\nRun the same command again: it continues where it stopped.\n"
    )
    run(source, tmp_path / "int4", seq_len=32)
    assert weight_files(tmp_path / "int4") == weight_files(finished)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"settings": Settings(group_size=16, damping=0.02)}, "an unfinished write with other options"),
        ({"settings": Settings(group_size=16, method="rtn")}, "an unfinished write with other options"),
        ({"samples": 4}, "an unfinished write with other options"),
        ({"seed": 1}, None),
        ({"touch": True}, "its source changed since: model-00001-of-000003.safetensors"),
    ],
    ids=["damping", "method", "samples", "seed of all there is", "source"],
)
def test_other_settings_do_not_continue(
    change: dict[str, Any], complaint: str | None, source: Path, finished: Path, tmp_path: Path
) -> None:
    """What was begun otherwise is refused and stays as it is; ``force`` begins anew, and nothing of it is left."""
    target = tmp_path / "int4"
    stopped(source, target, 15)
    if change.pop("touch", False):
        os.utime(source / "model-00001-of-000003.safetensors", ns=(1, 1))
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    options = {"seq_len": 32, "settings": GROUPS, **change}
    if complaint is None:
        run(source, target, **options)
        assert weight_files(target) == weight_files(finished)
        return
    with pytest.raises(TargetError, match=complaint) as caught:
        run(source, target, **options)
    assert "--force" in str(caught.value)
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    run(source, target, force=True, **options)
    run(source, tmp_path / "fresh", **options)
    assert weight_files(target) == weight_files(tmp_path / "fresh")
    assert not (target / ".weightkit").exists()


def test_force_clears_states_before_it_begins(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "int4"
    stopped(source, target, 15)
    assert (target / STATE / "after-00001.bin").exists()
    stopped(source, target, 1, force=True)
    assert sorted(path.name for path in (target / STATE).iterdir()) == ["layer-00000.json"]


@pytest.mark.parametrize("report", ["there", "gone", "damaged"])
def test_a_finished_target_is_complete(
    report: str, source: Path, tmp_path: Path, weightkit: Callable[..., Any]
) -> None:
    """A rerun says so, whatever became of the report, and changes nothing."""
    target = tmp_path / "int4"
    arguments = ["quantize", source, target, "--calibration", tmp_path / "tokens.npy", "--samples", 8, "--seq-len", 32]
    arguments += ["--group-size", 16, "--device", "cpu"]
    first = weightkit(*arguments)
    assert first.code == 0, first.err
    assert first.out.startswith("source: 30 matrices of 2 layers in int4 (gptq, groups of 16, scope experts), ")
    path = target / "quantization_report.json"
    if report == "gone":
        path.unlink()
    elif report == "damaged":
        path.write_text('{"format": ')
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in target.rglob("*") if path.is_file()}
    again = weightkit(*arguments)
    assert again.code == 0
    assert again.out == f"{target}: complete already.\n" + (first.out if report == "there" else "Its report is gone.\n")
    found = json.loads(weightkit(*arguments, "--json").out)
    assert found["complete_before"] is True
    assert found["report"] == (str(path) if report == "there" else None)
    assert weightkit(*arguments, "-q").out == ""
    assert json.loads(weightkit(*arguments, "--dry-run", "--json").out)["write"]["state"] == "complete"
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    other = weightkit(*arguments, "--bits", 8)
    assert other.code == 1
    assert "holds the result of another run" in other.err
    assert weightkit(*arguments, "--bits", 8, "--force").code == 0
    assert weightkit("verify", target, "--values").code == 0


def test_one_writer_at_a_time(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solve = Solver.solve

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(Solver, "solve", solve)
        with pytest.raises(TargetError, match="another process is writing there"):
            run(source, tmp_path / "int4", seq_len=32)
        return solve(*arguments)

    monkeypatch.setattr(Solver, "solve", meanwhile)
    run(source, tmp_path / "int4", seq_len=32)
