"""Fewer experts: router rows, bias, renumbering, config; and what cannot be kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from folders import Contents, read_config, read_published, read_safetensors
from tiny import V2_LITE, V3, V3_BF16, Tiny, write_safetensors, write_tiny

import weightkit as wk
from weightkit.errors import FormatError, PlanError, Problems, TensorError, WeightkitError
from weightkit.transforms import read_kept

Kept = dict[int, list[int]]


def expected(contents: Contents, kept: Kept) -> Contents:
    """By hand: the kept experts under their new numbers, and the rows of router and bias that are theirs."""
    found: Contents = {}
    for name, (dtype, shape, data) in contents.items():
        parts = name.split(".")
        ids = kept.get(int(parts[2])) if parts[1] == "layers" else None
        if ids is not None and "experts" in parts:
            expert = int(parts[5])
            if expert in ids:
                parts[5] = str(ids.index(expert))
                found[".".join(parts)] = (dtype, shape, data)
        elif ids is not None and parts[4] == "gate":
            rows = np.frombuffer(data, np.uint8).reshape(shape[0], -1)[ids]
            found[name] = (dtype, (len(ids), *shape[1:]), rows.tobytes())
        else:
            found[name] = (dtype, shape, data)
    return found


@pytest.mark.parametrize(
    ("model", "count", "kept"),
    [
        (V3, 4, [0, 1, 4, 5]),  # the first of each of two groups
        (V3_BF16, 6, [0, 1, 2, 4, 5, 6]),
        (V2_LITE, 3, [0, 1, 2]),
        (V3, 8, list(range(8))),
    ],
    ids=["V3", "V3-BF16", "V2-Lite", "all"],
)
def test_the_first_of_each_group(model: Tiny, count: int, kept: list[int], tmp_path: Path) -> None:
    contents = write_tiny(tmp_path / "v3", model)
    wk.write(wk.keep_experts(wk.open_checkpoint(tmp_path / "v3"), count), tmp_path / "few", progress=False)
    layers = range(1, model.layers + model.mtp_layers)
    assert read_published(tmp_path / "few") == expected(contents, dict.fromkeys(layers, kept))
    assert read_config(tmp_path / "few") == model.config() | {"n_routed_experts": count}


def test_ids_by_layer(tmp_path: Path) -> None:
    contents = write_tiny(tmp_path / "v3")
    kept = {1: [3, 2, 7, 4], 2: [0, 3, 5, 6], 3: [1, 2, 4, 7]}
    checkpoint = wk.open_checkpoint(tmp_path / "v3")
    wk.write(wk.keep_experts(checkpoint, 4, kept=kept), tmp_path / "few", progress=False)
    assert read_published(tmp_path / "few") == expected(contents, {layer: sorted(ids) for layer, ids in kept.items()})


def test_then_stripped_cast_and_sharded(tmp_path: Path) -> None:
    """All in one pass, and the demo's JSON has the new count."""
    write_tiny(tmp_path / "v3")
    checkpoint = wk.cast(wk.keep_experts(wk.open_checkpoint(tmp_path / "v3"), 4), "bf16")
    wk.write(wk.shard(checkpoint, mp=4), tmp_path / "mp4", device="cpu", progress=False)
    demo = json.loads((tmp_path / "mp4" / "demo_config.json").read_text())
    assert (demo["n_routed_experts"], demo["dtype"]) == (4, "bf16")
    for rank in range(4):
        names = read_safetensors(tmp_path / "mp4" / f"model{rank}-mp4.safetensors")
        assert {int(name.split(".")[4]) for name in names if ".experts." in name} == {rank}
        assert names["layers.1.ffn.gate.weight"][1] == (4, 144)
        assert names["layers.1.ffn.gate.bias"][1] == (4,)


def test_the_router_is_a_copy_of_row_ranges(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    checkpoint = wk.keep_experts(wk.open_checkpoint(tmp_path), 4)
    assert checkpoint["model.layers.1.mlp.gate.weight"].shape == (4, 144)
    from weightkit.checkpoint.copies import copies

    assert [copy.run_bytes for copy in copies(checkpoint["model.layers.1.mlp.gate.weight"])] == [2 * 288, 2 * 288]


def refusal(folder: Path, count: int, kept: Kept | None = None) -> WeightkitError:
    with pytest.raises(WeightkitError) as caught:
        wk.keep_experts(wk.open_checkpoint(folder), count, kept=kept)
    return caught.value


@pytest.mark.parametrize("count", [0, -4, 1, 2, 3, 5, 7, 9, 10, 10**9])
def test_a_count_that_routing_does_not_allow(count: int, tmp_path: Path) -> None:
    write_tiny(tmp_path)
    error = refusal(tmp_path, count)
    assert isinstance(error, PlanError)
    assert f"--experts: {count} experts cannot be kept of 8: expected one of 4, 6, 8" in str(error)


def test_many_legal_counts_are_abridged(tmp_path: Path) -> None:
    write_tiny(tmp_path, replace(V3, experts=256, layers=2, moe=8, shared=64, mtp_layers=0))
    assert "one of 4, 6, ... 256" in str(refusal(tmp_path, 3))


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [
        ([0, 1, 4], "unequal shares of the groups: expected 2 of each 4, found [2, 1]"),
        ([0, 1, 2, 4], "unequal shares"),
        ([0, 1, 4, 4], "not distinct ids"),
        ([0, 1, 4, 8], "not distinct ids of experts: expected 0 to 7"),
        ([-1, 1, 4, 5], "not distinct ids"),
        ([], "unequal shares"),
    ],
)
def test_ids_that_cannot_be_kept(ids: list[int], complaint: str, tmp_path: Path) -> None:
    write_tiny(tmp_path)
    error = refusal(tmp_path, 4, {1: [0, 1, 4, 5], 2: ids, 3: [0, 1, 4, 5]})
    assert isinstance(error, PlanError)
    assert f"--keep, layer 2: {complaint}" in str(error)


def test_all_layers_problems_at_once(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    error = refusal(tmp_path, 4, {0: [0, 1, 4, 5], 1: [0, 0, 4, 5], 9: []})
    assert isinstance(error, Problems)
    assert [problem.where for problem in error.problems] == [f"--keep, layer {layer}" for layer in (0, 1, 2, 3, 9)]


def test_a_router_of_another_size_is_not_cut(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        tensors = read_safetensors(path)
        if "model.layers.1.mlp.gate.weight" in tensors:
            tensors["model.layers.1.mlp.gate.weight"] = ("BF16", (7, 144), bytes(7 * 288))
            write_safetensors(path, tensors)
    error = refusal(tmp_path, 4)
    assert isinstance(error, TensorError)
    assert error.where == "model.layers.1.mlp.gate.weight"


def test_a_file_of_ids(tmp_path: Path) -> None:
    (tmp_path / "keep.json").write_text('{"3": [0, 5], "10": []}')
    assert read_kept(tmp_path / "keep.json") == {3: [0, 5], 10: []}


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"x":[1]}', '{"-1":[1]}', '{"1":1}', '{"1":["1"]}', '{"1":[true]}', '{"²":[1]}', '{"1":[],"01":[]}'],
)
def test_a_damaged_file_of_ids(text: str, tmp_path: Path) -> None:
    (tmp_path / "keep.json").write_text(text)
    with pytest.raises(FormatError):
        read_kept(tmp_path / "keep.json")
