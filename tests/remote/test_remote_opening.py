"""What an address opens, what it is called, and what is said where nothing can be had from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from bucket import Store
from faulty_hub import FaultyHub, gated
from web_server import Web

import weightkit as wk
from weightkit.checkpoint.header import HeaderLengthError, read_header
from weightkit.checkpoint.remote import locate
from weightkit.errors import (
    AccessError,
    ContentError,
    NotACheckpointError,
    Problems,
    RepositoryError,
    UnreachableError,
    WeightkitError,
)
from weightkit.remote.address import address_of, title_of
from weightkit.remote.path import RemotePath, as_path
from weightkit.workspace import target

FILES = [f"model-{n:05}-of-000003.safetensors" for n in (1, 2, 3)]


def test_an_address_survives_pathlib() -> None:
    for given in ("hf://org/name@main", Path("hf://org/name@main"), as_path("hf://org/name@main/")):
        assert address_of(given) == "hf://org/name@main"
    assert address_of("https://host:8000//a///b/") == "https://host:8000/a/b"
    assert address_of(Path("weights/deepseek-v3")) is None
    assert address_of("hf:/org/name") is None, "one slash alone is a local path's"


def test_a_local_folder_that_looks_like_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf:/org/name").mkdir(parents=True)
    assert address_of(Path("hf:/org/name")) is None
    assert address_of("hf://org/name") == "hf://org/name"


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("hf://deepseek-ai/DeepSeek-V3", "DeepSeek-V3-mp8"),
        ("hf://deepseek-ai/DeepSeek-V3@refs/pr/7", "DeepSeek-V3-mp8"),
        ("hf://org/many/small", "small-mp8"),
        ("s3://bucket/models/v3/", "v3-mp8"),
        ("s3://bucket", "bucket-mp8"),
        ("https://host/pub/v3/model.safetensors", "v3-mp8"),
    ],
)
def test_the_name_of_what_is_made_from_it(address: str, name: str) -> None:
    assert target("deepseek-v3", Path(address), ["mp8"]) == Path(name)
    assert f"{title_of(as_path(address.removesuffix('/model.safetensors')))}-mp8" == name


def test_the_commit_is_pinned(hub: FaultyHub, tiny_source: Path) -> None:
    commit = hub.commit("org/tiny")
    checkpoint = wk.open_checkpoint("hf://org/tiny")
    assert str(checkpoint.root) == f"hf://org/tiny@{commit}"
    assert set(checkpoint.stamps) == {f"hf://org/tiny@{commit}/{name}" for name in FILES}
    assert checkpoint.side_files["inference/model.py"].read() == b"x = 1\n"
    assert set(checkpoint.side_files) == set(wk.open_checkpoint(tiny_source).side_files)


def test_headers_take_a_request_each(hub: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weightkit.remote.ranges.PIECE_BYTES", 8 << 20)
    wk.open_checkpoint("hf://org/tiny")
    assert len(hub.requests(path="*.safetensors")) == 3
    monkeypatch.setattr("weightkit.checkpoint.header.FIRST_BYTES", 100)  # a header longer than what is read first
    hub.log.clear()
    assert len(wk.open_checkpoint("hf://org/tiny").tensors) == 239
    assert len(hub.requests(path="*.safetensors")) == 6


def test_one_file_of_a_folder(hub: FaultyHub, store: Store, web: Web) -> None:
    for address in ("hf://org/tiny", "s3://bucket/models/tiny", web.url):
        checkpoint = wk.open_checkpoint(f"{address}/{FILES[1]}")
        assert checkpoint.layout == "single file"
        assert len(checkpoint.stamps) == 1


def test_a_web_folder_without_a_lock(web: Web, tiny_source: Path, tmp_path: Path) -> None:
    """The index names the weights; a page of links names other files."""
    for path in tiny_source.iterdir():
        if path.is_file() and path.name != "weightkit.lock.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "notes.txt").write_text("x")
    web.folder = tmp_path
    assert "notes.txt" not in wk.open_checkpoint(web.url).side_files
    web.page = '<a href="../">up</a> <A HREF="notes.txt">notes</a> <a href="gone.txt">gone</a> <a href="sub/">sub</a>'
    checkpoint = wk.open_checkpoint(web.url)
    assert checkpoint.side_files["notes.txt"].read() == b"x"
    assert "gone.txt" not in checkpoint.side_files


def test_a_server_without_ranges(web: Web) -> None:
    web.ranges = False
    with pytest.raises(UnreachableError, match="ignores Range, so nothing but whole files") as caught:
        wk.open_checkpoint(web.url)
    assert caught.value.where == f"{web.url}/{FILES[0]}"
    assert not any(spelled is None and path.endswith(".safetensors") for path, spelled in web.requests)


def refused(address: str, kind: type[WeightkitError]) -> str:
    with pytest.raises(kind) as caught:
        wk.open_checkpoint(address)
    return str(caught.value)


def test_what_a_hub_refuses(hub: FaultyHub) -> None:
    assert "no such repository, or a private one" in refused("hf://org/nothing", RepositoryError)
    assert "no such revision" in refused("hf://org/tiny@v9", RepositoryError)
    assert "no such file or folder" in refused("hf://org/tiny/sub", RepositoryError)
    assert "owner/name" in refused("hf://tiny", NotACheckpointError)
    hub.fail(gated(), route="info", times=None)
    assert "a gated repository" in refused("hf://org/tiny", AccessError)


def test_a_token_is_sent_to_the_hub_alone(hub: FaultyHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from faulty_hub import Redirect

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.fail(Redirect(), path="*.safetensors", times=None)
    wk.open_checkpoint("hf://org/tiny")
    tokens = {(request.server, request.authorization) for request in hub.log}
    assert tokens == {("hub", "Bearer hf_secret"), ("storage", None)}


def test_a_hub_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "does not answer" in refused("hf://org/tiny", UnreachableError)


def test_what_a_store_refuses(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such bucket, folder or file" in refused("s3://nobucket/models", RepositoryError)
    assert "no files there" in refused("s3://bucket/nothing", RepositoryError)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    __import__("s3fs").S3FileSystem.clear_instance_cache()
    said = refused("s3://bucket/models/tiny", AccessError)
    assert "no credentials" in said
    assert "AWS_ACCESS_KEY_ID" in said


def test_what_a_web_server_refuses(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no checkpoint in this folder" in refused(web.url + "/nothing", RepositoryError)
    web.password = "secret"
    assert "access refused (HTTP 401)" in refused(web.url, AccessError)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert len(wk.open_checkpoint(web.url).tensors) == 239


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("gs://bucket/model", "nothing is read from"),
        ("https://host/model?sig=1", "an address with a query"),
        ("https://me:secret@host/model", "a name or password in an address"),
    ],
)
def test_addresses_that_are_not_read(address: str, what: str) -> None:
    said = refused(address, NotACheckpointError)
    assert what in said
    assert "secret" not in said
    assert "sig=1" not in said


@pytest.mark.parametrize("package", ["s3fs", "fsspec"])
def test_the_extra_is_named_where_it_is_missing(package: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "import weightkit as wk\n"
        "try: wk.open_checkpoint('s3://bucket/model')\n"
        "except wk.WeightkitError as exc: print(type(exc).__name__, exc)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.startswith("UnreachableError s3://bucket/model: a package that reads it is missing")
    assert "pip install 'weightkit[remote]'" in done.stdout


def test_a_small_file_with_other_bytes_than_are_listed(hub: FaultyHub) -> None:
    from faulty_hub import Flip

    hub.fail(Flip(at=3), path="config.json", times=None)
    assert "other bytes than the source records" in refused("hf://org/tiny", ContentError)


def test_all_damaged_headers_are_told_at_once(store: Store) -> None:
    for name in FILES[:2]:
        store.put(f"models/tiny/{name}", b"\xff" * 64)
    with pytest.raises(Problems) as caught:
        wk.open_checkpoint("s3://bucket/models/tiny")
    assert [type(problem) for problem in caught.value.problems[:2]] == [HeaderLengthError] * 2


def test_a_remote_path_answers_as_a_local_one(web: Web, tiny_source: Path) -> None:
    there, here = locate(web.url), tiny_source
    assert isinstance(there, RemotePath)
    assert sorted(p.name for p in there.iterdir()) == sorted(p.name for p in here.iterdir())
    assert sorted(p.name for p in there.glob("*.safetensors")) == FILES
    assert (there / "inference").is_dir()
    assert not (there / "inference").is_file()
    assert (there / "config.json").read_text() == (here / "config.json").read_text()
    assert (there / "config.json").stat().st_size == (here / "config.json").stat().st_size
    with pytest.raises(FileNotFoundError):
        (there / "nothing").read_bytes()
    assert read_header(there / FILES[0]).entries == read_header(here / FILES[0]).entries
