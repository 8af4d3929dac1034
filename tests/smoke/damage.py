"""pico with one thing wrong, written by hand: its own tensors, changed and saved again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from weightkit import manifests

Tensors = dict[str, torch.Tensor]
INDEX = "model.safetensors.index.json"


def pico() -> Path:
    folder = manifests.load("pico").path
    assert folder is not None
    return folder


def damaged(source: Path, target: Path, change: Callable[[Tensors], None]) -> Path:
    """A copy of ``source`` whose tensors ``change`` has been at. Only files with changed tensors are written anew."""
    shutil.copytree(source, target)
    (target / "weightkit.lock.json").unlink(missing_ok=True)
    weight_map = json.loads((source / INDEX).read_text())["weight_map"]
    files = {file: load_file(source / file) for file in sorted(set(weight_map.values()))}
    tensors = {name: tensor for part in files.values() for name, tensor in part.items()}
    before = dict(tensors)
    change(tensors)
    for file, part in files.items():
        if any(tensors[name] is not before[name] for name in part):
            (target / file).chmod(0o644)
            save_file({name: tensors[name].contiguous() for name in part}, target / file, metadata={"format": "pt"})
    return target


def codes(tensor: torch.Tensor) -> torch.Tensor:
    """FP8 codes as bytes that can be moved about, in memory of their own."""
    return tensor.view(torch.uint8).clone() if tensor.dtype == torch.float8_e4m3fn else tensor.clone()


def edit(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    """A change of one tensor. ``change`` gets its own copy, FP8 as bytes, and gives what to put there."""

    def apply(tensors: Tensors) -> None:
        tensors[name] = change(codes(tensors[name])).view(tensors[name].dtype)

    return apply


def swap(one: str, other: str) -> Callable[[Tensors], None]:
    """Exchanges all tensors of two modules."""

    def apply(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(f"{one}.")]:
            beside = name.replace(one, other, 1)
            tensors[name], tensors[beside] = tensors[beside].clone(), tensors[name].clone()

    return apply
