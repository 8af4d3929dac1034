"""The tests' hub is imported by name from this folder. Fixtures of the tests of fetch."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from faulty_hub import FaultyHub
from fetching import NAME, write_repository


@pytest.fixture(scope="session")
def fetch_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository that is fetched; not to be changed."""
    return write_repository(tmp_path_factory.mktemp("fetch") / "source")


@pytest.fixture
def fetch_hub(fetch_source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FaultyHub]:
    """A hub that both clients are told of; no token, no login of the user's."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN", "WEIGHTKIT_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "no-modelscope"))
    monkeypatch.setenv("MODELSCOPE_API_MAX_RETRIES", "1")
    monkeypatch.setattr("weightkit.hub.ask.GRACE_S", 120.0)  # the second hub's answer may take its time
    with FaultyHub({NAME: fetch_source}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.endpoint)
        yield hub
