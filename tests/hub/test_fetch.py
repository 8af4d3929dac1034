"""What is asked for is what comes: revisions, selections, targets, names, the command line; and the full size."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from faulty_hub import FaultyHub, Status
from fetching import FIRST, NAME, SIZE, WEIGHTS, content, get, require_whole, total
from tiny import write_safetensors, write_tiny

import weightkit
from weightkit import manifests
from weightkit.checkpoint.lock import Lock, LockedFile, read_lock
from weightkit.errors import FetchError, FormatError, ListingError, PlanError, Problems, RepositoryError, TargetError
from weightkit.examine import verify
from weightkit.hub import plan_fetch
from weightkit.hub.listing import RemoteFile, listing_from_json, make_listing
from weightkit.hub.state import FileStamp, with_check
from weightkit.remote.patience import Hiccup, Patience, wait_from_headers

# --- the lock ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hub", ["huggingface", "modelscope"])
def test_the_lock_says_where_every_file_is_from(
    hub: str, fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path
) -> None:
    get(tmp_path / "target", hub=hub)
    lock = read_lock(tmp_path / "target")
    assert lock is not None
    for path, data in content(fetch_source).items():
        assert lock.files[path] == LockedFile(len(data), hashlib.sha256(data).hexdigest())
    origin = lock.origin["fetch"]
    assert isinstance(origin, dict)
    assert (origin["hub"], origin["repo"]) == (hub, NAME)
    if hub == "huggingface":
        assert origin["commit"] == fetch_hub.commit(NAME)
        config = (fetch_source / "config.json").read_bytes()
        assert origin["git_sha1"]["config.json"] == hashlib.sha1(b"blob %d\0" % len(config) + config).hexdigest()
    else:
        assert origin["commit"].startswith("listing:")


def test_pinned_commit_is_kept_when_the_branch_moves(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    """An unfinished fetch goes on at its commit, and says so."""
    fetch_hub.fail(Status(500), path=WEIGHTS[1], times=None)
    with pytest.raises(FetchError):
        get(tmp_path / "target")
    fetch_hub.clear()
    before = fetch_hub.commit(NAME)
    fetch_hub.replace(NAME, WEIGHTS[1])
    done = get(tmp_path / "target")
    assert done.commit == before != fetch_hub.commit(NAME)
    assert "main has moved" in done.notes[0]
    require_whole(tmp_path / "target", fetch_source)


def test_another_revision_into_the_same_target(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    before = fetch_hub.commit(NAME)
    get(tmp_path / "target", revision=before)
    after = fetch_hub.replace(NAME, FIRST)
    with pytest.raises(TargetError, match="another revision"):
        get(tmp_path / "target", revision=after)
    get(tmp_path / "target", revision=before)
    require_whole(tmp_path / "target", fetch_source)
    get(tmp_path / "new", revision=after)
    assert content(tmp_path / "new") != content(fetch_source)


def test_another_model_into_the_same_target(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    get(tmp_path / "target")
    with pytest.raises(TargetError, match="another model"):
        get(tmp_path / "target", model="org/other")
    require_whole(tmp_path / "target", fetch_source)


def test_a_conversion_is_not_fetched_over(fetch_hub: FaultyHub, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target/weightkit.lock.json").write_bytes(Lock({}, {"plan": "abc"}).to_bytes())
    with pytest.raises(TargetError, match="what another command wrote"):
        get(tmp_path / "target")


# --- selections -------------------------------------------------------------------------------------------------------


def test_include_and_exclude(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    """A part first, the rest later: nothing twice, and the lock grows."""
    target = tmp_path / "target"
    get(target, include=["*.json", "inference/"])
    assert set(content(target)) == {"config.json", "inference/model.py"}
    assert set(read_lock(target).files) == set(content(target))  # type: ignore[union-attr]
    get(target, exclude=[WEIGHTS[2], "empty.txt"])
    assert set(content(target)) == set(content(fetch_source)) - {WEIGHTS[2], "empty.txt"}
    get(target)
    require_whole(target, fetch_source)
    assert fetch_hub.sent_bytes() == total(fetch_source)
    done = get(target, include=["*.json"])
    assert done.files == 1
    require_whole(target, fetch_source)


def test_nothing_selected(fetch_hub: FaultyHub, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no file is left.*--include \*\.bin"):
        get(tmp_path / "target", include=["*.bin"])


@pytest.fixture
def family(tmp_path: Path, fetch_hub: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FaultyHub, Path]]:
    """A checkpoint with its MTP layer in files of its own."""
    source = tmp_path / "family"
    written = write_tiny(source, shards=3)
    for path in source.glob("*.safetensors"):
        path.unlink()
    parts: list[dict[str, Any]] = [{}, {}, {}, {}]
    for number, (name, tensor) in enumerate(written.items()):
        parts[2 + number % 2 if name.startswith("model.layers.3.") else number % 2][name] = tensor
    names = [f"model-{n + 1:05d}-of-00004.safetensors" for n in range(4)]
    for name, part in zip(names, parts, strict=True):
        write_safetensors(source / name, part)
    weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    size = sum(len(data) for _, _, data in written.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with FaultyHub({NAME: source}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        yield hub, source


def test_no_mtp(family: tuple[FaultyHub, Path], tmp_path: Path) -> None:
    """Files of MTP tensors alone are left out, of them only headers are read, and the folder verifies."""
    hub, source = family
    target = tmp_path / "target"
    plan = plan_fetch(NAME, target, hub="huggingface", no_mtp=True)
    skipped = ["model-00003-of-00004.safetensors", "model-00004-of-00004.safetensors"]
    assert list(plan.skipped) == skipped
    get(target, no_mtp=True)
    assert set(content(target)) == set(content(source)) - set(skipped)
    report = verify(target, progress=False)
    assert not report.problems, report.problems
    assert json.loads((target / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert weightkit.open_checkpoint(target).tensors.keys() == {
        name for name in weightkit.open_checkpoint(source).tensors if not name.startswith("model.layers.3.")
    }
    requests = len(hub.requests(route="body"))
    assert get(target, no_mtp=True).fetched_bytes == {}
    assert len(hub.requests(route="body")) == requests
    get(target)  # and with them after all
    require_whole(target, source)
    assert not verify(target, progress=False).problems
    with pytest.raises(TargetError, match="with its MTP layers"):
        get(target, no_mtp=True)


def test_no_mtp_where_no_file_is_mtp_alone(
    fetch_hub: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "mixed"
    write_tiny(source, shards=1)
    with FaultyHub({NAME: source}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        done = get(tmp_path / "target", no_mtp=True)
    assert "nothing is left out" in done.notes[0]
    require_whole(tmp_path / "target", source)


def test_no_mtp_without_an_index(fetch_hub: FaultyHub, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"needs model\.safetensors\.index\.json"):
        get(tmp_path / "target", no_mtp=True)


# --- names ------------------------------------------------------------------------------------------------------------


def test_default_targets(
    fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert get(None, model=NAME).target == Path("weights/name")  # type: ignore[arg-type]
    require_whole(tmp_path / "weights/name", fetch_source)
    with FaultyHub({"deepseek-ai/DeepSeek-V3": fetch_source}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        done = get(None, model="deepseek-ai/DeepSeek-V3")  # type: ignore[arg-type]
    assert done.target == Path("weights/deepseek-v3/fp8")


def test_a_manifest_that_the_hub_disagrees_with(
    fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyHub({"deepseek-ai/DeepSeek-V3": fetch_source}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        with pytest.raises(Problems) as failure:
            get(tmp_path / "target", model="deepseek-v3")
    assert "expected 163, found 3" in str(failure.value)
    assert "Fetch it by its repository's name" in str(failure.value)
    assert not (tmp_path / "target").exists()


def test_a_model_that_ships_is_fetched_from_a_mirror_alone(
    fetch_hub: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pico, from a real mirror's id for it, is held to its manifest; a changed one is refused."""
    pico = manifests.load("pico").path
    assert pico is not None
    with FaultyHub({"weightkit/pico": pico}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        get(tmp_path / "target", model="pico")
        require_whole(tmp_path / "target", pico)
        assert not verify(tmp_path / "target", manifest="pico", progress=False).problems
        hub.replace("weightkit/pico", "model-00002-of-000004.safetensors")
        with pytest.raises(ListingError, match="another file than the manifest has"):
            get(tmp_path / "changed", model="pico")
    monkeypatch.delenv("HF_ENDPOINT")
    monkeypatch.delenv("MODELSCOPE_ENDPOINT")
    with pytest.raises(PlanError, match="ships with the package"):
        get(tmp_path / "other", model="pico")


@pytest.mark.parametrize("name", ["deepsek-v3", "a/b/c", "../x/y", "/x", "a/../b", ""])
def test_names_that_are_none(name: str, fetch_hub: FaultyHub, tmp_path: Path) -> None:
    with pytest.raises((PlanError, RepositoryError)):
        get(tmp_path / "target", model=name)
    assert not fetch_hub.requests(route="body")


@pytest.mark.parametrize("options", [{"jobs": 0}, {"max_rate": 0}, {"hub": "other"}])
def test_options_that_cannot_be(options: dict[str, Any], fetch_hub: FaultyHub, tmp_path: Path) -> None:
    with pytest.raises(PlanError):
        get(tmp_path / "target", **options)


def test_max_rate(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    get(tmp_path / "target", max_rate=2_000_000)
    assert total(fetch_source) / 2_000_000 - 0.5 < time.monotonic() - started < total(fetch_source) / 2_000_000 + 60
    require_whole(tmp_path / "target", fetch_source)


def test_large_files_are_fetched_in_ranges_at_once(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    """With more jobs than files, several streams share one."""
    get(tmp_path / "target", include=[FIRST], jobs=3)
    ranges = {exchange.range for exchange in fetch_hub.requests(path=FIRST, route="body")}
    assert ranges == {"bytes=0-524287", "bytes=524288-1048575", f"bytes=1048576-{SIZE - 1}"}
    assert (tmp_path / "target" / FIRST).read_bytes() == (fetch_source / FIRST).read_bytes()


def test_pages_of_a_listing(fetch_hub: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "many"
    source.mkdir()
    for number in range(25):
        (source / f"{number}.txt").write_text(str(number))
    with FaultyHub({NAME: source}, page_size=10) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        get(tmp_path / "target")
        assert len(hub.requests(route="tree")) == 3
    require_whole(tmp_path / "target", source)


# --- the command line -------------------------------------------------------------------------------------------------


def run(hub: FaultyHub, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"HF_ENDPOINT": hub.endpoint, "MODELSCOPE_ENDPOINT": hub.endpoint} | environment
    return subprocess.run(
        [sys.executable, "-m", "weightkit", "fetch", *arguments],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_command_line(fetch_hub: FaultyHub, fetch_source: Path, tmp_path: Path) -> None:
    done = run(fetch_hub, NAME, "--dry-run", "--hub", "huggingface", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:3] == [
        f"from       huggingface: {NAME} at main ({fetch_hub.commit(NAME)})",
        "served by  huggingface",
        "to         weights/name",
    ]
    assert not (tmp_path / "weights").exists()
    done = run(fetch_hub, NAME, "--hub", "huggingface", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("weights/name: 6 files, 4.5 MB, all verified; 4.5 MB from huggingface in ")
    assert done.stderr == ""
    require_whole(tmp_path / "weights/name", fetch_source)
    again = run(fetch_hub, NAME, "--json", cwd=tmp_path)
    value = json.loads(again.stdout)
    assert (value["files"], value["size_bytes"], value["fetched_bytes"]) == (6, total(fetch_source), {})
    assert run(fetch_hub, NAME, "-q", cwd=tmp_path).stdout == ""


def test_command_line_names_failures(fetch_hub: FaultyHub, tmp_path: Path) -> None:
    fetch_hub.fail(Status(404), path=FIRST, times=None)
    done = run(fetch_hub, NAME, "target", "--hub", "huggingface", cwd=tmp_path)
    assert done.returncode == 1
    assert "1 of 6 files could not be fetched; all others are in place" in done.stderr
    assert f"huggingface: {NAME}: {FIRST}: no such file (HTTP 404)" in done.stderr
    assert "Traceback" not in done.stderr
    value = json.loads(run(fetch_hub, "org/none", "target2", "--json", cwd=tmp_path).stdout)
    assert value["error"] in ("RepositoryError", "Problems")


def test_token_goes_only_to_the_hub_that_is_named(fetch_hub: FaultyHub, tmp_path: Path) -> None:
    done = run(fetch_hub, NAME, "--token", "secret", cwd=tmp_path)
    assert done.returncode == 2
    assert "--token needs --hub" in done.stderr
    fetch_hub._token = "secret"
    assert run(fetch_hub, NAME, "a", "--hub", "huggingface", "--token", "secret", cwd=tmp_path).returncode == 0
    assert run(fetch_hub, NAME, "b", "--hub", "huggingface", cwd=tmp_path, HF_TOKEN="secret").returncode == 0
    assert run(fetch_hub, NAME, "c", "--hub", "modelscope", cwd=tmp_path, MODELSCOPE_API_TOKEN="secret").returncode == 0
    refused = run(fetch_hub, NAME, "d", "--hub", "huggingface", cwd=tmp_path, HF_TOKEN="wrong")
    assert refused.returncode == 1
    assert "hf auth login" in refused.stderr


# --- the full size ----------------------------------------------------------------------------------------------------

FILES, FULL_BYTES = 163, 688_574_839_360


@pytest.fixture
def full_size(tmp_path: Path, fetch_hub: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyHub]:
    """The published number and size of files; the listing says so, the bytes are not there."""
    source = tmp_path / "full"
    source.mkdir()
    names = [f"model-{number:05d}-of-{FILES:06d}.safetensors" for number in range(1, FILES + 1)]
    for name in [*names, "config.json", "tokenizer.json"]:
        (source / name).write_text(name)
    with FaultyHub({"deepseek-ai/DeepSeek-V3": source}) as hub:
        for number, name in enumerate(names):
            hub.edit_listing(name, size=FULL_BYTES // FILES + 100_000, sha256=f"{number:064x}")
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.endpoint)
        yield hub


def test_full_size_is_planned_in_seconds(full_size: FaultyHub, tmp_path: Path) -> None:
    """163 files, 690 GB, on both hubs."""
    plan_fetch("deepseek-v3", tmp_path / "target")  # imports
    started = time.monotonic()
    plan = plan_fetch("deepseek-v3", tmp_path / "target")
    assert time.monotonic() - started < 60
    value = plan.to_json()
    assert value["files_to_fetch"] == FILES + 2
    assert value["left_bytes"] == pytest.approx(FULL_BYTES, rel=1e-3)
    assert value["serving"] == ["huggingface", "modelscope"]


def test_full_size_is_refused_for_want_of_space(full_size: FaultyHub, tmp_path: Path) -> None:
    done = run(full_size, "deepseek-v3", "target", cwd=tmp_path)
    assert done.returncode == 1
    assert "not enough free space" in done.stderr
    assert not full_size.sent_bytes()
    assert not (tmp_path / "target").exists()


def test_finished_full_size_is_done_in_seconds(full_size: FaultyHub, tmp_path: Path) -> None:
    """Sparse files with stamps as a fetch leaves them: none is read."""
    plan = plan_fetch("deepseek-v3", tmp_path / "target", hub="huggingface")
    plan.target.mkdir()
    stamps, locked = {}, {}
    for path, file in plan.files.items():
        with (plan.target / path).open("wb") as handle:
            handle.truncate(file.size_bytes)
        sha256 = file.sha256 or "0" * 64
        prefixes = bytes(8 * (file.size_bytes // (8 << 20) + 1))
        stamps[path] = asdict(FileStamp.of((plan.target / path).stat(), sha256, file.content, prefixes, 8 << 20))
        locked[path] = LockedFile(file.size_bytes, sha256)
    record = {"version": 1, "no_mtp": False, "listings": [plan.listing.to_json()], "stamps": stamps}
    (plan.target / ".weightkit.fetch.json").write_bytes(with_check(record))
    origin = {"fetch": {"repo": plan.listing.repo, "commit": plan.listing.commit}}
    (plan.target / "weightkit.lock.json").write_bytes(Lock(locked, origin).to_bytes())
    asked = len(full_size.log)
    started = time.monotonic()
    done = get(plan.target, model="deepseek-v3", hub="auto")
    assert time.monotonic() - started < 60
    assert (done.files, done.fetched_bytes) == (FILES + 2, {})
    assert [exchange.route for exchange in full_size.log[asked:]] == ["info"]


# --- listings and headers ---------------------------------------------------------------------------------------------


def remote(path: str = "a", size: int = 1, **hashes: str) -> RemoteFile:
    return RemoteFile(path, size, hashes.get("sha256", "0" * 64), hashes.get("git_sha1"))


@pytest.mark.parametrize(
    "files",
    [
        [],
        [remote(size=-1)],
        [remote(size=1 << 63)],
        [RemoteFile("a", True, "0" * 64)],
        [RemoteFile("a", 1, None)],
        [remote(sha256="0" * 63)],
        [remote(sha256="G" * 64)],
        [remote(sha256="A" * 64)],
        [RemoteFile("a", 1, None, "0" * 64)],
        [remote(), remote()],
        [remote("a"), remote("a/b")],
        [remote("a"), remote("a.partial")],
        [remote(".")],
        [remote("a/./b")],
        [remote("\ud800")],
        [remote("é" * 200)],
    ],
)
def test_listings_that_cannot_be_trusted(files: list[RemoteFile]) -> None:
    with pytest.raises(ListingError):
        make_listing("huggingface", "org/name", "main", "0" * 40, files)


def test_all_that_is_wrong_with_a_listing_is_told() -> None:
    with pytest.raises(Exception, match="2 problems") as failure:
        make_listing("huggingface", "org/name", "main", None, [remote("../a"), remote("b", -1)])
    assert "'../a'" in str(failure.value)
    assert "'b'" in str(failure.value)


def test_a_listing_is_read_back_as_it_was() -> None:
    files = [remote("a/b.txt", 0), RemoteFile("c", 7, None, "1" * 40)]
    listing = make_listing("modelscope", "org/name", "master", None, files)
    assert listing_from_json(json.loads(json.dumps(listing.to_json())), "x") == listing
    for damaged in (
        {},
        [],
        None,
        {**listing.to_json(), "hub": "other"},
        {**listing.to_json(), "files": {"a": {"x": 1}}},
    ):
        with pytest.raises(FormatError):
            listing_from_json(damaged, "x")
    with pytest.raises(ListingError):
        listing_from_json({**listing.to_json(), "files": {"../a": {"size_bytes": 1, "sha256": "0" * 64}}}, "x")


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7),
        ({"retry-after": "0.5"}, 0.5),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"RateLimit": '"api";r=3;t=55'}, None),
        ({"Retry-After": "2", "RateLimit": '"api";r=0;t=55'}, 2),
    ],
)
def test_waits_that_servers_ask_for(headers: dict[str, str], seconds: float | None) -> None:
    assert wait_from_headers(headers) == seconds


def test_backoff_doubles_up_to_a_limit_with_jitter() -> None:
    patience = Patience(backoff_s=1, longest_backoff_s=8)
    for failures, most in ((1, 1), (2, 2), (3, 4), (4, 8), (9, 8)):
        waits = [patience.wait_s(failures, Hiccup("x")) for _ in range(200)]
        assert most / 2 <= min(waits) < most * 0.6
        assert most * 0.9 < max(waits) <= most
    assert patience.wait_s(1, Hiccup("x", after_s=30)) == 30
