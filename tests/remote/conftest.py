"""One tiny checkpoint with a lock, as it lies on a disk, on a hub, in a bucket and on a web server."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import write_tiny

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "hub"))

from bucket import Store
from faulty_hub import FaultyHub
from mirrored import write_lock
from web_server import Web, web_server

from weightkit.remote.patience import Patience

#: Quick to try again, and slow to take a server for dead: this one may share two cores with much else.
HURRIED = Patience(attempts=4, backoff_s=0.01, longest_backoff_s=0.05, connect_s=60, stall_s=60, outage_s=0.5)
#: Where a stream does stall. Others may seem to, too, so that it is tried often.
HASTY = replace(HURRIED, attempts=100, stall_s=1)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Short waits, small pieces, and nobody's logins."""
    monkeypatch.setattr("weightkit.remote.ranges.DEFAULT_PATIENCE", HURRIED)
    monkeypatch.setattr("weightkit.checkpoint.remote.DEFAULT_PATIENCE", HURRIED)
    monkeypatch.setattr("weightkit.remote.ranges.PIECE_BYTES", 200_000)
    monkeypatch.setattr("weightkit.writer.spool.CHUNK_BYTES", 500_000)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_PROFILE", "WEIGHTKIT_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that stall are given up soon."""
    monkeypatch.setattr("weightkit.remote.ranges.DEFAULT_PATIENCE", HASTY)


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in three files, with a lock; not to be changed."""
    folder = tmp_path_factory.mktemp("remote") / "tiny"
    write_tiny(folder)
    (folder / "inference").mkdir()
    (folder / "inference/model.py").write_text("x = 1\n")
    write_lock(folder)
    return folder


@pytest.fixture
def hub(tiny_source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyHub]:
    """The mirror with faults, which has the checkpoint as ``org/tiny``."""
    with FaultyHub({"org/tiny": tiny_source}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


@pytest.fixture
def web(tiny_source: Path) -> Iterator[Web]:
    with web_server(tiny_source) as running:
        yield running


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    """A real server on loopback that speaks S3's protocol."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def store(moto_endpoint: str, tiny_source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The bucket ``bucket``, which has the checkpoint below ``models/tiny``."""
    import boto3
    import s3fs

    for name, value in (
        ("AWS_ACCESS_KEY_ID", "key"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", moto_endpoint),
    ):
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="bucket")
    found = Store(client)
    found.put_folder("models/tiny", tiny_source)
    yield found
    for item in client.list_objects_v2(Bucket="bucket").get("Contents", []):
        found.delete(item["Key"])
    client.delete_bucket(Bucket="bucket")
    s3fs.S3FileSystem.clear_instance_cache()
