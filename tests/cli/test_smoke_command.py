"""``weightkit smoke`` as a user types it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "weightkit", "smoke", *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_pico_needs_no_path(tmp_path: Path) -> None:
    done = run("--model", "pico", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].endswith("manifests/pico/checkpoint (DeepSeek-V3 family, float32 on cpu):")
    assert "  ok           answers        24 of 24 right" in lines
    assert lines[-1] == "Ok: 6 checks passed."


def test_a_comparison_that_fails(tmp_path: Path) -> None:
    """Weights of zeros are read and computed, and are not those of pico."""
    from safetensors.torch import load_file, save_file

    from weightkit import manifests

    pico = manifests.load("pico").path
    assert pico is not None
    other = tmp_path / "other"
    other.mkdir()
    for file in pico.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    shard = other / "model-00001-of-000004.safetensors"
    tensors = load_file(shard)
    name = "model.embed_tokens.weight"
    save_file({**tensors, name: tensors[name] * 0}, shard, metadata={"format": "pt"})

    done = run(str(pico), "--compare", str(other), "--device", "cpu", "--json", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    verdict = json.loads(done.stdout)
    assert verdict["ok"] is False
    tensors_check = next(check for check in verdict["checks"] if check["name"] == "tensors")
    assert [suspect["name"] for suspect in tensors_check["figures"]["suspects"]] == [name]
    assert f"{name}: zeros" in tensors_check["detail"] or f"{name} in all of it: zeros" in tensors_check["detail"]
    assert done.stderr == ""


def test_an_endpoint_has_no_path(tmp_path: Path) -> None:
    done = run("somewhere", "--endpoint", "http://127.0.0.1:1", cwd=tmp_path)
    assert done.returncode == 2
    assert "leave out PATH" in done.stderr
