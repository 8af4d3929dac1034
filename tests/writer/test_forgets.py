"""Which plans leave nothing of their sources in the page cache."""

from __future__ import annotations

from pathlib import Path

from tiny import write_tiny

import weightkit as wk
from weightkit.layouts import lay_out_published
from weightkit.writer import make_plan
from weightkit.writer.executor import forgets


def test_large_plans_that_read_once_forget(tmp_path: Path) -> None:
    write_tiny(tmp_path / "fp8")
    source = wk.open_checkpoint(tmp_path / "fp8")
    plan = make_plan(lay_out_published(wk.strip_mtp(source)), tmp_path / "out")
    assert forgets(plan, plan.bytes_read)
    assert not forgets(plan, 2 * plan.bytes_read)
    assert forgets(make_plan(lay_out_published(wk.cast(source, "bf16")), tmp_path / "out"), plan.bytes_read)


def test_rank_files_that_share_their_sources_do_not(tmp_path: Path) -> None:
    write_tiny(tmp_path / "fp8")
    plan = make_plan(wk.shard(wk.open_checkpoint(tmp_path / "fp8"), mp=4), tmp_path / "out")
    assert not forgets(plan, 0)
