"""What torchrun tells a process, and ranks started without it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from weightkit.errors import DeviceError, RankError
from weightkit.ranks import World, launch

#: As torch's documentation of torchrun lists them.
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_the_world_as_torchrun_tells_it() -> None:
    world = World.of_environment(TORCHRUN)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (5, 8, 1, 4)
    assert str(world) == f"rank 5 of 8 ({world.host})"


def test_without_torchrun_a_process_is_alone_whatever_a_scheduler_sets() -> None:
    world = World.of_environment({"RANK": "1", "WORLD_SIZE": "2"})
    assert (world.rank, world.size) == (0, 1)


@pytest.mark.parametrize(
    "wrong",
    [{"RANK": "8"}, {"RANK": "-1"}, {"WORLD_SIZE": "many"}, {"LOCAL_RANK": "4"}, {"LOCAL_WORLD_SIZE": "9"}],
    ids=str,
)
def test_variables_that_contradict_each_other_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(DeviceError, match=f"found .*{next(iter(wrong))}={next(iter(wrong.values()))}"):
        World.of_environment({**TORCHRUN, **wrong})
    with pytest.raises(DeviceError, match="RANK="):
        World.of_environment({"LOCAL_RANK": "0"})


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{code}"]


def test_launched_ranks_see_what_torchrun_sets(tmp_path: Path) -> None:
    names = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    code = f"open('{tmp_path}/' + str(rank), 'w').write(' '.join(os.environ[n] for n in '{names}'.split()))"
    assert launch(3, python(code)) == 0
    found = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [values[:5] for values in found] == [[str(rank), "3", str(rank), "3", "127.0.0.1"] for rank in range(3)]
    assert len({values[5] for values in found}) == 1


def test_ranks_leave_each_other_before_python_ends(tmp_path: Path) -> None:
    """Else one in twenty was aborted by a thread of gloo's. Also where they have looked at their GPUs already."""
    code = f"""
import atexit, torch, torch.distributed as dist
from weightkit.ranks.ranks import Ranks
torch.cuda.is_initialized = lambda: True
atexit.register(lambda: open('{tmp_path}/' + str(rank), 'w').write(str(dist.is_initialized())))
Ranks.join(torch.device('cpu')).wait()
"""
    assert launch(2, python(code)) == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["False", "False"]


def test_a_failed_rank_gives_its_code_once_the_others_have_ended(tmp_path: Path) -> None:
    code = f"""
if rank == 1: sys.exit(3)
time.sleep(1.0)
open('{tmp_path}/' + str(rank), 'w').close()
"""
    assert launch(3, python(code)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "2"]


def test_a_rank_that_is_killed_is_named_and_the_others_are_ended(tmp_path: Path) -> None:
    code = f"""
open('{tmp_path}/' + str(os.getpid()), 'w').close()
if rank == 1:
    while len(os.listdir('{tmp_path}')) < 3: time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""
    started = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 of 3: ended by SIGKILL.*\n.*memory"):
        launch(3, python(code))
    assert time.monotonic() - started < 50  # the others would sleep for 60 s
    for path in tmp_path.iterdir():
        assert not Path(f"/proc/{path.name}").exists()


def test_a_launch_that_is_stopped_leaves_no_rank_behind(tmp_path: Path) -> None:
    inner = python(f"open('{tmp_path}/' + str(os.getpid()), 'w').close(); time.sleep(60)")
    code = f"""
import signal, sys
def stop(*_): raise KeyboardInterrupt
signal.signal(signal.SIGTERM, stop)
from weightkit.ranks import launch
sys.exit(launch(2, {inner!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    pids = [path.name for path in tmp_path.iterdir()]
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_threads_are_divided_unless_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"open('{tmp_path}/threads', 'w').write(os.environ['OMP_NUM_THREADS'])"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launch(1, python(code))
    assert (tmp_path / "threads").read_text() == str(len(os.sched_getaffinity(0)))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    launch(1, python(code))
    assert (tmp_path / "threads").read_text() == "7"
