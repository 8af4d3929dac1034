"""Ranks all over a cluster: real processes on two raylets, over gloo."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from clusters import environment, second, wait_for
from tiny import V3, write_tiny

from weightkit.cli.options import without
from weightkit.cluster import ranks
from weightkit.cluster.connection import Node
from weightkit.cluster.ranks import Ended, Order, Post, _environment, run_ranks, share_out, start
from weightkit.errors import DeviceError, RankError
from weightkit.manifests import load
from weightkit.quantization import Settings, quantize


def node(name: str, cpus: float, gpus: float) -> Node:
    return Node(name, name, "127.0.0.1", cpus, gpus, 1e10)


@pytest.mark.parametrize(
    ("nodes", "ranks", "device", "expected"),
    [
        ([(64, 8), (64, 8)], None, "auto", [("0", 0, 8), ("1", 8, 8)]),
        ([(64, 2), (64, 8)], None, "cuda", [("1", 0, 8), ("0", 8, 2)]),
        ([(64, 8), (64, 8)], 9, "auto", [("0", 0, 8), ("1", 8, 1)]),
        ([(64, 8), (64, 8)], None, "cpu", [("0", 0, 1), ("1", 1, 1)]),
        ([(0, 0), (4, 0)], None, "auto", [("1", 0, 1)]),
        ([(2, 0), (4, 0)], 5, "auto", [("1", 0, 4), ("0", 4, 1)]),
    ],
)
def test_who_gets_how_many(
    nodes: list[tuple[int, int]], ranks: int | None, device: str, expected: list[tuple[str, int, int]]
) -> None:
    found = [node(str(number), *room) for number, room in enumerate(nodes)]
    posts = share_out(found, ranks, device)  # type: ignore[arg-type]
    assert [(post.node.id, post.first, post.count) for post in posts] == expected


@pytest.mark.parametrize(
    ("ranks", "device", "complaint"),
    [(9, "auto", "GPUs in the cluster as ranks: expected at most 8"), (5, "cpu", "CPUs .* at most 4")],
)
def test_more_ranks_than_room(ranks: int, device: str, complaint: str) -> None:
    with pytest.raises(DeviceError, match=complaint):
        share_out([node("0", 4, 8)], ranks, device)  # type: ignore[arg-type]


def test_ranks_ask_for_remote_sources_where_the_command_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://there.example")
    monkeypatch.setenv("HF_TOKEN", "secret")
    found = _environment([Post(node("0", 4, 1), 0, 1)], 1234)
    assert found["HF_ENDPOINT"] == "https://there.example"
    assert "HF_TOKEN" not in found


def test_the_ranks_own_command_line() -> None:
    given = ["quantize", "a", "--executor", "ray", "--bits=4", "--address=h:1", "--ranks", "2", "-q"]
    assert without(given, "--executor", "--address", "--ranks") == ["quantize", "a", "--bits=4", "-q"]


def test_what_ranks_of_a_node_say_and_how_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "END_S", 300.0)  # whoever fails first, the other gets to its own failure
    environment = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    shown = Order(("inspect", "pico", "--json"), tmp_path, environment, first=2, count=2)
    *news, ended = run_ranks(shown)
    said = [line for lines in news if isinstance(lines, list) for line in lines]
    assert {line.rank for line in said} == {2, 3}
    assert all(json.loads(line.line) and not line.is_error for line in said)
    assert ended == Ended()
    *news, ended = run_ranks(replace(shown, arguments=("inspect", "nothing")))
    assert ended == Ended(1, rank=2)
    assert all(line.is_error for lines in news if isinstance(lines, list) for line in lines)


def test_ranks_end_with_the_node_that_dies(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = load("pico").path
    assert shipped is not None
    monkeypatch.setenv("WEIGHTKIT_TEST", str(tmp_path))
    ended: list[BaseException] = []

    def serve() -> None:
        command = ["mirror", str(shipped), "--port", "0"]
        options = {"address": address, "device": "cpu", "sources": {}, "say": lambda said: None}
        try:
            start(command, ranks=None, **options)  # type: ignore[arg-type]
        except BaseException as exc:
            ended.append(exc)

    with second(address, cpus=1) as lost:
        thread = threading.Thread(target=serve)
        thread.start()
        wait_for("two ranks", lambda: len(ranks_running(tmp_path)) == 2)
        lost.kill()
        thread.join(180)
    assert not thread.is_alive()
    (failure,) = ended
    assert isinstance(failure, RankError)
    assert "died" in str(failure)
    wait_for("no rank is left", lambda: not ranks_running(tmp_path))


def ranks_running(test: Path) -> list[str]:
    """Ids of processes that are ranks, of the test whose folder WEIGHTKIT_TEST names: others may run beside it."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            is_rank = folder.name.isdigit() and b"run_module('weightkit'" in (folder / "cmdline").read_bytes()
            if is_rank and f"WEIGHTKIT_TEST={test}\0".encode() in (folder / "environ").read_bytes():
                found.append(folder.name)
        except OSError:
            continue
    return found


def test_quantize_on_two_nodes(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights as of one process."""
    small = replace(
        V3, hidden=64, moe=32, intermediate=64, shared=2, heads=4, q_lora=32, kv_lora=32, nope=16, rope=16, v=16
    )
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "source", replace(small, layers=2, experts=4, mtp_layers=0))
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 64, (257, 256), dtype=np.int32))
    size = {"samples": 257, "seq_len": 256}
    command = [
        sys.executable, "-m", "weightkit", "quantize", "source", "there", "--calibration", "tokens.npy",
        "--samples", "257", "--seq-len", "256", "--group-size", "16", "--device", "cpu", "--json",
        "--executor", "ray", "--address", address,
    ]  # fmt: skip
    with second(address, cpus=1):
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["matrices"] > 0
    quantize("source", "here", Settings(group_size=16), calibration="tokens.npy", device="cpu", progress=False, **size)  # type: ignore[arg-type]
    for path in Path("here").glob("*.safetensors"):
        assert path.read_bytes() == (Path("there") / path.name).read_bytes()
