"""``cast --to fp8`` reads and quantizes each weight once, and writes the same bytes after a stop anywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from folders import tree
from tiny import V3_BF16, V3_INT4, Tiny, write_tiny

import weightkit as wk
from weightkit.checkpoint.tensors import BlockQuantized, LazyTensor, size_bytes, stored_parts
from weightkit.compute import CpuEngine, KeptScales
from weightkit.errors import WriteError
from weightkit.layouts import lay_out_published
from weightkit.transforms import cast_to_fp8
from weightkit.writer import execute, make_plan, pieces, stream
from weightkit.writer.plan import Plan

#: Weights of several blocks a side.
SEVERAL: Tiny = replace(V3_BF16, hidden=384, intermediate=768, moe=256)


@pytest.fixture(autouse=True)
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight of more than 128 rows is several strips."""
    monkeypatch.setattr(pieces, "STRIP_BYTES", 1 << 14)


def planned(source: Path, target: Path, *, mp: int | None = None) -> Plan:
    made = cast_to_fp8(wk.open_checkpoint(source))
    return make_plan(wk.shard(made, mp=mp) if mp else lay_out_published(made), target)


class Counting(CpuEngine):
    """Counts the strips that it quantizes, and fails at one of them."""

    def __init__(self, fail_at: int = -1) -> None:
        super().__init__()
        self.quantized, self.fail_at = 0, fail_at

    def quantize_blocks(self, *arguments: object) -> object:  # type: ignore[override]
        self.quantized += 1
        if self.quantized == self.fail_at:
            raise WriteError("stopped here")
        return super().quantize_blocks(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("mp", [None, 2])
@pytest.mark.parametrize("member", [SEVERAL, V3_INT4], ids=["bf16", "int4"])
def test_each_weight_is_read_and_quantized_once(member: Tiny, mp: int | None, tmp_path: Path) -> None:
    write_tiny(tmp_path / "wide", member)
    plan = planned(tmp_path / "wide", tmp_path / "fp8", mp=mp)
    engine = Counting()
    written = execute(plan, engine=engine, progress=False, jobs=1)
    codes = [t for file in plan.files for t in file.tensors.values() if isinstance(t, BlockQuantized) and not t.scales]
    assert codes
    assert engine.quantized == sum(len(list(pieces.pieces({"codes": tensor}))) for tensor in codes)
    if member is SEVERAL and mp is None:
        needed = (tensor for file in plan.files for tensor in file.tensors.values() if not is_scales(tensor))
        once = sum(size_bytes(part) for tensor in needed for part in stored_parts(tensor))
        assert written.read_bytes == plan.bytes_read == once


def is_scales(tensor: LazyTensor) -> bool:
    return isinstance(tensor, BlockQuantized) and tensor.scales


def test_a_stop_between_codes_and_scales_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is continued after the codes has to quantize for the scales alone."""
    monkeypatch.setattr(stream, "BUFFER_BYTES", 1 << 12)
    write_tiny(tmp_path / "wide", SEVERAL)
    whole = Counting()
    execute(planned(tmp_path / "wide", tmp_path / "whole"), engine=whole, progress=False, jobs=1)
    take, missed = KeptScales.take, []

    def spy(kept: KeptScales, scales: BlockQuantized) -> object:
        found = take(kept, scales)
        missed.extend([scales] if found is None else [])
        return found

    monkeypatch.setattr(KeptScales, "take", spy)
    again = 0
    for fail_at in (6, 12):
        target = tmp_path / f"stopped-{fail_at}"
        with pytest.raises(WriteError, match="stopped here"):
            execute(planned(tmp_path / "wide", target), engine=Counting(fail_at), progress=False, jobs=1)
        assert not missed
        execute(planned(tmp_path / "wide", target), progress=False, jobs=1)
        again += len(missed)
        assert tree(target) == tree(tmp_path / "whole")
        missed.clear()
    assert again
