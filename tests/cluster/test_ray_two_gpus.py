"""A node of a Ray cluster with several GPUs, one of which breaks: the others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from clusters import second
from folders import tree
from gpu_work import STATE, GpuRay, log_of
from tiny import write_tiny

import weightkit as wk
from weightkit.cluster.connection import Node, connect, nodes
from weightkit.cluster.crew import Crew, Needs, _Task, room_on
from weightkit.compute.engines import DeviceName


@pytest.fixture(scope="module")
def node(address: str) -> Iterator[str]:
    """The name of one whose second GPU breaks. The head has none."""
    with second(address, cpus=2, gpus=2, prefix=("env", f"{STATE}=works,3")):
        yield next(node.name for node in nodes(connect(address)) if node.gpus)


def test_under_cuda_the_task_that_failed_keeps_the_broken_gpu(
    address: str, node: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ray, which knows nothing of it, would give it to the next task, and to the one after that."""
    write_tiny(tmp_path / "v3")
    cast = wk.cast(wk.open_checkpoint(tmp_path / "v3"), "bf16")
    wk.write(cast, tmp_path / "expected", device="cpu", progress=False)
    target = tmp_path / "out"
    wk.write(cast, target, executor=GpuRay(address, jobs=2, device="cuda"))
    assert tree(target) == tree(tmp_path / "expected")
    used = log_of(target).read_text().splitlines()
    assert (set(used), used.count("3")) == ({"works", "3"}, 3)
    why = "the GPU failed: CUDA error: unspecified launch failure"
    said = [line for line in capfd.readouterr().err.splitlines() if "GPU" in line]
    told = f"{node}: GPU 1 cannot be used ({why}). The others compute; the bytes are the same."
    assert said[0] == told
    assert [f"lost on {node} ({why}); sent again" in line for line in said[1:]] == [True]


LARGE = Node("0", "host", "127.0.0.1", 16, 4, 1e12)
Lose = Callable[[str | None], None]


def crew_of(device: DeviceName, jobs: int, node: Node = LARGE) -> tuple[Crew, Lose, list[str]]:
    """A crew with one node; what a task does to it whose GPU fails; and what is told."""
    told = list[str]()
    ray = SimpleNamespace(remote=lambda function: function, put=lambda value: value)
    needs = Needs(1, device)
    crew = Crew(ray, lambda order: iter(()), needs, look=(lambda: None, ()), tell=told.append)
    crew._rooms[node.id] = room_on(node, needs, jobs)
    task = _Task(SimpleNamespace(name="file"), node, None, device)  # type: ignore[arg-type]

    def lose(gpu: str | None) -> None:
        crew._leave_gpu(node, gpu, "broken")
        crew._leave_place(task, "broken")

    return crew, lose, told


def places(crew: Crew) -> tuple[int, float] | None:
    room = crew._rooms.get(LARGE.id)
    return None if room is None else (room.tasks, room.gpus)


def test_under_auto_a_broken_gpu_is_told_once_and_the_last_one_leaves_the_cpu() -> None:
    crew, lose, told = crew_of("auto", 8)
    for gpu in ("2", "2", "0", "MIG-1"):
        lose(gpu)
        assert places(crew) == (8, 0.5)
    others = "cannot be used (broken). The others compute; the bytes are the same."
    assert told == [f"host: GPU {gpu} {others}" for gpu in ("2", "0", "MIG-1")]
    lose("3")
    lose("3")
    assert places(crew) == (8, 0.0)
    assert told[3:] == ["host: the GPU cannot be used (broken). The CPU computes there; the bytes are the same."]


def test_under_cuda_tasks_are_as_many_as_have_a_place_on_the_others() -> None:
    crew, lose, told = crew_of("cuda", 8)
    lose("2")
    lose("2")  # the other half of it
    assert places(crew) == (6, 0.5)
    lose("0")
    assert places(crew) == (4, 0.5)
    lose("1")
    lose("3")
    assert places(crew) is None
    assert [line.partition(" cannot")[0] for line in told] == [*(f"host: GPU {gpu}" for gpu in "201"), "host: the GPU"]


def test_under_cuda_one_task_at_a_time_has_the_other_gpus() -> None:
    crew, lose, _ = crew_of("cuda", 1)
    for gpu in "012":
        lose(gpu)
        assert places(crew) == (1, 1.0)
    lose("3")
    assert places(crew) is None


def test_a_node_without_a_cpu_left_beside_the_broken_gpu_is_left() -> None:
    crew, lose, told = crew_of("cuda", 8, Node("0", "host", "127.0.0.1", 1, 2, 1e12))
    lose("0")
    assert places(crew) is None
    assert told[-1] == "host: the GPU cannot be used (broken). The node gets no more work."


def test_a_task_that_sees_all_gpus_speaks_for_all() -> None:
    crew, lose, told = crew_of("auto", 8)
    lose(None)
    assert places(crew) == (8, 0.0)
    assert len(told) == 1
