"""The demo as a user sees it: every step proven, from a fetch to a merge."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import weightkit as wk


def test_the_whole_road(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "weightkit", "demo", "--json"]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    steps = {step["command"]: step for step in json.loads(done.stdout)}
    assert list(steps) == ["fetch", "verify", "generate", "strip", "cast --to bf16", "shard --mp 8", "merge"]
    assert "11.9 MB fetched, all verified" in steps["fetch"]["shown"]
    right = int(steps["generate"]["shown"].split()[0])
    assert right >= 22, steps["generate"]
    for command in ("strip", "cast --to bf16", "shard --mp 8", "merge"):
        assert "same answers" in steps[command]["shown"]
        assert wk.verify(tmp_path / steps[command]["folder"], progress=False).ok
    assert "259 tensors equal strip's, byte for byte" in steps["merge"]["shown"]
