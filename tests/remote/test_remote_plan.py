"""What a plan says of a checkpoint at an address: as of the same one on a disk, but that it lies on none."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from faulty_hub import FaultyHub

from weightkit.cli.app import group
from weightkit.sizing import Load, Machine, plan
from weightkit.sizing.routes import Route

ADDRESS = "hf://org/tiny"


def routes(what: str | Path, disk_speed: int, network_speed: int) -> dict[str, Route]:
    machine = Machine(2, disk_speed=disk_speed, network_speed=network_speed)
    return {route.command: route for route in plan(what, machine, Load(context=128), group_size=16).routes}


def test_the_source_is_not_on_the_disk(hub: FaultyHub, tiny_source: Path) -> None:
    here, there = routes(tiny_source, 1000, 500), routes(ADDRESS, 1000, 500)
    assert here.keys() == there.keys() >= {"strip", "shard --mp 2"}
    source_bytes = sum(file.stat().st_size for file in tiny_source.glob("*.safetensors"))
    for command, route in there.items():
        assert (route.reads_bytes, route.writes_bytes) == (here[command].reads_bytes, here[command].writes_bytes)
        assert route.disk_bytes == here[command].disk_bytes - source_bytes
    assert there["strip"].disk_bytes == there["strip"].writes_bytes


@pytest.mark.parametrize(("disk", "network", "bound"), [(1000, 10, "network"), (10, 1000, "disk")])
def test_the_slower_of_network_and_disk_bounds_it(disk: int, network: int, bound: str, hub: FaultyHub) -> None:
    strip = routes(ADDRESS, disk, network)["strip"]
    assert strip.bound_by == bound
    assert strip.wall_s == strip.writes_bytes / 10  # as much is read


def test_the_command_says_what_it_does_not_count(hub: FaultyHub, tiny_source: Path) -> None:
    said = [
        CliRunner().invoke(group, ["plan", str(what), "--gpus", "2", "--context", "128", "--group-size", "16"])
        for what in (ADDRESS, tiny_source)
    ]
    assert [done.exit_code for done in said] == [0, 0]
    assert ["pass through the disk a few at a time" in done.output for done in said] == [True, False]
