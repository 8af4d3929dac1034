"""What a new user meets: every option explained, output for pipes, and errors that name the next step."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import IO

import click
import pytest
from folders import read_safetensors
from tiny import write_safetensors, write_tiny

import weightkit as wk
from weightkit import progress
from weightkit.checkpoint.lock import Lock
from weightkit.cli import main
from weightkit.cli.app import COMMANDS, group
from weightkit.errors import WeightkitError
from weightkit.layouts import opening
from weightkit.units import human_bytes

INDEX = "model.safetensors.index.json"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def weightkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """The command line in this process, in a folder of its own: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        assert isinstance(left.value.code, int)
        return (left.value.code, *capsys.readouterr())

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "v3")
    return tmp_path / "v3"


def options_of(name: str) -> list[click.Option]:
    command = group.get_command(click.Context(group), name)
    assert command is not None
    return [option for option in command.params if isinstance(option, click.Option)]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is_and_its_default(name: str) -> None:
    for option in options_of(name):
        assert option.help, option.name
        assert not option.help.startswith("["), option.name
        if not option.is_flag and isinstance(option.default, (int, float, str)):
            assert option.show_default, option.name


def test_no_command_of_the_list_is_cut_off(weightkit: Call) -> None:
    code, out, _ = weightkit("--help")
    assert code == 0
    assert "..." not in out.partition("Commands:")[2]


def first(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def emptied(folder: Path) -> None:
    first(folder).write_bytes(b"")


def garbled(folder: Path) -> None:
    raw = bytearray(first(folder).read_bytes())
    raw[20] ^= 0x80
    first(folder).write_bytes(raw)


def gone(folder: Path) -> None:
    first(folder).unlink()


def broken_index(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def less(folder: Path, end: str) -> None:
    """Without the last tensor whose name ends so, in its file and in the index."""
    index = json.loads((folder / INDEX).read_text())
    name = max(name for name in index["weight_map"] if name.endswith(end) and ".layers.1." in name)
    path = folder / index["weight_map"].pop(name)
    write_safetensors(path, {key: value for key, value in read_safetensors(path).items() if key != name})
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(("end", "line"), [("norm.weight", "strip v3 out"), ("_scale_inv", "cast v3 out --to bf16")])
def test_a_tensor_that_is_gone_is_to_be_fetched(end: str, line: str, folder: Path, weightkit: Call) -> None:
    less(folder, end)
    code, _, err = weightkit(*line.split())
    assert code == 1
    assert err.splitlines()[-1].startswith("Fetch ")


@pytest.mark.parametrize("damage", [emptied, garbled, gone, broken_index, broken_config])
@pytest.mark.parametrize("line", ["strip v3 out", "inspect v3", "verify v3 --quick"])
def test_a_damaged_file_is_to_be_fetched_again(
    line: str, damage: Callable[[Path], None], folder: Path, weightkit: Call
) -> None:
    damage(folder)
    code, out, err = weightkit(*line.split())
    assert code == 1
    assert (
        "etch the file again" in out + err
        or "Fetch the index again" in out + err
        or "Take config.json from the published repository." in out + err
    )


def test_an_index_that_is_gone_is_what_is_missed(folder: Path, weightkit: Call) -> None:
    (folder / INDEX).unlink()
    code, _, err = weightkit("strip", folder, "out")
    assert code == 1
    assert f"expected {INDEX}, found 3 files such as model-00001-of-00" in err
    assert f"Fetch {INDEX} into the folder." in err


def denied(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No one may read it, not even a superuser."""
    real = os.open

    def refuse(name: object, *rest: object, **more: object) -> int:
        if isinstance(name, (str, os.PathLike)) and Path(name) == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(name, *rest, **more)  # type: ignore[arg-type]

    def refuse_open(self: Path, *rest: object, **more: object) -> object:
        if self == path:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(self, *rest, **more)  # type: ignore[arg-type]

    opened = Path.open
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "open", refuse_open)


@pytest.mark.parametrize("line", ["strip v3 out", "verify v3"])
def test_a_file_that_may_not_be_read_is_said_once_and_not_fetched_again(
    line: str, folder: Path, weightkit: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    wk.write(wk.cast(wk.open_checkpoint(folder), "bf16"), folder.parent / "bf16", progress=False)  # with a lock
    path = first(folder.parent / "bf16").relative_to(folder.parent)
    denied(path, monkeypatch)
    code, out, err = weightkit(*line.replace("v3", "bf16").split())
    assert code == 1
    assert (out + err).count(f"{path}: cannot be read (Permission denied)") == 1
    assert opening.READABLE in out + err
    assert opening.FETCH not in out + err


def test_a_folder_that_may_not_be_entered_is_an_error_and_no_wrong_call(folder: Path) -> None:
    if os.geteuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("a superuser may enter any folder")
    plain = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    folder.chmod(0)
    for command in ("verify", "inspect"):
        done = subprocess.run(
            [*plain, sys.executable, "-m", "weightkit", command, str(folder)], capture_output=True, text=True
        )
        assert "cannot be read (Permission denied)" in done.stderr, done.stderr
        assert (done.returncode, done.stderr.strip().endswith(opening.READABLE)) == (1, True)
    folder.chmod(0o755)


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
"""Python then tries once more at its exit to write what it could not."""


def output_to(stdout: IO[str] | int, folder: Path, *options: str) -> tuple[int, str]:
    """The exit code and standard error of a command."""
    command = [sys.executable, "-m", "weightkit", "verify", str(folder), *options]
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=BUFFERED)
    return done.returncode, done.stderr


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_full_output_is_an_error_without_a_traceback(options: tuple[str, ...], folder: Path) -> None:
    with Path("/dev/full").open("w") as full:
        assert output_to(full, folder, *options) == (1, "Error: No space left on device.\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_an_output_that_is_closed_is_none(closed: str, folder: Path) -> None:
    command = f"{sys.executable} -m weightkit verify --quick {folder} {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=BUFFERED)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_an_output_that_nobody_reads_ends_the_command_without_a_word(options: tuple[str, ...], folder: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        assert output_to(write, folder, *options) == (1, "")
    finally:
        os.close(write)


def test_where_a_fetched_folder_comes_from_is_one_line(folder: Path) -> None:
    origin = {"hub": "huggingface", "repo": "a/b", "revision": "main", "commit": "c0ffee", "git_sha1": {"x": "1" * 40}}
    (folder / "weightkit.lock.json").write_bytes(Lock({}, {"fetch": origin}).to_bytes())
    said = wk.inspect(folder).render()
    assert [line.split()[2:] for line in said.splitlines() if "fetched from" in line] == [
        ["huggingface", "a/b", "c0ffee"]
    ]
    assert "git_sha1" not in said


def test_a_model_that_fetch_does_not_know_may_be_a_repository(weightkit: Call) -> None:
    code, _, err = weightkit("fetch", "nothing-like-it")
    assert code == 1
    assert "or the name of a repository, owner/name" in err


def test_bench_of_a_file_says_that_it_is_none(weightkit: Call, tmp_path: Path) -> None:
    (tmp_path / "afile").touch()
    assert weightkit("bench", "afile")[2].startswith("Error: afile: not a folder.")


def test_a_file_of_prompts_that_is_not_there(tmp_path: Path) -> None:
    from weightkit.generation import read_prompts

    with pytest.raises(
        WeightkitError, match=r"nope: cannot be read \(No such file or directory\)\.\nName a UTF-8 file"
    ):
        read_prompts(tmp_path / "nope")
    (tmp_path / "bytes").write_bytes(b"ab\xff")
    with pytest.raises(WeightkitError, match="bytes: not UTF-8 at byte 2"):
        read_prompts(tmp_path / "bytes")


def test_smoke_draws_no_bar_into_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    from weightkit.manifests import load
    from weightkit.smoke.local import smoke_checkpoint

    pipe = StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0)
    path = load("pico").path
    assert path is not None
    smoke_checkpoint(path, max_new_tokens=1)
    lines = pipe.getvalue().splitlines()
    assert lines
    assert all(line.startswith("smoke: ") for line in lines)
    assert not {"█", "|", "\r"} & set(pipe.getvalue())


def test_a_named_model_brings_its_calibration_to_an_explicit_source(folder: Path, weightkit: Call) -> None:
    code, _, err = weightkit("quantize", folder, "out", "--model", "deepseek-v3", "--dry-run", "--json")
    assert code == 1
    assert "hf download HuggingFaceH4/ultrachat_200k" in err
    code, _, err = weightkit("quantize", folder, "out", "--dry-run")
    assert code == 1
    assert "--calibration: GPTQ needs text" in err


def test_an_error_is_one_json_object_on_standard_output(weightkit: Call) -> None:
    code, out, err = weightkit("verify", "nowhere", "--json")
    assert code == 1
    assert json.loads(out)["message"] == err.removeprefix("Error: ").strip()


# --- what stands in the way, and what is not worth it -----------------------------------------------------------------


def test_a_dry_run_says_that_the_disk_is_too_small(
    weightkit: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, before, _ = weightkit("strip", folder, "out", "--dry-run")
    assert "too little" not in before
    monkeypatch.setattr("weightkit.writer.summary.free_disk_bytes", lambda place: 1000)
    monkeypatch.setattr("weightkit.writer.target.free_disk_bytes", lambda place: 1000)
    code, output, _ = weightkit("strip", folder, "out", "--dry-run")
    assert code == 0
    needed = json.loads(weightkit("strip", folder, "out", "--dry-run", "--json")[1])["needed_disk_bytes"]
    assert f"free disk  1.0 kB - too little: {human_bytes(needed)} needed" in output
    code, _, errors = weightkit("strip", folder, "out")
    assert code == 1
    assert f"expected {human_bytes(needed)} ({needed:,} bytes), found 1.0 kB (1,000 bytes)" in errors


def test_a_dry_run_says_that_memory_is_too_small(
    weightkit: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightkit.writer.summary.available_memory_bytes", lambda: 1000)
    _, output, _ = weightkit("strip", folder, "out", "--dry-run", "--jobs", 1)
    assert re.search(r"of buffers for 1 job; 1\.0 kB available - too little: [\d.]+ MB needed", output)


def test_a_conversion_that_changes_nothing_says_so(weightkit: Call, folder: Path) -> None:
    for arguments in (["strip", folder, "a"], ["cast", folder, "b", "--to", "bf16"]):
        assert "Note" not in weightkit(*arguments)[2]
    for arguments in (["strip", "a", "c"], ["cast", "b", "d", "--to", "bf16"]):
        code, _, errors = weightkit(*arguments)
        assert (code, "Note: no tensor changes; this makes a copy." in errors) == (0, True)
    assert "Note" not in weightkit("strip", "a", "e", "-q")[2]


def test_a_change_of_layout_that_changes_none_says_so(weightkit: Call, folder: Path) -> None:
    weightkit("shard", folder, "mp2", "--mp", 2)
    for arguments in (["merge", "mp2", "o"], ["shard", "mp2", "o", "--mp", 4], ["shard", folder, "o", "--mp", 2]):
        assert "Note" not in weightkit(*arguments, "--dry-run")[2]
    cast = ["shard", "mp2", "o", "--mp", 2, "--to", "bf16"]
    assert "Note" not in weightkit(*cast, "--dry-run")[2]
    for arguments in (["merge", folder, "o", "--dry-run"], ["shard", "mp2", "p", "--mp", 2], ["merge", folder, "q"]):
        code, _, errors = weightkit(*arguments)
        assert (code, "Note: no tensor changes; this makes a copy." in errors) == (0, True)
