"""Folders of safetensors files read back by the format's page alone, and compared."""

from __future__ import annotations

import json
import struct
from pathlib import Path

Shape = tuple[int, ...]
Contents = dict[str, tuple[str, Shape, bytes]]
INDEX = "model.safetensors.index.json"


def read_safetensors(path: Path) -> Contents:
    """Name to dtype, shape and bytes."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    data = raw[8 + length :]
    found: Contents = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            found[name] = (entry["dtype"], tuple(entry["shape"]), data[begin:end])
    assert sum(len(content) for _, _, content in found.values()) == len(data)
    return found


def metadata(path: Path) -> dict[str, str]:
    """The ``__metadata__`` of a file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        found: dict[str, str] = json.loads(file.read(length))["__metadata__"]
    return found


def read_published(folder: Path) -> Contents:
    """All tensors of a folder with an index, which must tell the truth about every file, tensor and byte."""
    index = json.loads((folder / INDEX).read_text())
    found: Contents = {}
    weight_map: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = read_safetensors(path)
        assert not found.keys() & tensors.keys()
        found |= tensors
        weight_map |= dict.fromkeys(tensors, path.name)
    assert index["weight_map"] == weight_map
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in found.values())
    return found


def read_config(folder: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads((folder / "config.json").read_text())
    return config


def tree(folder: Path) -> dict[str, bytes]:
    """Relative path to content of every file."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def without(contents: Contents, *parts: str) -> Contents:
    """The tensors whose name has none of these parts."""
    return {name: content for name, content in contents.items() if not any(part in name for part in parts)}
