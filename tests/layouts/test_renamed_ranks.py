"""Rank files under each other's names: all parts are there and fit, and joined in that order they are garbage."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import V3_INT4, Tiny, write_tiny

import weightkit as wk
from weightkit.errors import CheckpointError


@pytest.mark.parametrize(("model", "degree"), [(Tiny(), {"mp": 4}), (Tiny(), {"ep": 3}), (V3_INT4, {"mp": 2})])
def test_files_that_were_swapped_are_refused(model: Tiny, degree: dict[str, int], tmp_path: Path) -> None:
    write_tiny(tmp_path / "source", model)
    target = tmp_path / "ranks"
    wk.write(wk.shard(wk.open_checkpoint(tmp_path / "source"), **degree), target, device="cpu", progress=False)
    ((kind, size),) = degree.items()
    first, second = (target / f"model{rank}-{kind}{size}.safetensors" for rank in (0, 1))
    first.rename(tmp_path / "between")
    second.rename(first)
    (tmp_path / "between").rename(second)
    with pytest.raises(CheckpointError, match="holds experts of another rank") as caught:
        wk.open_checkpoint(target)
    assert first.name in str(caught.value)
    assert second.name in str(caught.value)
