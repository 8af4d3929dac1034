"""Generation by several processes, through gloo: tokens of one process, files of each rank, failures of any."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rank_driver import PROMPTS, SAMPLED
from small_checkpoint import write_small
from tiny import V3_INT4, write_tiny
from transformers_oracle import V2_LITE

from weightkit import manifests
from weightkit.errors import DeviceError, MissingFileError, SpaceError
from weightkit.generation import Runtime
from weightkit.generation.memory import divide
from weightkit.generation.ranks import RankReport, require_memory, take_device, verdict
from weightkit.layouts import open_checkpoint
from weightkit.ranks import World, start
from weightkit.ranks.launch import held_port
from weightkit.transforms import shard
from weightkit.writer import write

DRIVER = Path(__file__).with_name("rank_driver.py")
#: For ranks that end; one that waits for another which never answers would take half an hour.
END_TIMEOUT_S = 900


def launched(size: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """``arguments`` run by Python on ``size`` ranks."""
    code = f"""
import sys
from weightkit.errors import RankError
from weightkit.ranks import launch
try:
    sys.exit(launch({size}, [sys.executable, *sys.argv[1:]]))
except RankError as error:
    print("Error:", error, file=sys.stderr)
    sys.exit(1)
"""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=END_TIMEOUT_S)


def by_hand(size: int, *arguments: object) -> tuple[list[int], str]:
    """Ranks that have only each other, as those of several machines: their exit codes, and what all of them said."""
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    common |= {"OMP_NUM_THREADS": 1, "TORCH_CPP_LOG_LEVEL": "ERROR", "GLOO_SOCKET_IFNAME": "lo"}
    processes = []
    with held_port() as port, tempfile.TemporaryFile("w+") as said:
        common["MASTER_PORT"] = port
        for rank in range(size):
            environment = {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()}
            command = [sys.executable, *map(str, arguments)]
            processes.append(subprocess.Popen(command, stderr=said, env={**os.environ, **environment}))
        try:
            codes = [process.wait(END_TIMEOUT_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
        said.seek(0)
        return codes, said.read()


def files_of(folder: Path, size: int) -> Path:
    """The checkpoint as rank files beside it."""
    target = folder.with_name(f"{folder.name}-mp{size}")
    write(shard(open_checkpoint(folder), mp=size), target, progress=False)
    return target


def shipped() -> Path:
    path = manifests.load("pico").path
    assert path is not None
    return path


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """FP8, BF16 of another member, int4: published, and in files of 2 and of 4 ranks."""
    folder = tmp_path_factory.mktemp("forms")
    pico = folder / "pico"
    pico.symlink_to(shipped())
    write_small(folder / "lite", fp8=False, **{**V2_LITE, "vocab_size": 264})
    write_tiny(folder / "int4", V3_INT4)
    found = {"pico": pico, "lite": folder / "lite", "int4": folder / "int4"}
    for name in ("pico", "lite", "int4"):
        for size in (2, 4) if name != "lite" else ():
            found[f"{name}-mp{size}"] = files_of(folder / name, size)
    return found


def expected(path: Path) -> dict[str, object]:
    """What one process answers."""
    with Runtime(path, device="cpu") as runtime:
        return {
            "one": list(runtime.generate(PROMPTS[0], max_new_tokens=5).token_ids),
            "together": [list(found.token_ids) for found in runtime.generate_many(PROMPTS, max_new_tokens=5)],
            "drawn": list(runtime.generate(PROMPTS[1], max_new_tokens=5, **SAMPLED).token_ids),
        }


def check_answers(output: Path, size: int, forms: dict[str, Path], names: Sequence[str]) -> None:
    """Every rank's answers to the checkpoints ``names``, and perhaps to the first two, streamed, at the end."""
    ranks: list[list[dict[str, Any]]] = [json.loads((output / f"{rank}.json").read_text()) for rank in range(size)]
    one = {name: expected(forms[name]) for name in {name.partition("-")[0] for name in names}}
    for place, name in enumerate((*names, *names[:2])[: len(ranks[0])]):
        whole = one[name.partition("-")[0]]
        for rank, found in enumerate(ranks):
            assert {key: found[place][key] for key in whole} == whole, (name, rank)
            if name.endswith(f"-mp{size}"):
                assert found[place]["files"] == [f"model{rank}-mp{size}.safetensors"]
        total = sum(found[place]["read"] for found in ranks)
        assert {found[place]["read_by_all"] for found in ranks} == {total}
        if place < len(names):  # kept after the first reading: no rank reads more than its share
            replicated = 1.5 if name.startswith("pico") else 2.5
            stored = open_checkpoint(forms[name.partition("-")[0]]).size_bytes
            assert max(found[place]["read"] for found in ranks) < replicated * stored / size


def test_two_ranks_of_torchrun(forms: dict[str, Path], tmp_path: Path) -> None:
    names = ("int4-mp2", "pico-mp2", "lite")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(DRIVER)]
    done = subprocess.run(
        [*command, "generate", str(tmp_path), *(str(forms[name]) for name in names)],
        capture_output=True,
        text=True,
        timeout=END_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    check_answers(tmp_path, 2, forms, names)


def test_four_ranks_that_nobody_watches_and_a_failure_that_ends_those_that_wait_and_those_that_hang(
    forms: dict[str, Path], tmp_path: Path
) -> None:
    names = ("pico-mp4", "int4")
    codes, said = by_hand(4, DRIVER, "generate_and_fail", tmp_path, *(forms[name] for name in names))
    assert codes == [1, 1, 1, 1]
    assert said.count("Error:") == 1
    assert "Traceback" not in said
    assert "Error: rank 1 of 4 (" in said
    assert "model1-mp4.safetensors: the file changed" in said
    check_answers(tmp_path, 4, forms, names)


def test_a_rank_that_is_killed_ends_the_others(forms: dict[str, Path], tmp_path: Path) -> None:
    done = launched(2, DRIVER, "die", tmp_path, forms["pico-mp2"])
    assert done.returncode == 1
    assert done.stderr.count("Error:") == 1
    assert "rank 1 of 2: ended by SIGKILL" in done.stderr


def test_the_command_starts_ranks_and_says_all_that_is_wrong_at_once(forms: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(forms["pico-mp2"], tmp_path / "broken", ignore=shutil.ignore_patterns("model1-*"))
    command = [sys.executable, "-m", "weightkit", "generate", "--ranks", "2", "--device", "cuda"]
    done = subprocess.run(
        [*command, str(tmp_path / "broken"), "--json"], capture_output=True, text=True, timeout=END_TIMEOUT_S
    )
    assert done.returncode == 1
    said = json.loads(done.stdout)
    assert said["error"] == "Problems"
    assert "not fit to run on 2 ranks (2 problems)" in said["message"]
    assert "model1-mp2.safetensors: no such file" in said["message"]
    assert "expected 2 GPUs, found 0" in said["message"]
    assert done.stderr.count("Error:") == 1


def test_the_command_prints_once_what_ranks_answer() -> None:
    command = [sys.executable, "-m", "weightkit", "generate", "--model", "pico", "--device", "cpu", "--ranks", "2"]
    done = subprocess.run(
        [*command, "--prompt", "6 乘 7 等于？"], capture_output=True, text=True, timeout=END_TIMEOUT_S
    )
    assert (done.returncode, done.stdout) == (0, "42\n")
    assert done.stderr.count("tokens in") == 1


# What is wrong with ranks, before anything is loaded


def test_pain_20_memory_is_checked_before_anything_is_loaded() -> None:
    with Runtime(shipped(), device="cpu") as runtime:
        needed = runtime.weights.packed_bytes

        def require(room: int, **options: Any) -> None:
            beside = divide(
                runtime.weights, tokens=64, sequences=1, most_tokens=4096, gpu_memory=None, host_memory=1 << 40
            ).working
            require_memory(runtime, 64, {"host_memory": beside + room, **options})

        require(needed)
        with pytest.raises(SpaceError, match=r"share of the weights does not fit(.|\n)*Use more ranks, or --stream"):
            require(needed - 1)
        require(needed - 1, stream=True)
        assert runtime.weights.bytes_read == 0


def report(rank: int, **fields: Any) -> RankReport:
    return replace(RankReport(World(rank, 8, rank % 4, 4, f"node{rank // 4}"), "1", "H100", "abc"), **fields)


def test_what_all_ranks_find_is_said_once_without_their_names() -> None:
    problems = (MissingFileError("no such file", where="/x/model3-mp8.safetensors"),)
    assert [str(problem) for problem in verdict([report(rank, problems=problems) for rank in range(8)])] == [
        "/x/model3-mp8.safetensors: no such file."
    ]


def test_what_some_ranks_find_is_said_once_with_theirs() -> None:
    def problems(rank: int) -> tuple[SpaceError, ...]:
        return (SpaceError("too little", where="GPU", found=7),) if rank in (1, 2, 3, 6) else ()

    found = verdict([report(rank, problems=problems(rank)) for rank in range(8)])
    assert [str(problem) for problem in found] == ["ranks 1-3, 6 (node0, node1): GPU: too little: found 7."]


@pytest.mark.parametrize(
    ("field", "what"), [("device", "devices"), ("versions", "versions"), ("source", "checkpoints")], ids=str
)
def test_ranks_that_differ_are_refused(field: str, what: str) -> None:
    reports = [report(rank, **({field: "other"} if rank == 5 else {})) for rank in range(8)]
    (problem,) = verdict(reports)
    assert problem.what == f"different {what} on the ranks"
    assert "other on rank 5" in str(problem.found)
    assert "on ranks 0-4, 6-7" in str(problem.found)


def test_a_checkpoint_that_was_not_opened_differs_from_none() -> None:
    assert verdict([report(rank, source=None if rank == 2 else "abc") for rank in range(8)]) == []


def test_each_rank_sees_the_gpu_of_its_local_rank_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    for visible, expected_device in ((None, "2"), ("4,5,6,7", "6"), ("GPU-a, GPU-b, GPU-c, GPU-d", "GPU-c")):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert take_device("auto", World(6, 8, 2, 4, "node1")) == "cuda"
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected_device
    with pytest.raises(DeviceError, match=r"node1: fewer GPUs than ranks.*expected 8 GPUs, found 4"):
        take_device("auto", World(10, 16, 2, 8, "node1"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert take_device("auto", World(6, 8, 2, 4, "node1")) == "cpu"


def test_another_number_of_ranks_than_torchrun_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(DeviceError, match=r"--ranks: .*another number of ranks: expected 2, found 4"):
        start(4, ["generate"])
    assert start(2, ["generate"]) is None  # it is one of them
