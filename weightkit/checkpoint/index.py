"""``model.safetensors.index.json``: which file holds which tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weightkit.checkpoint.json_file import json_bytes, read_json_object
from weightkit.errors import IndexFileError

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Index:
    """``weight_map`` maps tensor to file name; ``total_size`` is in bytes of data, None where the index lacks it."""

    weight_map: Mapping[str, str]
    total_size: int | None


def read_index(path: Path) -> Index:
    """Read and check an index. Raises ``IndexFileError``, for a file name that leaves the folder too."""
    value = read_json_object(path, IndexFileError)
    weight_map = value.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise IndexFileError("no weight_map", where=path, expected="an object of tensor names to file names")
    good: set[str] = set()  # each of few files has many tensors
    for name, file in weight_map.items():
        if not isinstance(file, str) or not (file in good or is_file_name(file)):
            raise IndexFileError(f"{name!r}: not a file name beside the index", where=path, found=repr(file))
        good.add(file)
    metadata = value.get("metadata", {})
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None and not _is_whole(total):
        raise IndexFileError("metadata.total_size is no number of bytes", where=path, found=repr(total))
    return Index(weight_map, None if total is None else int(total))


def _is_whole(value: object) -> bool:
    """Some tools write whole floats; JSON as Python reads it has Infinity and NaN, too."""
    return type(value) is int or (isinstance(value, float) and value.is_integer())


def is_file_name(name: str) -> bool:
    """Whether ``name`` is one path component that stays in its folder, on any system."""
    return bool(name) and name not in (".", "..") and not any(c in "/\\" or not _is_written(c) for c in name)


def is_relative_path(name: str) -> bool:
    """Whether ``name`` is a path with slashes that stays below its folder, on any system."""
    return all(map(is_file_name, name.split("/")))


def _is_written(character: str) -> bool:
    """Neither a control character nor half of a surrogate pair, which no path can be made from."""
    return ord(character) >= 32 and not 0xD800 <= ord(character) < 0xE000


def index_bytes(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """The file as the hubs have it: tensor names sorted, indented by two.

    Python's encoder indents at a tenth of the speed at which it writes lines; so the map, of which all are, is written
    with separators that look indented.
    """
    lines = json.dumps(dict(sorted(weight_map.items())), ensure_ascii=False, separators=(",\n    ", ": "))
    frame = json_bytes({"metadata": {"total_size": total_size}, "weight_map": {}})
    return frame.replace(b": {}", f": {{\n    {lines[1:-1]}\n  }}".encode()) if weight_map else frame
