"""Ranks over gloo, and over NCCL where there are two GPUs: exchanges, a text, and the bytes of a quantization."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from weightkit.ranks import launch

PICO = Path(__file__).parents[2] / "manifests/pico/checkpoint"
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
PLACES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])]


@pytest.mark.parametrize("device", PLACES)
def test_every_exchange_of_two(device: str) -> None:
    assert launch(2, [sys.executable, str(Path(__file__).with_name("exchanges.py")), device]) == 0


def on_two(*arguments: object) -> str:
    """What the command prints."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "weightkit"]
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not [said for said in ("unbatched P2P", "barrier()", "destroy_process_group") if said in done.stderr]
    return done.stdout


@pytest.mark.gpu
@TWO_GPUS
def test_a_text_of_two_gpus() -> None:
    said = json.loads(on_two("generate", PICO, "--device", "cuda", "--prompt", "6 乘 7 等于？", "--json"))
    assert (said["text"], said["device"], said["ranks"]) == ("42", "cuda", 2)


@pytest.mark.gpu
@TWO_GPUS
@pytest.mark.parametrize("scope", ["experts", "all"])
def test_two_gpus_quantize_to_the_bytes_of_one(scope: str, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 260, (1024, 128), dtype=np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    options = ["--calibration", tmp_path / "tokens.npy", "--samples", 1024, "--seq-len", 128, "--group-size", 32]
    options += ["--scope", scope, "--snapshot-layers", 1, "--device", "cuda", "--quiet"]
    alone = [sys.executable, "-m", "weightkit", "quantize", PICO, tmp_path / "one", *options]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "1"}
    subprocess.run([*map(str, alone)], env=environment, check=True, timeout=600)
    on_two("quantize", PICO, tmp_path / "two", *options)
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").glob("*.safetensors")}
    assert files
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").glob("*.safetensors")}
