"""MTP layers out: tensors, config, index, totals and shards' names; the rest byte for byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from folders import INDEX, read_config, read_published, read_safetensors, tree, without
from tiny import V2_LITE, V3, Tiny, write_tiny

import weightkit as wk
from weightkit.writer import make_plan


def strip(source: Path, target: Path) -> Path:
    wk.write(wk.strip_mtp(wk.open_checkpoint(source)), target, progress=False)
    return target


@pytest.mark.parametrize(
    "model", [V3, replace(V3, layers=5, mtp_layers=2), replace(V3, fp8=False)], ids=["V3", "2", "BF16"]
)
def test_strip(model: Tiny, tmp_path: Path) -> None:
    contents = write_tiny(tmp_path / "v3", model)
    stripped = strip(tmp_path / "v3", tmp_path / "stripped")
    mtp = [f"layers.{model.layers + number}." for number in range(model.mtp_layers)]
    assert read_published(stripped) == without(contents, *mtp)
    assert len(read_published(stripped)) < len(contents)
    assert read_config(stripped) == model.config() | {"num_nextn_predict_layers": 0}


def test_shards_that_fall_away_are_not_counted(tmp_path: Path) -> None:
    write_tiny(tmp_path / "v3", shards=20)
    stripped = strip(tmp_path / "v3", tmp_path / "stripped")
    names = sorted(path.name for path in stripped.glob("*.safetensors"))
    count = len(names)
    assert count < 20
    assert names == [f"model-{number:05}-of-{count:06}.safetensors" for number in range(1, count + 1)]


def test_tensors_keep_their_shards(tmp_path: Path) -> None:
    write_tiny(tmp_path / "v3", shards=4)
    stripped = strip(tmp_path / "v3", tmp_path / "stripped")
    for path in stripped.glob("*.safetensors"):
        assert read_safetensors(path) == without(read_safetensors(tmp_path / "v3" / path.name), "layers.3.")


def test_only_byte_copies(tmp_path: Path) -> None:
    write_tiny(tmp_path / "v3")
    stripped = wk.strip_mtp(wk.open_checkpoint(tmp_path / "v3"))
    plan = make_plan(wk.merge(stripped), tmp_path / "out")
    assert plan.computed_tensors == 0
    assert plan.bytes_read == stripped.size_bytes


def test_a_checkpoint_without_mtp_layers_comes_back_equal(tmp_path: Path) -> None:
    contents = write_tiny(tmp_path / "v2", V2_LITE)
    stripped = strip(tmp_path / "v2", tmp_path / "stripped")
    assert read_published(stripped) == contents
    assert read_config(stripped) == V2_LITE.config()
    again = strip(stripped, tmp_path / "again")
    first, second = tree(stripped), tree(again)
    del first["weightkit.lock.json"], second["weightkit.lock.json"]
    assert first == second


def test_a_stale_field_is_corrected(tmp_path: Path) -> None:
    """Layers taken out by another tool, which left the config as it was."""
    write_tiny(tmp_path / "v3", replace(V3, mtp_layers=0, extra_config={"num_nextn_predict_layers": 1}))
    assert read_config(strip(tmp_path / "v3", tmp_path / "stripped"))["num_nextn_predict_layers"] == 0


def test_layer_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    """Layer 10 of 12 is none of the MTP layers 12 and on, though `1` begins both."""
    write_tiny(tmp_path / "v3", replace(V3, layers=12, mtp_layers=1))
    names = read_published(strip(tmp_path / "v3", tmp_path / "stripped"))
    layers = {int(name.split(".")[2]) for name in names if ".layers." in name}
    assert layers == set(range(12))


def test_a_single_file(tmp_path: Path) -> None:
    contents = write_tiny(tmp_path / "v3", shards=1, pattern="model.safetensors")
    (tmp_path / "v3" / INDEX).unlink()
    stripped = strip(tmp_path / "v3" / "model.safetensors", tmp_path / "stripped")
    assert read_published(stripped) == without(contents, "layers.3.")
    assert [path.name for path in stripped.glob("*.safetensors")] == ["model.safetensors"]
