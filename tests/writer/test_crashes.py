"""Killed anywhere and run again, a write ends byte for byte as if it had never been stopped."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from folders import tree
from tiny import V3, Tiny, write_tiny

import weightkit as wk

DRIVER = Path(__file__).with_name("crash_driver.py")
#: About 250 MB of FP8.
MODERATE = replace(V3, hidden=1152, vocab=2048, intermediate=2048, moe=1024, experts=16, shared=2, heads=16)


def drive(*arguments: object) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, str(DRIVER), *map(str, arguments)], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def moderate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moderate")
    write_tiny(folder, MODERATE, shards=6)
    return folder


@pytest.mark.parametrize(("kind", "kills"), [("shard", 24), ("cast", 16)])
def test_kill_9_at_random_times(kind: str, kills: int, moderate: Path, tmp_path: Path) -> None:
    checkpoint = wk.open_checkpoint(moderate)
    started = time.perf_counter()
    what = wk.shard(checkpoint, mp=4) if kind == "shard" else wk.cast(checkpoint, "bf16")
    wk.write(what, tmp_path / "whole", jobs=2, device="cpu", progress=False)
    whole_s = time.perf_counter() - started
    found = drive(moderate, tmp_path / "killed", kind, "--times", whole_s, kills, 1)
    assert found["killed"] >= kills
    expected = tree(tmp_path / "whole")
    assert found["completed"] >= 1
    for number in range(found["completed"]):
        assert tree(tmp_path / f"killed-{number}") == expected


@pytest.mark.parametrize(("kind", "first", "stride"), [("strip", 1, 5), ("cast", 2, 13)])
def test_death_at_every_kind_of_step(kind: str, first: int, stride: int, tmp_path: Path) -> None:
    """Before or after each write, sync, rename and removal, and again in the run that continues."""
    small: Tiny = replace(V3, layers=2, experts=4, top_k=1, moe=256, hidden=256)
    write_tiny(tmp_path / "source", small, shards=2)
    found = drive(tmp_path / "source", tmp_path / "target", kind, "--steps", first, stride)
    assert found["died"] > 20
