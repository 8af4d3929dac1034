"""What a mirror takes for verified, and what it refuses to serve at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mirrored import PICO, files_of, write_lock, write_locked
from tiny import write_tiny

from weightkit.checkpoint.folder import LOCK_NAME
from weightkit.errors import (
    ChecksumError,
    FormatError,
    MissingFileError,
    NotACheckpointError,
    PlanError,
    Problems,
    WeightkitError,
)
from weightkit.hub.mirror import Catalog, Repository, default_ids, hash_folder, open_repository, serve

NAME = "org/name"
SHARD = "model-00001-of-000003.safetensors"


def opened(folder: Path, *, full: bool = False) -> Repository:
    return open_repository(folder, [NAME], full=full, progress=False)


def flip(path: Path, at: int = -1) -> None:
    """One bit of a file changed, size, inode and modification time as before."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_what_the_lock_names(tmp_path: Path) -> None:
    folder = write_locked(tmp_path / "a")
    (folder / "later.txt").write_text("not in the lock")
    repository = opened(folder)
    expected = {name: content for name, content in files_of(folder).items() if name != "later.txt"}
    assert repository.files.keys() == expected.keys()
    for name, content in expected.items():
        assert repository.files[name].sha256 == hashlib.sha256(content).hexdigest()
        assert repository.files[name].size_bytes == len(content)
    assert repository.size_bytes == sum(map(len, expected.values()))


def test_the_lock_and_what_is_hidden_stay_inside(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_tiny(folder)
    for name in (".env", ".weightkit/journal", "x.partial", "y.incomplete", ".cache/huggingface/z"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("secret")
    write_lock(folder)  # it records all of them
    shutil.rmtree(folder / ".weightkit")
    assert opened(folder).files.keys() == {
        name for name in files_of(folder) if not name.endswith((".partial", ".incomplete"))
    }


def test_no_lock_is_verified_and_hashed(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_tiny(folder)
    (folder / "notes.bin").write_bytes(b"a pickle that no one looked at")
    repository = opened(folder)
    assert repository.files.keys() == files_of(folder).keys() - {"notes.bin"}
    assert repository.files[SHARD].sha256 == hashlib.sha256((folder / SHARD).read_bytes()).hexdigest()


def test_no_lock_and_problems_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    write_tiny(folder)
    (folder / SHARD).unlink()
    with pytest.raises(WeightkitError, match="no such file"):
        opened(folder)


def test_the_shipped_model_by_its_manifest(tmp_path: Path) -> None:
    assert opened(PICO).files.keys() == files_of(PICO).keys()
    assert opened(PICO).commit == hash_folder(PICO, [NAME]).commit


@pytest.mark.parametrize("break_it", ["missing", "truncated", "small changed", "link out", "damaged lock"])
def test_a_locked_folder_that_is_not_whole(tmp_path: Path, break_it: str) -> None:
    folder = write_locked(tmp_path / "a")
    shard, config = folder / SHARD, folder / "config.json"
    error: type[WeightkitError] = ChecksumError
    match break_it:
        case "missing":
            shard.unlink()
            error = MissingFileError
        case "truncated":
            os.truncate(shard, shard.stat().st_size - 1)
        case "small changed":
            flip(config)
        case "link out":
            shard.rename(tmp_path / "elsewhere")
            shard.symlink_to(tmp_path / "elsewhere")
            error = FormatError
        case _:
            lock = folder / LOCK_NAME
            lock.write_text(lock.read_text().replace(SHARD, "../" + SHARD))
            error = FormatError
    with pytest.raises(error):
        opened(folder)


def test_all_that_is_wrong_at_once(tmp_path: Path) -> None:
    folder = write_locked(tmp_path / "a")
    (folder / SHARD).unlink()
    flip(folder / "config.json")
    with pytest.raises(Problems) as raised:
        opened(folder)
    assert [type(problem) for problem in raised.value.problems] == [ChecksumError, MissingFileError]


def test_bit_rot_is_found_when_asked_for(tmp_path: Path) -> None:
    folder = write_locked(tmp_path / "a")
    flip(folder / SHARD)
    assert opened(folder).files  # the lock vouches for it; whoever fetches it will see the SHA-256
    with pytest.raises(ChecksumError, match="SHA-256"):
        opened(folder, full=True)


@pytest.mark.parametrize("what", ["nothing", "a file", "empty"])
def test_nothing_to_serve(tmp_path: Path, what: str) -> None:
    folder = tmp_path / "a"
    if what == "a file":
        folder.write_text("x")
    elif what == "empty":
        folder.mkdir()
    with pytest.raises(NotACheckpointError):
        opened(folder)


def test_the_commit_follows_from_the_content_alone(tmp_path: Path) -> None:
    one, other = write_locked(tmp_path / "one"), write_locked(tmp_path / "other", origin={"hub": "somewhere"})
    assert opened(one).commit == opened(other).commit
    assert len(opened(one).commit) == 40
    with (other / "config.json").open("a") as file:
        file.write("\n")
    write_lock(other)
    assert opened(one).commit != opened(other).commit


def test_the_commit_that_was_fetched_is_another_name_of_it(tmp_path: Path) -> None:
    origin = {"repo": "deepseek-ai/DeepSeek-V3", "commit": "f" * 40}
    repository = opened(write_locked(tmp_path / "a", origin={"fetch": origin}))
    assert all(map(repository.answers_to, ("f" * 40, "main", "master", repository.commit)))
    assert not repository.answers_to("e" * 40)
    assert repository.commit != "f" * 40
    assert default_ids(tmp_path / "a") == ("deepseek-ai/DeepSeek-V3", "weightkit/a")
    without_mtp = opened(write_locked(tmp_path / "b", origin={"fetch": {**origin, "no_mtp": True}}))
    assert not without_mtp.answers_to("f" * 40)  # its index is another


@pytest.mark.parametrize("edit", ["none", "touched", "changed"])
def test_what_was_touched_since_it_was_fetched_is_hashed_first(tmp_path: Path, edit: str) -> None:
    with serve({NAME: PICO}) as endpoint:
        fetched = subprocess.run(
            [sys.executable, "-m", "weightkit", "fetch", NAME, "a", "--hub", "huggingface"],
            env={**os.environ, "HF_ENDPOINT": endpoint},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert fetched.returncode == 0, fetched.stderr
    folder, shard = tmp_path / "a", tmp_path / "a/model-00001-of-000004.safetensors"
    if edit == "touched":
        shard.touch()
    elif edit == "changed":
        flip(shard)
    if edit == "changed":
        with pytest.raises(ChecksumError, match="changed after it was fetched"):
            opened(folder)
    else:
        assert opened(folder).commit == opened(PICO).commit
        assert files_of(folder) == files_of(PICO)


def test_a_snapshot_of_the_hub_clients_cache(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--org--name/blobs", tmp_path / "models--org--name/snapshots/abc"
    write_tiny(blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert opened(snapshot).files.keys() == files_of(blobs).keys()


def test_default_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTKIT_HOME", str(tmp_path / "home"))
    for name in ("home/deepseek-v3/fp8", "home/deepseek-v3/bf16-mp16", "home/other/fp8", "my-model", "odd name"):
        (tmp_path / name).mkdir(parents=True)
    assert default_ids(tmp_path / "home/deepseek-v3/fp8") == ("deepseek-ai/DeepSeek-V3", "weightkit/deepseek-v3-fp8")
    assert default_ids(tmp_path / "home/deepseek-v3/bf16-mp16") == ("weightkit/deepseek-v3-bf16-mp16",)
    assert default_ids(tmp_path / "home/other/fp8") == ("weightkit/fp8",)
    assert default_ids(tmp_path / "my-model") == ("weightkit/my-model",)
    assert default_ids(PICO) == ("weightkit/pico",)
    with pytest.raises(PlanError, match="--name weightkit/NAME="):
        default_ids(tmp_path / "odd name")


def test_two_folders_under_one_id(tmp_path: Path) -> None:
    one, other = write_locked(tmp_path / "one"), write_locked(tmp_path / "other")
    with pytest.raises(PlanError, match="under one id"):
        Catalog([opened(one), opened(other)])


def test_a_listing_of_full_size_is_read_at_once(tmp_path: Path) -> None:
    """163 files of 4.2 GB, sparse: none of their bytes is read, and the small index is."""
    names = [f"model-{number:05}-of-000163.safetensors" for number in range(1, 164)]
    for name in names:
        with (tmp_path / name).open("wb") as file:
            file.truncate(4_230_000_000)
    (tmp_path / "config.json").write_text("{}")
    files: dict[str, object] = {name: {"size_bytes": 4_230_000_000, "sha256": "0" * 64} for name in names}
    files["config.json"] = {"size_bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}
    (tmp_path / LOCK_NAME).write_text(json.dumps({"version": 1, "origin": {}, "files": files}))
    started = time.perf_counter()
    assert opened(tmp_path).size_bytes == 163 * 4_230_000_000 + 2
    assert time.perf_counter() - started < 100
