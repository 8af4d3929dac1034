"""Several processes that quantize one checkpoint write the bytes that one alone writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantizing import small, weight_files, write_tokens
from tiny import V3, write_tiny

from weightkit.errors import SpaceError
from weightkit.layouts import open_checkpoint
from weightkit.quantization import QuantizationReport, Settings, activations, job
from weightkit.quantization.layer import _parts
from weightkit.ranks.ranks import Ranks

DRIVER = Path(__file__).with_name("quantize_driver.py")
KINDS = ("experts", "all", "rtn")


def drive(*arguments: object, launcher: tuple[str, ...] = ()) -> tuple[dict[str, Any], str]:
    """What the driver found, and what it wrote to standard error."""
    done = subprocess.run(
        [sys.executable, *launcher, str(DRIVER), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[0]), done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, tokens for 4 batches of 2 sequences, and in ``1`` what one process makes of them."""
    path = tmp_path_factory.mktemp("ranks")
    write_tiny(path / "source", small(V3, experts=4))
    write_tokens(path / "tokens.npy", 8, 32)
    found, _ = drive("ranks", 1, path / "source", path / "tokens.npy", path / "1")
    assert found == {"runs": [0]}
    return path


@pytest.fixture(scope="module")
def three(folder: Path) -> Path:
    """What three ranks make of them, in turns of 3 experts and of 1."""
    found, _ = drive("ranks", 3, folder / "source", folder / "tokens.npy", folder / "3")
    assert found == {"runs": [0, 0, 0]}
    return folder / "3"


@pytest.mark.parametrize("kind", KINDS)
def test_three_ranks(kind: str, folder: Path, three: Path) -> None:
    assert weight_files(three / kind) == weight_files(folder / "1" / kind)
    same_report(three / kind, folder / "1" / kind)


def test_two_ranks_under_torchrun(folder: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    found, _ = drive("rank", folder / "source", folder / "tokens.npy", folder / "2", launcher=launcher)
    assert set(found["reports"]) == set(KINDS)
    for kind in KINDS:
        assert weight_files(folder / "2" / kind) == weight_files(folder / "1" / kind)
        same_report(folder / "2" / kind, folder / "1" / kind)


@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=4), step=st.integers(1, 12))
def test_steps_through_what_several_have(counts: list[int], step: int) -> None:
    """Together and in their order they are all that there is, each step but the last as long as it may be."""
    owned = [[(rank, number) for number in range(count)] for rank, count in enumerate(counts)]
    steps = [
        [
            thing
            for things, part in zip(owned, _parts(counts, first, first + step), strict=True)
            for thing in things[part]
        ]
        for first in range(0, sum(counts), step)
    ]
    assert [thing for taken in steps for thing in taken] == [thing for things in owned for thing in things]
    assert all(len(taken) == step for taken in steps[:-1])


def same_report(ours: Path, theirs: Path) -> None:
    """Tokens and damping of every matrix are equal; errors are measured on samples, of the first rank's tokens where
    all ranks' are in a Hessian."""
    for mine, other in zip(matrices(ours), matrices(theirs), strict=True):
        assert (mine.name, mine.tokens, mine.damping, mine.method) == (
            other.name,
            other.tokens,
            other.damping,
            other.method,
        )
        assert mine.error == pytest.approx(other.error, rel=1e-4 if mine.expert is not None else 0.3)


def matrices(folder: Path) -> Iterator[Any]:
    yield from QuantizationReport.load(folder / "quantization_report.json").matrices


def test_a_rank_that_dies_and_other_numbers_that_continue(folder: Path) -> None:
    """The others end at once, what is finished stays, and any number of ranks goes on with it; a rerun of a finished
    target ends well on all of them."""
    target = folder / "killed"
    found, errors = drive("killed-ranks", folder / "source", folder / "tokens.npy", target)
    assert found["died"] == "solve"
    assert found["left"] == ["after-00001.bin", "layer-00000.json", "layer-00001.json"]
    assert found["runs"] == [[None, 1], [0, 0, 0], [0, 0]]
    assert "another rank is gone" in errors
    assert weight_files(target) == weight_files(folder / "1/experts")
    assert QuantizationReport.load(target / "quantization_report.json").resumed_layers == (1,)


def command(folder: Path, ranks: int, target: Path, *options: object) -> tuple[list[int], str]:
    """Exit codes and standard error of ``weightkit quantize`` on so many ranks."""
    tokens = ["--calibration", folder / "tokens.npy", "--seq-len", 32, "--group-size", 16, "--device", "cpu", "-q"]
    found, errors = drive("command", ranks, "quantize", folder / "source", target, *tokens, *options)
    return found["runs"], errors


def test_more_ranks_than_batches(folder: Path) -> None:
    """4 sequences are 2 batches here."""
    codes, errors = command(folder, 3, folder / "many", "--samples", 4)
    assert codes == [1, 1, 1]
    assert "fewer batches of calibration tokens than ranks: expected at most 2 ranks, found 3." in errors
    assert "Traceback" not in errors
    assert not (folder / "many").exists()


def test_a_target_that_the_first_rank_refuses(folder: Path) -> None:
    """It says so, once; the others do not wait for it."""
    (folder / "taken").mkdir()
    (folder / "taken/model-00001-of-000005.safetensors").write_bytes(b"something else")
    codes, errors = command(folder, 2, folder / "taken", "--samples", 8)
    assert codes == [1, 0]
    assert errors.count("Error: ") == 1
    assert "holds files that this would mix with or overwrite" in errors


def test_a_target_that_the_system_refuses_the_first_rank(folder: Path) -> None:
    """The others are told: NCCL, in which they would wait, does not notice that a rank has ended."""
    codes, errors = command(folder, 2, folder / ("long" * 100), "--samples", 8)
    assert codes == [1, 0]
    assert errors.count("Error: ") == 1
    assert "File name too long" in errors


def test_a_dry_run_is_printed_once(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(DRIVER), "command", "2", "quantize", str(folder / "source"), str(folder / "dry"),
         "--calibration", str(folder / "tokens.npy"), "--samples", "8", "--seq-len", "32", "--group-size", "16",
         "--device", "cpu", "--dry-run"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900, check=True,
    )  # fmt: skip
    assert done.stdout.count("calibrated ") == 1
    assert "2 ranks" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == {"runs": [0, 0]}


def test_ranks_of_a_machine_share_its_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"calibration": folder / "tokens.npy", "samples": 8, "seq_len": 32, "device": "cpu"}
    checkpoint = open_checkpoint(folder / "source")

    def needed() -> int:
        calibrated = job.prepare(checkpoint, folder / "memory", Settings(group_size=16), **asked).calibrated  # type: ignore[arg-type]
        assert calibrated is not None
        return calibrated.memory.host

    told = {"RANK": 2, "LOCAL_RANK": 2, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(Ranks, "join", lambda _: Ranks(2, 4))
    monkeypatch.setattr(activations, "BATCH_TOKENS", 64)
    room = 4 * needed()
    monkeypatch.setattr(job, "available_memory_bytes", lambda: room)
    assert needed() == room // 4
    monkeypatch.setattr(job, "available_memory_bytes", lambda: room - 4)
    with pytest.raises(SpaceError, match="not enough host memory"):
        needed()
