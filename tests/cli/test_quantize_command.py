"""``weightkit quantize`` as a user types it: what it prints, where it writes, and its exit code."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import V3, write_tiny

from weightkit.cli import main

Call = Callable[..., tuple[int, str, str]]
AMOUNT = ("--samples", "4", "--seq-len", "64", "--group-size", "16", "--device", "cpu")
WEIGHTS = sum(
    int(np.prod(shape))
    for name, (dtype, shape) in V3.tensors().items()
    if "experts" in name and "layers.3." not in name and dtype == "F8_E4M3"
)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: deepseek-v3 in its workspace, and tokens."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WEIGHTKIT_HOME", raising=False)
    write_tiny(tmp_path / "weights/deepseek-v3/fp8")
    np.save("tokens.npy", (np.arange(256) % 64).reshape(4, 64).astype(np.int32))
    return tmp_path


@pytest.fixture
def weightkit(capfd: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """The command line in this process: exit code, output, errors."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        return int(ended.value.code or 0), *capfd.readouterr()

    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    torch.set_num_threads(1)
    yield call
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


def test_without_src_and_dst(workspace: Path, weightkit: Call) -> None:
    code, out, err = weightkit("quantize", "--calibration", "tokens.npy", *AMOUNT, "-q")
    assert (code, out, err) == (0, "", "")
    assert (workspace / "weights/deepseek-v3/int4-g16/quantize_config.json").is_file()
    code, out, err = weightkit("quantize", "--method", "rtn", "--bits", "8", "--group-size", "-1", "--no-mtp", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["target"] == "weights/deepseek-v3/int8-column-rtn-no-mtp"
    assert found["complete_before"] is False
    assert (found["matrices"], found["rounded"], found["starved"], found["warnings"]) == (54, 0, 0, [])
    assert 0 < found["mean_error"] == found["mean_rounding_error"] < 0.02
    assert Path(found["report"]).is_file()
    files = (workspace / found["target"]).glob("*.safetensors")
    assert found["output_bytes"] == sum(path.stat().st_size for path in files)


def test_a_result_beside_its_source(workspace: Path, weightkit: Call) -> None:
    """And its summary, which names what was not as asked for."""
    source = workspace / "weights/deepseek-v3/fp8"
    code, out, err = weightkit("quantize", str(source), "--calibration", "tokens.npy", *AMOUNT)
    assert code == 0, err
    assert (source.parent / "fp8-int4-g16/config.json").is_file()
    lines = out.splitlines()
    assert lines[0].startswith("fp8: 54 matrices of 2 layers in int4 (gptq, groups of 16, scope experts), ")
    keys = [line.split()[0] for line in lines[1:]]
    assert keys[:6] == ["error", "tokens", "time", "slowest", "memory", "size"]
    assert "256 tokens of calibration (4 x 64)" in out
    assert any("saw fewer tokens than columns" in line for line in lines)


def test_a_dry_run_says_what_it_takes_and_writes_nothing(workspace: Path, weightkit: Call) -> None:
    arguments = ("quantize", "--calibration", "tokens.npy", *AMOUNT, "--dry-run")
    code, out, err = weightkit(*arguments)
    assert code == 0, err
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert rows["target"] == "weights/deepseek-v3/int4-g16 (new)"
    assert rows["quantized"] == "1.3 MB of weights on cpu, 1 rank"
    assert rows["calibrated"] == "4 x 64 tokens, 256 in all"
    assert "snapshot" in rows
    cost = json.loads(weightkit(*arguments, "--json")[1])
    assert cost["activations_bytes"] == 256 * 144 * 4
    assert cost["snapshot_bytes"] == 2 * cost["activations_bytes"]
    assert cost["write"]["state"] == "new"
    integers = WEIGHTS // 2 + WEIGHTS // 16 * 2 + WEIGHTS // 16 // 2
    assert integers < cost["write"]["write_bytes"]
    rtn = json.loads(weightkit("quantize", "--method", "rtn", "--group-size", "16", "--dry-run", "--json")[1])
    assert (rtn["samples"], rtn["snapshot_bytes"]) == (0, 0)
    assert rtn["write"]["write_bytes"] == cost["write"]["write_bytes"]
    assert [path.name for path in (workspace / "weights/deepseek-v3").iterdir()] == ["fp8"]


def test_data_that_does_not_ship_is_named(workspace: Path, weightkit: Call) -> None:
    code, _, err = weightkit("quantize")
    assert code == 1
    assert err.startswith("Error: deepseek-v3: this model's calibration data does not ship with weightkit: ")
    assert "hf download" in err


def test_errors_as_json(workspace: Path, weightkit: Call) -> None:
    code, out, _ = weightkit("quantize", "weights/deepseek-v3/fp8", "--json")
    assert code == 1
    assert json.loads(out)["error"] == "CalibrationError"
