"""How tensors are laid out in shards, and what the shards are called."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import V3, write_tiny

import weightkit as wk
from weightkit.checkpoint.tensors import Stored, size_bytes
from weightkit.layouts import lay_out_published
from weightkit.layouts.published import renumbered, shard_names


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["model-00001-of-000163.safetensors", "model-00003-of-000163.safetensors"],
            ["model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"],
        ),
        (
            ["model-2-of-61.safetensors", "model-10-of-61.safetensors"],
            ["model-1-of-2.safetensors", "model-2-of-2.safetensors"],
        ),
        (["model-1-of-2.safetensors", "model-2-of-2.safetensors"], None),
        (["model-00002-of-000002.safetensors", "other.safetensors"], None),
        (["a.safetensors"], None),
        (["model-00007-of-000009.safetensors"], ["model-00001-of-000001.safetensors"]),
    ],
)
def test_renumbered(names: list[str], expected: list[str] | None) -> None:
    assert renumbered(names) == dict(zip(names, expected or names, strict=True))


def test_renumbering_keeps_the_order_of_numbers_and_never_gives_a_name_twice() -> None:
    names = [f"model-{number}-of-200.safetensors" for number in (11, 9, 100, 1)]
    found = renumbered(names)
    assert sorted(found.values()) == [found[names[3]], found[names[1]], found[names[0]], found[names[2]]]
    two_stems = ["a-1-of-2.safetensors", "b-1-of-3.safetensors", "a-2-of-2.safetensors"]
    assert len(set(renumbered(two_stems).values())) == 3


def test_shard_names() -> None:
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(2) == ["model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"]


@pytest.mark.parametrize("shard_bytes", [1, 40_000, 10**9])
def test_packing(shard_bytes: int, tmp_path: Path) -> None:
    write_tiny(tmp_path)
    checkpoint = wk.keep_experts(wk.open_checkpoint(tmp_path), 4)
    files = lay_out_published(checkpoint, shard_bytes=shard_bytes)
    assert [name for tensors in files.files.values() for name in tensors] == list(checkpoint.tensors)
    assert list(files.files) == shard_names(len(files.files))
    for tensors in files.files.values():
        assert tensors
        assert len(tensors) == 1 or sum(map(size_bytes, tensors.values())) <= shard_bytes


def test_tensors_stay_in_the_shards_of_the_source(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    checkpoint = wk.open_checkpoint(tmp_path)
    for changed in (checkpoint, wk.cast(checkpoint, "bf16")):
        files = lay_out_published(changed).files
        assert {name: file for file, tensors in files.items() for name in tensors} == {
            name: file for name, file in checkpoint.placement.items() if name in changed.tensors
        }


def test_each_file_reads_the_source_from_front_to_back(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    checkpoint = wk.open_checkpoint(tmp_path)
    for files in (lay_out_published(checkpoint), wk.shard(checkpoint, ep=2)):
        for tensors in files.files.values():
            places = [(tensor.path, tensor.offset) for tensor in tensors.values() if isinstance(tensor, Stored)]
            assert len(places) == len(tensors)
            assert places == sorted(places)


def test_the_index_goes_with_shards_alone(tmp_path: Path) -> None:
    write_tiny(tmp_path, V3)
    checkpoint = wk.open_checkpoint(tmp_path)
    assert lay_out_published(checkpoint).index
    assert not wk.shard(checkpoint, mp=2).index
