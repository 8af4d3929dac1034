"""The command line as a user types it: in a process of its own, output and exit code as they come."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import V3, write_safetensors, write_tiny

from weightkit.cli.app import COMMANDS

HELP_SECONDS = 0.25


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "weightkit", *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A folder in which the commands without arguments find a checkpoint."""
    write_tiny(tmp_path / "weights/deepseek-v3/fp8")
    return tmp_path


@pytest.mark.parametrize(
    "arguments", [[], *[[name] for name in COMMANDS]], ids=lambda value: " ".join(value) or "weightkit"
)
def test_help_imports_no_torch_and_is_quick(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from weightkit.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n"
        "    print(sorted({'torch', 'numba', 'triton', 'transformers'} & set(sys.modules)), file=sys.stderr)\n"
    )
    seconds = []
    for _ in range(5):
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, "--help"], capture_output=True, text=True, cwd=tmp_path
        )
        after = os.times()  # CPU seconds of the children: what else the machine does is not in them
        seconds.append(after.children_user - before.children_user + after.children_system - before.children_system)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("Usage: weightkit")
        assert done.stderr.strip() == "[]"
        if seconds[-1] < HELP_SECONDS:
            break
    assert min(seconds) < HELP_SECONDS


def test_the_road_without_arguments(workspace: Path) -> None:
    for arguments, folder in (
        (["strip"], "fp8-no-mtp"),
        (["cast", "--to", "bf16"], "bf16"),
        (["cast", "--to", "f32", "--no-mtp"], "f32-no-mtp"),
        (["shard", "--mp", "4"], "mp4"),
        (["merge"], "mp4-merged"),
        (["shard", "--mp", "8", "--to", "bf16"], "bf16-mp8"),
        (["shard", "--ep", "3", "--experts", "4"], "experts4-ep3"),
    ):
        done = run(*arguments, cwd=workspace)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"weights/deepseek-v3/{folder}: ")
        assert (workspace / "weights/deepseek-v3" / folder / "weightkit.lock.json").is_file()


def test_source_and_target(workspace: Path) -> None:
    src = workspace / "weights/deepseek-v3/fp8"
    assert run("strip", str(src), "out", cwd=workspace).stdout.startswith("out: 3 files, ")
    assert run("strip", str(src), cwd=workspace).stdout.startswith(f"{src}-no-mtp: ")


def test_a_result_beside_its_source_whatever_the_source_is_called(workspace: Path) -> None:
    src = workspace / "weights/deepseek-v3/fp8"
    beside = f"{src}-no-mtp: "
    assert run("strip", ".", cwd=src).stdout.startswith(beside)
    (src / "assets").mkdir()
    assert run("strip", "..", cwd=src / "assets").stdout.startswith(beside)
    single = workspace / "single"
    single.mkdir()
    shutil.copy(src / "config.json", single)
    write_safetensors(single / "model.safetensors", write_tiny(workspace / "other"))
    done = run("strip", "model.safetensors", cwd=single)
    assert done.stdout.startswith(f"{single}-no-mtp: "), done.stderr


def test_home_from_the_environment(tmp_path: Path) -> None:
    write_tiny(tmp_path / "elsewhere/deepseek-v3/fp8")
    done = run("strip", cwd=tmp_path, WEIGHTKIT_HOME=str(tmp_path / "elsewhere"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "elsewhere/deepseek-v3/fp8-no-mtp/config.json").is_file()


def test_dry_run_writes_nothing_and_says_what_it_would(workspace: Path) -> None:
    done = run("cast", "--to", "bf16", "--dry-run", "--json", cwd=workspace)
    plan = json.loads(done.stdout)
    elements = sum(_count(shape) for dtype, shape in V3.tensors().values() if dtype == "F8_E4M3")
    kept = sum(_count(shape) * 2 for dtype, shape in V3.tensors().values() if dtype == "BF16")
    biases = 3 * V3.experts * 4
    headers = plan["write_bytes"] - 2 * elements - kept - biases
    assert 0 < headers <= 3 * 4 * 4096
    assert plan["state"] == "new"
    assert plan["converted_tensors"] == sum(dtype == "F8_E4M3" for dtype, _ in V3.tensors().values())
    assert not (workspace / "weights/deepseek-v3/bf16").exists()


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def test_a_rerun_says_that_it_is_complete(workspace: Path) -> None:
    run("strip", cwd=workspace)
    again = run("strip", "--json", cwd=workspace)
    assert json.loads(again.stdout)["written_bytes"] == 0
    assert "complete already" in run("strip", cwd=workspace).stdout


def test_an_illegal_degree_is_refused_with_the_legal_ones(workspace: Path) -> None:
    done = run("shard", "--mp", "8", cwd=workspace)
    assert done.returncode == 1
    assert "Legal --mp for this FP8 checkpoint: 1, 2, 4. Use one of them, or add --to bf16." in done.stderr
    assert "Traceback" not in done.stderr
    assert not (workspace / "weights/deepseek-v3/mp8").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["shard"], "Give either --mp or --ep."),
        (["shard", "--mp", "2", "--ep", "2"], "Give either --mp or --ep."),
        (["shard", "--mp", "2", "--keep", "x"], "--keep needs --experts."),
        (["cast"], "--to"),
        (["cast", "--to", "fp4"], "fp4"),
        (["nonsense"], "nonsense"),
        (["strip", "--jobs", "0"], "--jobs"),
    ],
)
def test_a_wrong_call_exits_2(arguments: list[str], complaint: str, workspace: Path) -> None:
    done = run(*arguments, cwd=workspace)
    assert done.returncode == 2
    assert complaint in done.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["strip"], "deepseek-v3 is not in the workspace"),
        (["strip", "--model", "deepseek-v4"], "no model of this name is known"),
        (["strip", "--model", "deepseek-v3"], "`weightkit fetch deepseek-v3`"),
        (["strip", "missing", "out"], "missing: no such file or folder"),
        (["strip", "missing", "out"], "Name a checkpoint's folder"),
        (["strip", "/dev/null"], "/dev/null: not a safetensors file"),
        (["merge"], "no rank files in the workspace"),
    ],
)
def test_what_is_not_there_exits_1_and_says_what_to_do(arguments: list[str], complaint: str, tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert complaint in done.stderr
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr


def test_errors_as_json(tmp_path: Path) -> None:
    done = run("strip", "missing", "--json", cwd=tmp_path)
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"] == "NotACheckpointError"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in run("strip", "missing", "--debug", cwd=tmp_path).stderr


def test_a_target_without_permission(workspace: Path) -> None:
    if os.geteuid() == 0:
        target = Path("/proc/nowhere/out")  # a place where not even root may make folders
    else:
        target = workspace / "locked/out"
        target.parent.mkdir(mode=0o500)
    done = run("strip", str(workspace / "weights/deepseek-v3/fp8"), str(target), cwd=workspace)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_soon_and_the_next_run_continues(number: signal.Signals, tmp_path: Path) -> None:
    source = tmp_path / "fp8"
    write_tiny(source)
    # a slow source: a named pipe cannot be planned with, so the reading itself waits until the run is being stopped
    script = (
        "import os, sys\n"
        "import weightkit.checkpoint.reading as reading\n"
        "read = reading.Reader.read_range\n"
        "def slow(self, path, offset, out):\n"
        "    os.write(1, b'reading\\n')\n"  # whole, whatever other threads write
        "    self.stop.wait(300)\n"
        "    read(self, path, offset, out)\n"
        "reading.Reader.read_range = slow\n"
        "from weightkit.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, "strip", "fp8", "out"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Run the same command again" in errors
    assert "Traceback" not in errors
    assert not list((tmp_path / "out").glob("*.index.json"))
    again = run("strip", "fp8", "out", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert run("strip", "fp8", "direct", cwd=tmp_path).returncode == 0
    for path in sorted((tmp_path / "direct").iterdir()):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name
