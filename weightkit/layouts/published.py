"""The layout of the hubs: ``model.safetensors.index.json`` and shards, or a single safetensors file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from weightkit.checkpoint import INDEX_NAME, Checkpoint, read_index
from weightkit.checkpoint.checkpoint import stored_tensors
from weightkit.checkpoint.folder import side_files
from weightkit.checkpoint.tensors import LazyTensor, Stored, size_bytes
from weightkit.errors import raise_all
from weightkit.layouts.fileset import FileSet, file_set
from weightkit.layouts.scan import Scan, placement_problems, scan_files

#: The size that the published shards have.
SHARD_BYTES = 5_000_000_000
SINGLE_NAME = "model.safetensors"
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")


def open_published(folder: Path, config: Mapping[str, object]) -> Checkpoint:
    """Open a folder with an index. Raises the problems of index and files, all together."""
    index = read_index(folder / INDEX_NAME)
    scan = scan_files(folder, dict.fromkeys(index.weight_map.values()))
    # A wrong total_size keeps nobody from reading.
    problems = [*scan.problems, *placement_problems(scan, index, folder / INDEX_NAME)]
    raise_all("not a whole checkpoint", problems, where=folder, fix=f"weightkit verify {folder} lists all of it.")
    placement = {entry.name: name for name, header in scan.headers.items() for entry in header.entries}
    return Checkpoint(folder, "published", _tensors(scan), config, side_files(folder), placement, scan.stamps)


def open_single(path: Path, config: Mapping[str, object]) -> Checkpoint:
    """Open one safetensors file; what lies beside it is its side files."""
    scan = scan_files(path.parent, [path.name])
    raise_all("not a whole checkpoint", scan.problems, where=path)
    tensors = _tensors(scan)
    placement = dict.fromkeys(tensors, SINGLE_NAME)
    return Checkpoint(path, "single file", tensors, config, side_files(path.parent), placement, scan.stamps)


def _tensors(scan: Scan) -> dict[str, Stored]:
    return {
        name: tensor
        for file, header in sorted(scan.headers.items())
        for name, tensor in stored_tensors(scan.folder / file, header).items()
    }


def lay_out_published(checkpoint: Checkpoint, *, shard_bytes: int = SHARD_BYTES) -> FileSet:
    """The checkpoint as shards with an index.

    Tensors stay in the file that the source has them in, renumbered where files fell away; without such a source they
    are packed in order into shards of at most ``shard_bytes`` (a larger tensor has a shard to itself).
    """
    tensors = checkpoint.tensors
    if all(name in checkpoint.placement for name in tensors):
        grouped: dict[str, dict[str, LazyTensor]] = {}
        for name, tensor in tensors.items():
            grouped.setdefault(checkpoint.placement[name], {})[name] = tensor
        names = renumbered(grouped)
        files = {names[file]: group for file, group in grouped.items()}
    else:
        groups = _pack(tensors, shard_bytes)
        files = dict(zip(shard_names(len(groups)), groups, strict=True))
    return file_set(checkpoint, files, index=True)


def renumbered(names: Iterable[str]) -> dict[str, str]:
    """Old to new file name: ``model-00002-of-000163`` becomes ``...-of-000160`` when 160 of the numbered files are
    left.

    Names of another pattern, and a complete set, stay as they are.
    """
    names = list(names)
    numbered = {name: match for name in names if (match := _NUMBERED.fullmatch(name))}
    if len(numbered) != len(names) or all(int(match["count"]) == len(names) for match in numbered.values()):
        return {name: name for name in names}
    ordered = sorted(numbered.items(), key=lambda item: int(item[1]["number"]))
    width = min(len(match["number"]) for match in numbered.values())  # 1 where numbers are not padded
    count = ordered[0][1]["count"]
    total = f"{len(names):0{len(count)}}" if count.startswith("0") else f"{len(names)}"
    return {
        name: f"{match['stem']}-{number:0{width}}-of-{total}.safetensors"
        for number, (name, match) in enumerate(ordered, start=1)
    }


def shard_names(count: int) -> list[str]:
    """``model-00001-of-000163.safetensors`` and so on; ``model.safetensors`` for one."""
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05}-of-{count:06}.safetensors" for number in range(1, count + 1)]


def _pack(tensors: Mapping[str, LazyTensor], shard_bytes: int) -> list[dict[str, LazyTensor]]:
    groups: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = size_bytes(tensor)
        if groups[-1] and filled + size > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += size
    return groups
