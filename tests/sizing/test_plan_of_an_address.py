"""Routes from an address: the network brings what is read, and none of it lies on the disk."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import V3, write_tiny

from weightkit.remote.path import as_path
from weightkit.sizing import Load, Machine, plan
from weightkit.sizing.routes import Route
from weightkit.sizing.source import read_source

ADDRESS = "hf://some/model"


def routes(what: str | Path, disk_speed: int, network_speed: int) -> dict[str, Route]:
    machine = Machine(2, disk_speed=disk_speed, network_speed=network_speed)
    return {route.command: route for route in plan(what, machine, Load(context=128), group_size=16).routes}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the address holds too."""
    write_tiny(tmp_path / "v3", V3)
    found = {str(tmp_path / "v3"): read_source(tmp_path / "v3")}
    found[ADDRESS] = replace(found[str(tmp_path / "v3")], path=as_path(ADDRESS))
    module = importlib.import_module("weightkit.sizing.plan")
    monkeypatch.setattr(module, "read_source", lambda what, **_: found[str(what)])
    return tmp_path / "v3"


def test_nothing_of_the_source_is_on_the_disk(folder: Path) -> None:
    here, there = routes(folder, 1000, 500), routes(ADDRESS, 1000, 500)
    assert here.keys() == there.keys() >= {"strip", "shard --mp 2"}
    source_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    for command, route in there.items():
        assert (route.reads_bytes, route.writes_bytes) == (here[command].reads_bytes, here[command].writes_bytes)
        assert route.disk_bytes == here[command].disk_bytes - source_bytes
    assert there["strip"].disk_bytes == there["strip"].writes_bytes


@pytest.mark.parametrize(("disk", "network", "bound"), [(1000, 10, "network"), (10, 1000, "disk")])
def test_the_slower_of_network_and_disk_bounds_it(disk: int, network: int, bound: str, folder: Path) -> None:
    strip = routes(ADDRESS, disk, network)["strip"]
    assert strip.bound_by == bound
    assert strip.wall_s == strip.writes_bytes / 10  # as much is read
    here = routes(folder, disk, network)["strip"]
    assert (here.bound_by, here.wall_s) == ("disk", 2 * strip.writes_bytes / disk)
