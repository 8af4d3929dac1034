"""Sources on a web server and on a hub, read by tasks of a real Ray cluster."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from folders import tree
from tiny import write_tiny

sys.path.insert(0, str(Path(__file__).parent.parent / "hub"))
sys.path.insert(0, str(Path(__file__).parent.parent / "remote"))

from faulty_hub import FaultyHub
from mirrored import write_lock
from web_server import web_server

import weightkit as wk
from weightkit.cluster import RayExecutor


@pytest.fixture(scope="module")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote") / "tiny"
    write_tiny(folder)
    write_lock(folder)
    return folder


def require_the_same(source: str, address: str, folder: Path) -> None:
    """What tasks write is what this process writes; they verify no file whole, which is said."""
    what = wk.shard(wk.cast(wk.open_checkpoint(source), "bf16"), mp=2)
    here = wk.write(what, folder / "here", device="cpu", progress=False)
    there = wk.write(what, folder / "there", executor=RayExecutor(address), progress=False)
    assert tree(folder / "there") == tree(folder / "here")
    assert there.unverified == here.verified
    assert len(there.unverified) == 3
    assert there.read_bytes > 0


def test_a_web_server(tiny_source: Path, address: str, tmp_path: Path) -> None:
    with web_server(tiny_source) as web:
        require_the_same(web.url, address, tmp_path)


def test_a_hub_that_only_the_command_was_told_of(
    tiny_source: Path, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster was started without HF_ENDPOINT."""
    with FaultyHub({"org/tiny": tiny_source}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        require_the_same("hf://org/tiny", address, tmp_path)
