"""The resident set grows by what the plan states, not with the size of a tensor, a file or the checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from sparse import write_file, write_sparse
from tiny import V3, write_tiny

import weightkit as wk

DRIVER = Path(__file__).with_name("memory_driver.py")
#: Stacks of threads, the allocator's reserves, the plan's own objects.
MARGIN_BYTES = 16 << 20
#: 570 MB, nearly all of it in five tensors.
HEAVY = replace(V3, hidden=2048, vocab=32768, intermediate=49152, layers=2, mtp_layers=0, heads=128)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint in the published layout and as 4 ranks, both of them holes; and a tiny one."""
    folder = tmp_path_factory.mktemp("heavy")
    write_tiny(folder / "tiny", replace(V3, layers=1, mtp_layers=0, dense_layers=0))
    size = write_sparse(folder / "published", HEAVY.config(), HEAVY.tensors(), shards=2)
    assert size > 500_000_000
    ranks = wk.shard(wk.open_checkpoint(folder / "published"), mp=4)
    (folder / "ranks").mkdir()
    for name, tensors in ranks.files.items():
        write_file(folder / "ranks" / name, {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()})
    (folder / "ranks/config.json").write_text(json.dumps(HEAVY.config()))
    return folder


@pytest.mark.parametrize(
    ("source", "kind", "jobs"),
    [
        ("published", "cast-bf16", 1),
        ("published", "cast-f32", 2),
        ("published", "shard", 2),
        ("published", "shard-bf16", 4),
        ("ranks", "cast-bf16", 2),
        ("ranks", "strip", 2),
    ],
)
def test_peak(source: str, kind: str, jobs: int, sources: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, DRIVER, sources / "tiny", sources / source, tmp_path / "out", kind, str(jobs)],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"},  # what is freed goes back, and no heap keeps it
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["stated"] < 256 << 20
    assert found["grown"] < found["stated"] + MARGIN_BYTES
