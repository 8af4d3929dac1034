"""What a plan says of a route is what the command itself says and does, on tiny checkpoints in every layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from folders import read_safetensors
from tiny import V2_LITE, V3, V3_INT4, Tiny, write_tiny

import weightkit as wk
from weightkit.cli.app import group
from weightkit.quantization.plan import plan_quantization
from weightkit.quantization.settings import Settings
from weightkit.sizing import Load, Machine, SizingPlan, plan
from weightkit.sizing.routes import Route

#: Wide enough for 16 ranks of whole blocks, whose parts of columns are read without what lies between them.
WIDE = replace(
    V3, layers=2, v=128, nope=128, rope=128, intermediate=2048, moe=1024, shared=2, experts=16, hidden=256, groups=2
)


def planned(path: Path, gpus: int) -> SizingPlan:
    return plan(path, Machine(gpus), Load(context=128), group_size=16)


def called(*words: object) -> dict[str, int]:
    done = CliRunner().invoke(group, [*map(str, words), "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    found: dict[str, int] = json.loads(done.output)
    return found


def data_bytes(folder: Path) -> int:
    return sum(
        len(content) for file in folder.glob("*.safetensors") for _, _, content in read_safetensors(file).values()
    )


def held_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def require_true(route: Route, source: Path, target: Path) -> None:
    """Hold a route against the dry run, and against what the command then reads and writes."""
    name, *options = route.command.split()
    said = called(name, source, target, *options, "--dry-run")
    assert route.reads_bytes == said["read_bytes"]
    done = called(name, source, target, *options)
    assert done["read_bytes"] <= route.reads_bytes <= 1.02 * done["read_bytes"]
    assert route.writes_bytes == data_bytes(target)
    headers = said["write_bytes"] - route.writes_bytes
    assert headers == held_bytes(target) - data_bytes(target)
    more = route.disk_bytes - held_bytes(source)
    assert more == route.writes_bytes
    assert more <= said["needed_disk_bytes"] - headers <= more + (17 << 20)  # side files, and the writer's slack


@pytest.mark.parametrize("gpus", [4, 16])
@pytest.mark.parametrize("member", [WIDE, V2_LITE, V3_INT4], ids=["fp8", "bf16", "int4"])
def test_routes_say_what_dry_runs_say(member: Tiny, gpus: int, tmp_path: Path) -> None:
    write_tiny(tmp_path / "source", member)
    routes = [r for r in planned(tmp_path / "source", gpus).routes if not r.command.startswith("quantize")]
    assert {route.command.split()[0] for route in routes} >= {"shard"}
    for number, route in enumerate(routes):
        require_true(route, tmp_path / "source", tmp_path / f"out{number}")


def test_routes_of_rank_files(tmp_path: Path) -> None:
    """Each rank's part of the columns is a file's own, and what they share is read of one."""
    write_tiny(tmp_path / "fp8", WIDE)
    wk.write(wk.shard(wk.open_checkpoint(tmp_path / "fp8"), mp=4), tmp_path / "mp4", progress=False)
    for gpus, commands in ((4, ["cast --to bf16", "shard --mp 4", "shard --mp 4 --to bf16"]), (8, ["shard --mp 8"])):
        found = {route.command: route for route in planned(tmp_path / "mp4", gpus).routes}
        for command in commands:
            require_true(found[command], tmp_path / "mp4", tmp_path / command.replace(" ", ""))


def test_quantize(tmp_path: Path) -> None:
    write_tiny(tmp_path / "fp8", V3)
    found = {route.command.split()[0]: route for route in planned(tmp_path / "fp8", 1).routes}["quantize"]
    name, *options = found.command.split()
    said = called(name, tmp_path / "fp8", tmp_path / "out", *options, "--method", "rtn", "--dry-run")
    settings = Settings(group_size=16, method="rtn", mtp=False)
    made = plan_quantization(
        wk.open_checkpoint(tmp_path / "fp8"), tmp_path / "out", settings, calibration="none", version="1"
    )
    assert found.reads_bytes == said["write"]["read_bytes"]  # type: ignore[index]
    headers = sum(len(file.header) for file in made.write.files)
    assert found.writes_bytes == said["write"]["write_bytes"] - headers  # type: ignore[index]


def test_snapshots_of_a_quantization(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is of a GPU, whose activations are half as wide as a CPU's."""
    monkeypatch.chdir(tmp_path)
    held = plan("pico").formats[0].disk_bytes
    found = next(route for route in plan("pico").routes if route.command.startswith("quantize"))
    said = called("quantize", "--model", "pico", "--no-mtp", "--device", "cpu", "--dry-run")
    assert found.disk_bytes - held - found.writes_bytes == said["snapshot_bytes"] // 2
