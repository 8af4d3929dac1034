"""A config may name groups although its selection is greedy: what is kept must still be what the config then says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from folders import read_published
from tiny import V2_LITE, write_tiny

import weightkit as wk
from weightkit.errors import PlanError


def test_counts_that_do_not_divide_into_the_groups(tmp_path: Path) -> None:
    write_tiny(tmp_path / "source", replace(V2_LITE, groups=2))
    checkpoint = wk.open_checkpoint(tmp_path / "source")
    with pytest.raises(PlanError, match="one of 2, 4, 6, 8"):
        wk.keep_experts(checkpoint, 3)
    wk.write(wk.keep_experts(checkpoint, 4), tmp_path / "kept", device="cpu", progress=False)
    kept = read_published(tmp_path / "kept")
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["n_routed_experts"] == 4
    assert kept["model.layers.1.mlp.gate.weight"][1] == (4, 144)
    assert {int(name.split(".")[5]) for name in kept if ".experts." in name} == {0, 1, 2, 3}
    assert wk.verify(tmp_path / "kept", progress=False).ok
