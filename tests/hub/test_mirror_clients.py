"""The hubs' own clients, as their users start them, against the mirror: the same bytes, the same errors as from the
hubs."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_hub import FaultyHub
from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from mirrored import PICO, files_of

from weightkit.hub.mirror import serve

NAME = "weightkit/pico"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with serve({NAME: PICO}) as running:
        yield running


def run_client(tmp_path: Path, endpoint: str, *command: str) -> str:
    """Run a client in a process of its own: it reads its environment when it is imported."""
    done = subprocess.run(
        [sys.executable, *command],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "HF_HOME": str(tmp_path / "hf"),
            "HF_ENDPOINT": endpoint,
            "MODELSCOPE_ENDPOINT": endpoint,
            "MODELSCOPE_CACHE": str(tmp_path / "modelscope"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_huggingface_snapshot_download(tmp_path: Path, endpoint: str) -> None:
    code = "import sys, huggingface_hub as h; print(h.snapshot_download(sys.argv[1], local_dir=sys.argv[2]))"
    run_client(tmp_path, endpoint, "-c", code, NAME, str(tmp_path / "there"))
    assert files_of(tmp_path / "there") == files_of(PICO)


def test_huggingface_cache_and_pinned_commit(tmp_path: Path, endpoint: str) -> None:
    commit = HfApi(endpoint=endpoint).model_info(NAME).sha or ""
    code = "import sys, huggingface_hub as h; print(h.snapshot_download(sys.argv[1], revision=sys.argv[2]))"
    snapshot = Path(run_client(tmp_path, endpoint, "-c", code, NAME, commit).strip())
    assert snapshot.name == commit
    assert files_of(snapshot) == files_of(PICO)


def test_hf_download(tmp_path: Path, endpoint: str) -> None:
    there = str(tmp_path / "there")
    run_client(tmp_path, endpoint, "-m", "huggingface_hub.cli.hf", "download", NAME, "--local-dir", there)
    assert files_of(tmp_path / "there") == files_of(PICO)


def test_modelscope_snapshot_download(tmp_path: Path, endpoint: str) -> None:
    code = "import sys, modelscope as m; print(m.snapshot_download(sys.argv[1], local_dir=sys.argv[2]))"
    run_client(tmp_path, endpoint, "-c", code, NAME, str(tmp_path / "there"))
    assert files_of(tmp_path / "there") == files_of(PICO)


def test_modelscope_hub_lists_and_verifies(tmp_path: Path, endpoint: str) -> None:
    code = """
import sys
from modelscope_hub import HubApi
api = HubApi()
for file in api.list_repo_files(sys.argv[1], "model"):
    print(file.path, file.size, file.sha256)
    api.download_file(sys.argv[1], "model", file.path, local_dir=sys.argv[2], file_size=file.size,
                      expected_sha256=file.sha256)
"""
    printed = run_client(tmp_path, endpoint, "-c", code, NAME, str(tmp_path / "there"))
    contents = files_of(PICO)
    listed = {tuple(line.split()) for line in printed.splitlines() if line.count(" ") == 2}
    assert listed == {(p, str(len(c)), hashlib.sha256(c).hexdigest()) for p, c in contents.items()}
    assert files_of(tmp_path / "there") == contents


def test_a_second_run_fetches_nothing_again(tmp_path: Path) -> None:
    code = "import sys, huggingface_hub as h; print(h.snapshot_download(sys.argv[1], local_dir=sys.argv[2]))"
    with FaultyHub({NAME: PICO}) as hub:
        for _ in range(2):
            run_client(tmp_path, hub.endpoint, "-c", code, NAME, str(tmp_path / "there"))
        assert hub.sent_bytes() == sum(map(len, files_of(PICO).values()))


def test_what_the_hub_api_says(endpoint: str) -> None:
    api, contents = HfApi(endpoint=endpoint), files_of(PICO)
    info = api.model_info(NAME, files_metadata=True)
    assert {sibling.rfilename: sibling.size for sibling in info.siblings or []} == {
        p: len(c) for p, c in contents.items()
    }
    for sibling in info.siblings or []:
        assert (sibling.lfs is not None) == sibling.rfilename.endswith(".safetensors")
        if sibling.lfs is not None:
            assert sibling.lfs.sha256 == hashlib.sha256(contents[sibling.rfilename]).hexdigest()
    (entry,) = api.get_paths_info(NAME, "model-00001-of-000004.safetensors", revision=info.sha)
    assert entry.path == "model-00001-of-000004.safetensors"
    assert api.list_repo_files(NAME) == sorted(contents)
    assert api.file_exists(NAME, "config.json")
    assert not api.file_exists(NAME, "nothing")
    assert api.repo_exists(NAME)
    assert [ref.target_commit for ref in api.list_repo_refs(NAME).branches] == [info.sha]
    assert [model.id for model in api.list_models()] == [NAME]


def test_ranges_that_clients_ask_for(endpoint: str) -> None:
    metadata = HfApi(endpoint=endpoint).get_safetensors_metadata(NAME)
    assert len(metadata.weight_map) == 383
    files, shards = HfFileSystem(endpoint=endpoint), [p for p in files_of(PICO) if p.endswith(".safetensors")]
    assert sorted(files.glob(f"{NAME}/*.safetensors")) == [f"{NAME}/{path}" for path in shards]
    with files.open(f"{NAME}/{shards[0]}") as file:
        file.seek(-1000, 2)
        assert file.read() == files_of(PICO)[shards[0]][-1000:]


def test_pages_of_a_listing(tmp_path: Path) -> None:
    with FaultyHub({NAME: PICO}, page_size=3) as hub:
        listed = [entry.path for entry in HfApi(endpoint=hub.endpoint).list_repo_tree(NAME, recursive=True)]
        assert listed == sorted(files_of(PICO))
        assert len(hub.requests(route="tree")) == -(-len(listed) // 3)


def test_errors_as_the_hub_gives_them(endpoint: str, tmp_path: Path) -> None:
    api = HfApi(endpoint=endpoint)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("no/such")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(NAME, revision="other")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(NAME, "nothing", local_dir=tmp_path)


@pytest.mark.slow
def test_transformers_from_pretrained(tmp_path: Path, endpoint: str) -> None:
    code = """
import sys
from transformers import AutoConfig, AutoTokenizer
config = AutoConfig.from_pretrained(sys.argv[1])
tokens = AutoTokenizer.from_pretrained(sys.argv[1])
print(config.model_type, config.hidden_size, tokens.decode(tokens("weightkit").input_ids, skip_special_tokens=True))
"""
    assert run_client(tmp_path, endpoint, "-c", code, NAME).split() == ["deepseek_v3", "256", "weightkit"]
