"""What does not fit its config is not made into another checkpoint: all of it is said, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import write_safetensors, write_tiny

import weightkit as wk
from weightkit.errors import MissingTensorError, Problems, TensorError

MAKE: dict[str, Callable[[wk.Checkpoint], object]] = {
    "strip": wk.strip_mtp,
    "cast": lambda checkpoint: wk.cast(checkpoint, "bf16"),
    "shard": lambda checkpoint: wk.shard(checkpoint, mp=2),
    "keep": lambda checkpoint: wk.keep_experts(checkpoint, 4),
}
NORM, ROUTER = "model.layers.1.input_layernorm.weight", "model.layers.2.mlp.gate.weight"


def rewrite(folder: Path, *, without: str | None = None, taller: str | None = None) -> wk.Checkpoint:
    """The tiny checkpoint as one file, a tensor left out or a row longer."""
    contents = write_tiny(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    if without is not None:
        del contents[without]
    if taller is not None:
        dtype, (rows, *rest), data = contents[taller]
        contents[taller] = (dtype, (rows + 1, *rest), data + data[: len(data) // rows])
    write_safetensors(folder / "model.safetensors", contents)
    index = {
        "metadata": {"total_size": sum(len(data) for _, _, data in contents.values())},
        "weight_map": dict.fromkeys(contents, "model.safetensors"),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return wk.open_checkpoint(folder)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_missing_tensor_is_named(make: Callable[[wk.Checkpoint], object], tmp_path: Path) -> None:
    with pytest.raises(MissingTensorError, match=NORM):
        make(rewrite(tmp_path, without=NORM))


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_wrong_shape_is_named(make: Callable[[wk.Checkpoint], object], tmp_path: Path) -> None:
    with pytest.raises(TensorError, match=rf"{ROUTER}: .* expected \[8, 144\], found \[9, 144\]"):
        make(rewrite(tmp_path, taller=ROUTER))


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_both_are_told_at_once(make: Callable[[wk.Checkpoint], object], tmp_path: Path) -> None:
    with pytest.raises(Problems) as caught:
        make(rewrite(tmp_path, without=NORM, taller=ROUTER))
    assert {type(problem) for problem in caught.value.problems} == {MissingTensorError, TensorError}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_whole_one_is_made(make: Callable[[wk.Checkpoint], object], tmp_path: Path) -> None:
    assert make(rewrite(tmp_path)) is not None
