"""``cast --to fp8``: what came from FP8 comes back, and what is written is a published FP8 checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import V3, V3_BF16, Tiny, write_tiny

import weightkit as wk
from weightkit.errors import PlanError, WriteError
from weightkit.transforms import cast_to_fp8


def opened(folder: Path, member: Tiny) -> wk.Checkpoint:
    write_tiny(folder, member)
    return wk.open_checkpoint(folder)


@pytest.mark.parametrize("to", ["bf16", "f32"])
def test_there_and_back_again(tmp_path: Path, to: str) -> None:
    source = opened(tmp_path / "fp8", V3)
    wk.write(wk.cast(source, to), tmp_path / "wide", progress=False)
    wk.write(cast_to_fp8(wk.open_checkpoint(tmp_path / "wide")), tmp_path / "again", progress=False)
    assert wk.verify(tmp_path / "again", values=True, progress=False).ok
    wk.write(wk.cast(wk.open_checkpoint(tmp_path / "again"), to), tmp_path / "wide-again", progress=False)
    files = sorted(path.name for path in (tmp_path / "wide").glob("*.safetensors"))
    assert files
    for name in files:
        assert (tmp_path / "wide-again" / name).read_bytes() == (tmp_path / "wide" / name).read_bytes(), name


def test_the_config_declares_it_as_the_published_ones_do(tmp_path: Path) -> None:
    source = opened(tmp_path / "bf16", V3_BF16)
    wk.write(cast_to_fp8(source, scale_fmt="ue8m0"), tmp_path / "fp8", progress=False)
    declared = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    assert declared["quant_method"] == "fp8"
    assert declared["weight_block_size"] == [128, 128]
    assert declared["scale_fmt"] == "ue8m0"
    written = wk.open_checkpoint(tmp_path / "fp8")
    published = opened(tmp_path / "published", V3)
    assert {name: (t.dtype, t.shape) for name, t in written.tensors.items()} == {
        name: (t.dtype, t.shape) for name, t in published.tensors.items()
    }


def test_rank_files_of_it_are_cut_from_blocks(tmp_path: Path) -> None:
    """Shards of the quantization are the shards of its files: narrowing commutes with quantizing."""
    made = cast_to_fp8(opened(tmp_path / "bf16", V3_BF16))
    wk.write(made, tmp_path / "fp8", progress=False)
    wk.write(wk.shard(made, mp=2), tmp_path / "one-pass", progress=False)
    wk.write(wk.shard(wk.open_checkpoint(tmp_path / "fp8"), mp=2), tmp_path / "two", progress=False)
    for rank in range(2):
        name = f"model{rank}-mp2.safetensors"
        assert (tmp_path / "one-pass" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_fp8_again_and_other_scales_are_refused(tmp_path: Path) -> None:
    source = opened(tmp_path / "fp8", V3)
    with pytest.raises(PlanError, match="FP8 already"):
        cast_to_fp8(source)
    with pytest.raises(PlanError, match="f32 or ue8m0"):
        cast_to_fp8(wk.cast(source, "bf16"), scale_fmt="e5m2")


def test_inf_has_no_code(tmp_path: Path) -> None:
    folder = tmp_path / "bf16"
    write_tiny(folder, V3_BF16)
    tensor = wk.open_checkpoint(folder)["model.layers.0.mlp.gate_proj.weight"]
    with Path(tensor.path).open("r+b") as file:  # type: ignore[union-attr]
        file.seek(tensor.offset)  # type: ignore[union-attr]
        file.write(b"\x80\x7f")
    with pytest.raises(WriteError, match=r"gate_proj.weight_scale_inv: values that are not finite"):
        wk.write(cast_to_fp8(wk.open_checkpoint(folder)), tmp_path / "fp8", progress=False)
