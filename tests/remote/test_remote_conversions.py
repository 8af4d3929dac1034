"""A source at an address makes the same bytes as the same files on a disk, and is held to its checksums."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from bucket import Store
from faulty_hub import FaultyHub, Throttle
from folders import tree
from web_server import Web

import weightkit as wk
from weightkit.checkpoint import Checkpoint
from weightkit.checkpoint.lock import read_lock
from weightkit.layouts import FileSet, lay_out_published
from weightkit.writer import execute, make_plan, summarize

LOCK = "weightkit.lock.json"
CONVERSIONS: Mapping[str, Callable[[Checkpoint], Checkpoint | FileSet]] = {
    "strip": wk.strip_mtp,
    "cast": lambda checkpoint: wk.cast(checkpoint, "bf16"),
    "shard": lambda checkpoint: wk.shard(wk.strip_mtp(checkpoint), mp=4),
    "shard-cast": lambda checkpoint: wk.shard(wk.cast(wk.strip_mtp(checkpoint), "bf16"), mp=2),
}
Addresses = dict[str, str]


@pytest.fixture
def addresses(hub: FaultyHub, store: Store, web: Web) -> Addresses:
    return {"hf": "hf://org/tiny", "s3": "s3://bucket/models/tiny", "http": web.url}


@pytest.fixture(scope="session")
def local_results(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Each conversion of the files on the disk; its lock, which names the source, left out."""
    found, checkpoint = {}, wk.open_checkpoint(tiny_source)
    for name, convert in CONVERSIONS.items():
        target = tmp_path_factory.mktemp("local") / name
        wk.write(convert(checkpoint), target, device="cpu", progress=False)
        found[name] = content(target)
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(folder).items() if name != LOCK}


def files_of(what: Checkpoint | FileSet) -> FileSet:
    return what if isinstance(what, FileSet) else lay_out_published(what)


@pytest.mark.parametrize("scheme", ["hf", "s3", "http"])
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_the_same_bytes_from_anywhere(
    conversion: str,
    scheme: str,
    addresses: Addresses,
    local_results: dict[str, dict[str, bytes]],
    tmp_path: Path,
) -> None:
    checkpoint = wk.open_checkpoint(addresses[scheme])
    written = wk.write(CONVERSIONS[conversion](checkpoint), tmp_path / "out", device="cpu", progress=False)
    assert content(tmp_path / "out") == local_results[conversion]
    assert {Path(path).name for path in written.verified} == {f"model-{n:05}-of-000003.safetensors" for n in (1, 2, 3)}
    assert written.unverified == ()
    assert "3 source files, each verified whole." in written.render()
    assert not (tmp_path / "out/.weightkit").exists()


@pytest.mark.parametrize("scheme", ["hf", "s3", "http"])
def test_by_ranges_alone(
    scheme: str, addresses: Addresses, local_results: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    checkpoint = wk.open_checkpoint(addresses[scheme])
    written = wk.write(CONVERSIONS["strip"](checkpoint), tmp_path / "out", progress=False, spool_bytes=0)
    assert content(tmp_path / "out") == local_results["strip"]
    assert written.verified == ()
    assert "Not verified whole: 3 of 3 source files (model-00001-of-000003.safetensors," in written.render()


@pytest.mark.parametrize("scheme", ["hf", "s3", "http"])
def test_rank_files_merge(scheme: str, tiny_source: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    wk.write(wk.shard(wk.strip_mtp(wk.open_checkpoint(tiny_source)), mp=4), tmp_path / "mp4", progress=False)
    wk.write(wk.merge(wk.open_checkpoint(tmp_path / "mp4")), tmp_path / "local", progress=False)
    if scheme == "hf":
        with FaultyHub({"org/ranks": tmp_path / "mp4"}) as running:
            request.getfixturevalue("monkeypatch").setenv("HF_ENDPOINT", running.endpoint)
            merge("hf://org/ranks", tmp_path / "out")
    elif scheme == "s3":
        request.getfixturevalue("store").put_folder("ranks", tmp_path / "mp4")
        merge("s3://bucket/ranks", tmp_path / "out")
    else:
        web = request.getfixturevalue("web")
        web.folder = tmp_path / "mp4"
        merge(web.url, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "local")


def merge(address: str, target: Path) -> None:
    written = wk.write(wk.merge(wk.open_checkpoint(address)), target, progress=False)
    assert len(written.verified) == 4


def test_the_source_is_recorded_with_its_commit(hub: FaultyHub, tmp_path: Path) -> None:
    wk.write(wk.strip_mtp(wk.open_checkpoint("hf://org/tiny@main")), tmp_path / "out", progress=False)
    lock = read_lock(tmp_path / "out")
    assert lock is not None
    source = str(lock.origin["source"])
    assert source.startswith("hf://org/tiny@")
    assert len(source.rpartition("@")[2]) == 40


def test_each_source_byte_comes_once(hub: FaultyHub, tiny_source: Path, tmp_path: Path) -> None:
    """Ranks read each source file at many places; it is fetched once, and beyond it only headers and small files."""
    plan = make_plan(files_of(CONVERSIONS["shard"](wk.open_checkpoint("hf://org/tiny"))), tmp_path / "out")
    before = hub.sent_bytes(path="*.safetensors")
    total = sum(path.stat().st_size for path in tiny_source.glob("*.safetensors"))
    written = execute(plan, progress=False)
    assert written.read_bytes == total
    assert hub.sent_bytes(path="*.safetensors") - before == total


def test_a_dry_run_says_what_will_be_fetched(hub: FaultyHub, tiny_source: Path, tmp_path: Path) -> None:
    plan = make_plan(files_of(CONVERSIONS["shard"](wk.open_checkpoint("hf://org/tiny"))), tmp_path / "out")
    total = sum(path.stat().st_size for path in tiny_source.glob("*.safetensors"))
    summary = summarize(plan)
    assert (summary.spooled_files, summary.spooled_bytes, summary.spool_bytes) == (3, total, total)
    assert "fetch      3 files, 3.5 MB, each verified whole; at most 3.5 MB on the disk at a time" in summary.render()
    assert "ranges     of 3 remote files, not verified whole" in summarize(plan, spool_bytes=0).render()
    assert summarize(plan).jobs >= 4, "all ranks at once, else each source file would be fetched again for the others"


def test_without_recorded_checksums_nothing_is_spooled(web: Web, tiny_source: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in tiny_source.iterdir():
        if path.is_file() and path.name != LOCK:
            (bare / path.name).write_bytes(path.read_bytes())
    web.folder = bare
    written = wk.write(wk.strip_mtp(wk.open_checkpoint(web.url)), tmp_path / "out", progress=False)
    assert len(written.unverified) == 3


def test_commands_take_an_address(hub: FaultyHub, tiny_source: Path, tmp_path: Path) -> None:
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "weightkit", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = run("shard", "hf://org/tiny", "--mp", "2", "-q", "--json")
    assert len(json.loads(said)["verified"]) == 3
    assert sorted(path.name for path in (tmp_path / "tiny-mp2").glob("*.safetensors")) == [
        "model0-mp2.safetensors",
        "model1-mp2.safetensors",
    ]
    found = json.loads(run("inspect", "hf://org/tiny", "--json"))
    assert (found["name"], found["layout"], found["files"]) == ("tiny", "published", 3)


def test_a_killed_command_goes_on(hub: FaultyHub, tiny_source: Path, tmp_path: Path) -> None:
    """What the spool holds is fetched no second time: ranks wait for the first file, and the others lie there whole."""
    sizes = [path.stat().st_size for path in sorted(tiny_source.glob("*.safetensors"))]
    hub.fail(Throttle(1000, 256, after=300_000), path="*-00001-*.safetensors", times=None)  # its header comes
    command = [sys.executable, "-m", "weightkit", "shard", "hf://org/tiny", "out", "--mp", "2", "-q"]
    environment, spool = os.environ | {"HF_ENDPOINT": hub.endpoint}, tmp_path / "out/.weightkit/spool"
    with subprocess.Popen(command, cwd=tmp_path, env=environment) as process:
        try:
            deadline = time.monotonic() + 120
            while not {path.stat().st_size for path in spool.glob("*")}.issuperset(sizes[1:]):
                assert process.poll() is None, "it ended by itself"
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            process.kill()
    hub.clear()
    hub.log.clear()
    subprocess.run(command, cwd=tmp_path, env=environment, timeout=300, check=True)
    wk.write(wk.shard(wk.open_checkpoint(tiny_source), mp=2), tmp_path / "local", device="cpu", progress=False)
    assert content(tmp_path / "out") == content(tmp_path / "local")
    headers = 3 * (256 << 10)  # with what follows them, which one request brings
    assert hub.sent_bytes(path="*.safetensors") <= sizes[0] + headers


def test_verify_reads_what_is_there(addresses: Addresses) -> None:
    for address in addresses.values():
        report = wk.verify(address, progress=False)
        assert report.ok, report.render()
        assert report.hashed_bytes > 3_000_000
        quick = wk.verify(address, quick=True, progress=False)
        assert quick.ok
        assert quick.hashed_bytes == 0


def test_verify_names_a_file_with_other_bytes(store: Store, tiny_source: Path) -> None:
    name = "model-00002-of-000003.safetensors"
    damaged = bytearray((tiny_source / name).read_bytes())
    damaged[-5] ^= 1
    store.put(f"models/tiny/{name}", bytes(damaged))
    report = wk.verify("s3://bucket/models/tiny", progress=False)
    assert [(type(p).__name__, p.where) for p in report.problems] == [
        ("ChecksumError", f"s3://bucket/models/tiny/{name}")
    ]
    assert report.problems[0].found == hashlib.sha256(damaged).hexdigest()


def test_text_from_an_address_is_the_same(hub: FaultyHub, tiny_source: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 2, "chat": False, "device": "cpu", "progress": False}
    here = wk.generate(tiny_source, [1, 2, 3], **options)
    there = wk.generate("hf://org/tiny", [1, 2, 3], **options)
    assert there.token_ids == here.token_ids
