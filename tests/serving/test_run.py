"""Engines started, waited for, tested and stopped: programs on PATH with the engines' flags, which serve their API."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from loopback import free_port
from serving import contract_server
from serving.test_launch import BF16, DEMO, FP8, checkpoint_at

SERVER = Path(contract_server.__file__)
GPUS = "0, GPU-aaaa, NVIDIA H200, 143771\n1, GPU-bbbb, NVIDIA H200, 143771\n"
#: The command line; also one whose clock goes an hour forward once the engine was asked whether it is ready, and one
#: that gives an engine an hour to end by itself.
MAIN = "import sys\nfrom weightkit.cli import main\nmain(sys.argv[1:])\n"
LATE = (
    """
import sys, time
from pathlib import Path
import weightkit.serving.process as process
log = Path(sys.argv[sys.argv.index("--log") + 1])
class Clock:
    sleep = time.sleep
    def monotonic():
        return time.monotonic() + 3600 * (log.exists() and "GET /health" in log.read_text())
process.time = Clock
"""
    + MAIN
)
GENTLE = (
    """
import weightkit.serving.process as process
process.STOP_S = process.INTERRUPTED_S = 3600.0
"""
    + MAIN
)


class Place:
    """A folder with engines on PATH, a checkpoint, and two GPUs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        self.checkpoint = checkpoint_at(folder / "fp8", FP8)
        self.port = free_port()
        self.pids = folder / "pids"
        for name in ("vllm", "lmdeploy"):
            self.program(name, f'exec "{sys.executable}" "{SERVER}" {name} "$@"')
        self.program("python3", f'exec "{sys.executable}" "$@"')
        package = folder / "lib/sglang"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "launch_server.py").write_text(
            f"import runpy, sys\nsys.argv[1:1] = ['sglang']\nrunpy.run_path({str(SERVER)!r}, run_name='__main__')\n"
        )
        self.program("nvidia-smi", f"cat <<EOF\n{GPUS}EOF")
        self.env = os.environ | {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "PYTHONPATH": str(folder / "lib"),
            "FAKE_ENGINE_PIDS": str(self.pids),
            "TMPDIR": str(folder),
        }
        self.env.pop("CUDA_VISIBLE_DEVICES", None)

    def program(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def arguments(self, engine: str = "vllm", *more: str, script: str = MAIN) -> list[str]:
        line = [sys.executable, "-c", script, "launch", engine, str(self.checkpoint), "--tp", "2"]
        return [*line, "--port", str(self.port), "--run", *more]

    def run(
        self, engine: str = "vllm", *more: str, how: str = "", script: str = MAIN
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.arguments(engine, *more, script=script),
            env=self.env | {"FAKE_ENGINE": how},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def left(self) -> list[int]:
        """The engine's processes that still run."""
        pids = [int(pid) for pid in self.pids.read_text().split()]
        assert len(pids) == 3  # the server and its two workers
        return [pid for pid in pids if runs(pid)]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    if made.pids.exists():
        for pid in map(int, made.pids.read_text().split()):
            if runs(pid):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "lmdeploy"])
def test_an_engine_that_works(engine: str, place: Place) -> None:
    done = place.run(engine, "--mtp", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"http://127.0.0.1:{place.port}:\n")
    assert "Ok: 7 checks passed." in done.stdout
    log = Path(done.stderr.partition("Log: ")[2].splitlines()[0])
    assert f"{engine} starts on {place.checkpoint} over 2" in log.read_text()
    assert " is ready after " in done.stderr
    assert place.left() == []


def test_json(place: Place) -> None:
    done = place.run("vllm", "--json", "-q")
    result = json.loads(done.stdout)
    assert done.stderr == ""
    assert result["verdict"]["ok"] is True
    assert result["pid"] is None
    assert result["argv"][:2] == ["vllm", "serve"]
    assert Path(result["log"]).is_file()


def test_keep_leaves_it_running(place: Place) -> None:
    done = place.run("vllm", "--keep", "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 0
    assert len(place.left()) == 3
    assert f"kill -- -{result['pid']}" in done.stderr
    with socket.create_connection(("127.0.0.1", place.port), timeout=5):
        pass


def test_one_that_dies(place: Place) -> None:
    done = place.run("vllm", how="dies")  # in less time than one that is not ready is given
    assert done.returncode == 1
    assert "the engine ended by itself: found exit code 3, and these last lines" in done.stderr
    assert "    torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.50 GiB." in done.stderr
    assert "Use a larger --tp, a smaller --context, or a smaller form: weightkit quantize." in done.stderr


def test_one_that_is_slow_to_be_ready(place: Place) -> None:
    done = place.run("sglang", "--json", how="slow")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ready_s"] > 2
    assert "\n  " in done.stderr  # the log's last line, as it was then


def test_one_that_never_is_ready(place: Place) -> None:
    arguments = ("--ready-timeout", "600", "--log", str(place.folder / "log"))
    done = place.run("lmdeploy", *arguments, how="unhealthy", script=LATE)
    assert done.returncode == 1
    assert "not ready within the time limit: expected ready within 600 s, found it runs, and is not" in done.stderr
    assert "GET /health" in done.stderr  # the log's tail
    assert place.left() == []


def test_one_that_answers_nonsense(place: Place) -> None:
    done = place.run("vllm", how="bangs")
    assert done.returncode == 1
    assert "NOT OK       sane text" in done.stdout
    assert "Not ok: sane text" in done.stdout
    assert place.left() == []


def test_the_port_is_in_use(place: Place) -> None:
    with socket.create_server(("127.0.0.1", place.port)):
        done = place.run("vllm")
    assert done.returncode == 1
    assert f"127.0.0.1:{place.port}: the engine cannot listen there (Address already in use)" in done.stderr
    assert not place.pids.exists()


def test_everything_that_the_machine_lacks_at_once(place: Place) -> None:
    place.program("nvidia-smi", "exit 9")
    (place.bin / "vllm").unlink()
    with socket.create_server(("127.0.0.1", place.port)):
        done = place.run("vllm", "--context", "9999")
    assert done.returncode == 1
    assert "vLLM cannot be started here (4 problems)." in done.stderr
    for said in (
        "the model knows no such positions",
        "the engine cannot listen there",
        "vLLM is not on this machine: no such program on PATH",
        "--tp: not enough GPUs: expected 2 that are visible here, found 0, as nvidia-smi says.",
    ):
        assert said in done.stderr


def test_a_python_without_the_engine(place: Place) -> None:
    place.env["PYTHONPATH"] = ""
    done = place.run("sglang")
    assert f"{place.bin}/python3: this Python does not find the module sglang." in done.stderr


def test_gpus_that_are_hidden_or_too_small(place: Place) -> None:
    place.env["CUDA_VISIBLE_DEVICES"] = "1"
    assert "expected 2 that are visible here, found 1 (NVIDIA H200)" in place.run("vllm").stderr
    place.env["CUDA_VISIBLE_DEVICES"] = "GPU-aaaa,GPU-bbbb"
    assert place.run("vllm", "-q").returncode == 0
    place.program("nvidia-smi", "echo 0, GPU-a, Toy, 1; echo 1, GPU-b, Toy, 1")
    del place.env["CUDA_VISIBLE_DEVICES"]
    assert "the weights alone are more than the GPUs' memory: expected at least " in place.run("vllm").stderr


def wait_until_it_serves(place: Place) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if place.pids.exists() and place.pids.read_text():
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", place.port)) == 0:
                    return
        time.sleep(0.05)
    raise AssertionError("it never listened")


@pytest.mark.parametrize(
    ("number", "how"),
    [
        (signal.SIGINT, "unhealthy"),
        (signal.SIGTERM, "unhealthy"),
        (signal.SIGHUP, "unhealthy"),
        (signal.SIGINT, "stubborn"),
    ],
)
def test_a_signal_stops_everything(number: signal.Signals, how: str, place: Place) -> None:
    """Also a worker in a session of its own, and processes that ignore SIGTERM."""
    environment = place.env | {"FAKE_ENGINE": how}
    line = place.arguments("vllm", script=GENTLE)
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_until_it_serves(place)
        assert len(place.left()) == 3
        process.send_signal(number)
        patient_until = time.monotonic() + 180
        while how == "stubborn" and process.poll() is None and time.monotonic() < patient_until:
            time.sleep(0.5)  # its user gets impatient
            process.send_signal(number)
        _, said = process.communicate(timeout=180)  # less than the engine has to end by itself
    if how == "unhealthy":
        assert process.returncode == 130, said
    assert place.left() == []


def test_options_that_need_run(place: Place) -> None:
    line = [sys.executable, "-m", "weightkit", "launch", "vllm", str(place.checkpoint), "--tp", "2"]
    done = subprocess.run([*line, "--keep"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--keep and --log are for --run." in done.stderr


def test_the_command_alone_on_standard_output(place: Place) -> None:
    line = [sys.executable, "-m", "weightkit", "launch", "vllm", str(place.checkpoint), "--tp", "2"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert done.stdout == (
        f"vllm serve {place.checkpoint} --host 127.0.0.1 --port 8000 --tensor-parallel-size 2 --max-model-len 512\n"
    )
    assert done.stderr.startswith("Checked against vLLM 0.25.1:\n  layout ")
    bad = subprocess.run([*line[:-1], "3"], capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert bad.stdout == ""
    assert "cannot be split over 3 ranks" in bad.stderr


GENERATE = """
import sys
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert arguments["--temperature"] == "0" and arguments["--ckpt-path"] and arguments["--config"]
print("ModelArgs(max_batch_size=8)")
answers = {"17": "The answer\\nis 42.", "中国": "北京"}
prompts = open(arguments["--input-file"]).read().splitlines()
if "BROKEN" in answers: sys.exit(1)
for prompt in prompts:
    print("Prompt:", prompt)
    print("Completion:", next(a for key, a in answers.items() if key in prompt))
    print()
"""


def demo_run(tmp_path: Path, generate: str) -> subprocess.CompletedProcess[str]:
    from dataclasses import replace

    from weightkit.layouts import open_checkpoint
    from weightkit.transforms import shard
    from weightkit.writer import write

    place = Place(tmp_path)
    published = checkpoint_at(tmp_path / "published", replace(DEMO, nope=64, v=64))
    (published / "inference").mkdir()
    (published / "inference/generate.py").write_text(generate)
    write(shard(open_checkpoint(published), mp=2), tmp_path / "mp2", progress=False)
    place.program("torchrun", f'[ "$1 $2" = "--nproc-per-node 2" ] || exit 7\nshift 2\nexec "{sys.executable}" "$@"')
    line = [sys.executable, "-m", "weightkit", "launch", "demo", str(tmp_path / "mp2"), "--tp", "2", "--run"]
    return subprocess.run(line, env=place.env, capture_output=True, text=True, timeout=300, check=False)


def test_the_demo(tmp_path: Path) -> None:
    done = demo_run(tmp_path, GENERATE)
    assert done.returncode == 0, done.stderr
    assert "DeepSeek's demo, 2 ranks:" in done.stdout
    assert "'The answer\\nis 42.'" in done.stdout
    assert "2 of 2 right" in done.stdout


def test_a_demo_that_fails(tmp_path: Path) -> None:
    done = demo_run(tmp_path, 'raise SystemExit("AssertionError: Unexpected key(s) in state_dict")')
    assert done.returncode == 1
    assert "found exit code 1, and these last lines" in done.stderr
    assert "Unexpected key(s) in state_dict" in done.stderr


def test_a_demo_that_prints_something_else(tmp_path: Path) -> None:
    done = demo_run(tmp_path, 'print("hello")')
    assert done.returncode == 1
    assert "2 of 2 are not in its output" in done.stdout


def test_bf16_is_served_too(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.checkpoint = checkpoint_at(tmp_path / "bf16", BF16)
    assert place.run("vllm", "-q").returncode == 0
