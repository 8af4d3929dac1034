"""Nodes of a real Ray cluster whose GPU is not what Ray says: there is none, or it breaks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from clusters import second
from folders import tree
from gpu_work import STATE, GpuRay, log_of
from tiny import write_tiny

import weightkit as wk
from weightkit.checkpoint import Checkpoint
from weightkit.cluster import RayExecutor
from weightkit.cluster.connection import Node, connect, nodes
from weightkit.cluster.crew import Crew, Needs, room_on
from weightkit.errors import DeviceError, Problems, TargetError

BREAKS_AFTER = 5


@pytest.fixture(scope="module")
def gpu_nodes(address: str) -> Iterator[dict[str, str]]:
    """The names of a node with a GPU that breaks, and of one whose GPU works. The head has none."""
    with (
        second(address, cpus=2, gpus=1, prefix=("env", f"{STATE}={BREAKS_AFTER}")),
        second(address, cpus=1, gpus=1, prefix=("env", f"{STATE}=works")),
    ):
        yield {"broken" if node.cpus == 2 else "works": node.name for node in nodes(connect(address)) if node.gpus}


@pytest.fixture
def broken(gpu_nodes: dict[str, str]) -> str:
    return gpu_nodes["broken"]


@pytest.fixture(scope="module")
def cast(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("source") / "v3"
    write_tiny(folder)
    return wk.cast(wk.open_checkpoint(folder), "bf16")


@pytest.fixture(scope="module")
def expected(cast: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    target = tmp_path_factory.mktemp("local") / "out"
    wk.write(cast, target, device="cpu", progress=False)
    return tree(target)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU that Ray is told of would be there")
def test_a_gpu_that_is_not_there(
    cast: Checkpoint,
    expected: dict[str, bytes],
    address: str,
    gpu_nodes: dict[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    wk.write(cast, tmp_path / "out", executor=RayExecutor(address, jobs=1))
    assert tree(tmp_path / "out") == expected
    told = sorted(line for line in capfd.readouterr().err.splitlines() if "GPU" in line)
    for line, name in zip(told, sorted(gpu_nodes.values()), strict=True):
        assert line.startswith(f"{name}: the GPU cannot be used (no CUDA device is usable: ")
        assert line.endswith("The CPU computes there; the bytes are the same.")
    with pytest.raises(DeviceError, match="no node of the cluster has a GPU that works") as caught:
        wk.write(cast, tmp_path / "there", executor=RayExecutor(address, device="cuda"), progress=False)
    for name in gpu_nodes.values():
        assert f"{name} (no CUDA device is usable: " in str(caught.value)
    assert "--device auto or cpu" in str(caught.value)


def test_one_that_breaks_on_the_way(
    cast: Checkpoint,
    expected: dict[str, bytes],
    address: str,
    broken: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "out"
    wk.write(cast, target, executor=GpuRay(address, jobs=1))
    assert tree(target) == expected
    assert log_of(target).read_text().splitlines().count(str(BREAKS_AFTER)) == BREAKS_AFTER
    told = [line for line in capfd.readouterr().err.splitlines() if "GPU" in line]
    why = "the GPU failed: CUDA error: unspecified launch failure"
    assert told[0] == f"{broken}: the GPU cannot be used ({why}). The CPU computes there; the bytes are the same."
    assert [f"lost on {broken} ({why}); sent again" in line for line in told[1:]] == [True]


def test_under_cuda_the_others_go_on(
    cast: Checkpoint,
    expected: dict[str, bytes],
    address: str,
    broken: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "out"
    wk.write(cast, target, executor=GpuRay(address, jobs=1, device="cuda"))
    assert tree(target) == expected
    used = log_of(target).read_text().splitlines()
    assert set(used) == {"works", str(BREAKS_AFTER)}
    told = capfd.readouterr().err
    assert told.count(f"{broken}: the GPU cannot be used") == told.count("The node gets no more work.") == 1


def test_what_all_nodes_find_wrong_is_told_together(address: str, broken: str) -> None:
    def look() -> None:
        raise TargetError("not here", where="/target")

    class Errand:
        name, size_bytes = "file", 1

    with pytest.raises(Problems, match="nodes of the cluster cannot do the work") as caught:
        Crew(connect(address), lambda order: iter(()), Needs(1), look=(look, ())).carry_out([Errand()])  # type: ignore[list-item]
    assert len(caught.value.problems) == 3
    assert f"/target (on {broken})" in str(caught.value)


@pytest.mark.parametrize(
    ("cpus", "gpus", "share", "places"),
    [(8, 1, 0.125, 8), (8, 8, 1.0, 8), (3, 8, 1.0, 8), (8, 3, 0.333, 9), (3, 2, 0.5, 4), (8, 0, 0.0, 0)],
)
def test_every_task_has_a_place_on_one_gpu(cpus: int, gpus: int, share: float, places: int) -> None:
    room = room_on(Node("0", "0", "127.0.0.1", cpus, gpus, 1e12), Needs(1, "auto"), None)
    assert (room.tasks, room.gpus) == (cpus, share)
    if gpus:
        assert int(1 / share) * gpus == places >= cpus
