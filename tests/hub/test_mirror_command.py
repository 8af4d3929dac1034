"""``weightkit mirror`` as a user types it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mirrored import files_of, write_lock, write_locked
from raw_http import get
from tiny import write_tiny


@contextmanager
def mirror(*arguments: str, cwd: Path) -> Iterator[tuple[dict[str, Any], subprocess.Popen[str]]]:
    """A running mirror: what it says with --json, and its process."""
    command = [sys.executable, "-m", "weightkit", "mirror", *arguments, "--port", "0", "--json"]
    environment = {key: value for key, value in os.environ.items() if key != "WEIGHTKIT_HOME"}
    with subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said, process.communicate()[1]
            yield json.loads(said), process
        finally:
            process.kill()


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "weightkit", "mirror", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_folders_and_names(tmp_path: Path) -> None:
    for number, name in enumerate(("weights/deepseek-v3/fp8", "plain", "named")):
        write_locked(tmp_path / name, seed=number)
    arguments = ("weights/deepseek-v3/fp8", "plain", "pico", "--name", "my-org/mine=named", "--name", "a/b=plain")
    with mirror(*arguments, cwd=tmp_path) as (said, _):
        folders = {name: state["path"] for name, state in said["repositories"].items()}
        assert folders.keys() == {
            *("deepseek-ai/DeepSeek-V3", "weightkit/deepseek-v3-fp8", "weightkit/plain", "weightkit/pico"),
            *("my-org/mine", "a/b"),
        }
        for name, folder in folders.items():
            for path, content in files_of(Path(folder)).items():
                got = get(f"{said['endpoint']}/{name}/resolve/{said['repositories'][name]['commit']}/{path}")
                assert got.body == content


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_a_signal_ends_it_at_once(tmp_path: Path, number: int, code: int) -> None:
    folder = tmp_path / "a"
    write_tiny(folder)
    (folder / "large.safetensors").write_bytes(bytes(64 << 20))
    write_lock(folder)
    with mirror("a", cwd=tmp_path) as (said, process):
        host, port = said["endpoint"].removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(b"GET /weightkit/a/resolve/main/large.safetensors HTTP/1.1\r\nHost: x\r\n\r\n")
            client.recv(100)
            started = time.monotonic()
            process.send_signal(number)
            assert process.wait(120) == code
            assert time.monotonic() - started < 100  # the client reads no more, so that it would never end
        assert process.stderr is not None
        assert process.stderr.read().strip() == "Stopped."


def test_what_it_prints(tmp_path: Path) -> None:
    write_locked(tmp_path / "a")
    command = [sys.executable, "-m", "weightkit", "mirror", "a", "--port", "0", "--host", "0.0.0.0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        note = process.stderr.readline()  # comes last
        process.send_signal(signal.SIGINT)
        printed = process.stdout.read()
    port = printed.split()[0].rpartition(":")[2]
    endpoint = f"http://{socket.gethostname()}:{port}"
    assert printed.startswith(f"{endpoint} serves, until Ctrl-C:\n\nweightkit/a  ")
    assert f"\nHF_ENDPOINT={endpoint} hf download weightkit/a\n" in printed
    assert f"\nMODELSCOPE_ENDPOINT={endpoint} modelscope download weightkit/a\n" in printed
    assert note == "Note: whoever reaches this address can read these checkpoints. No password, no encryption.\n"


def test_wrong_calls(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a")
    for arguments, code, message in (
        ([], 2, "Name a checkpoint's folder, or a model of the workspace."),
        (["--name", "x"], 2, "expected ORG/NAME=PATH"),
        (["--name", "x=a"], 1, "x: not an id that clients accept: expected owner/name"),
        (["--name", "../x=a"], 1, "not an id that clients accept"),
        (["nowhere"], 1, "no such folder"),
        (["a", "--host", "192.0.2.1"], 1, "192.0.2.1:8090: cannot listen there"),
        (["a", "--port", "70000"], 2, "70000 is not in the range"),
    ):
        done = run(*arguments, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_a_taken_port_is_said_before_anything_is_hashed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("nowhere", "--port", str(taken.getsockname()[1]), cwd=tmp_path)
    assert "cannot listen there (Address already in use" in done.stderr


def test_unverified_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a")
    shard = tmp_path / "a/model-00001-of-000003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    done = run("a", "--port", "0", cwd=tmp_path)
    assert done.returncode == 1
    assert shard.name in done.stderr
    assert done.stdout == ""
