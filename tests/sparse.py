"""Checkpoints of full size that take no room: real headers, and holes where the data would be.

``write_sparse`` makes any; ``write_known`` makes a published member of full size (DeepSeek-V3: 163 files, 91,991
tensors, 688,574,839,360 bytes of data) from its manifest and blueprint, whose totals other tests hold against what the
hubs report. Holes read as zeros. The filesystem must have sparse files, as ext4, xfs, btrfs and tmpfs do.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path

Shape = tuple[int, ...]
ITEMSIZE = {"F8_E4M3": 1, "U8": 1, "BF16": 2, "F16": 2, "F32": 4}


def write_sparse(
    folder: Path,
    config: Mapping[str, object],
    tensors: Mapping[str, tuple[str, Shape]],
    *,
    shards: int = 1,
    side_files: Mapping[str, str] | None = None,
) -> int:
    """Write headers, index, config and side files. Returns the bytes of data that the holes stand for.

    Args:
        tensors: name to dtype and shape, in the order of their bytes.
        shards: files of about the same size that the tensors are spread over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {name: prod(shape) * ITEMSIZE[dtype] for name, (dtype, shape) in tensors.items()}
    total, before = sum(sizes.values()), 0
    groups: list[list[str]] = [[] for _ in range(shards)]
    for name, size in sizes.items():
        groups[min(shards - 1, before * shards // max(1, total))].append(name)
        before += size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{shards:06}.safetensors"
        write_file(folder / file, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    kind = "DeepseekV2ForCausalLM" if config["model_type"] == "deepseek_v2" else "DeepseekV3ForCausalLM"
    (folder / "config.json").write_text(json.dumps({"architectures": [kind], **config}))
    for name, text in (side_files or {}).items():
        (folder / name).write_text(text)
    return total


def write_file(path: Path, tensors: Mapping[str, tuple[str, Shape]]) -> None:
    """One file: a header, and a hole for the data."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + prod(shape) * ITEMSIZE[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + position)


def write_known(folder: Path, name: str = "deepseek-v3") -> int:
    """Write a member of full size. Returns the bytes of data that it stands for."""
    from weightkit import manifests
    from weightkit.family import Architecture, blueprint

    manifest = manifests.load(name)
    records = blueprint(Architecture.from_config(manifest.config))
    tensors = {record.name: (record.dtype, record.shape) for record in records.values()}
    files = manifest.expected.files if manifest.expected is not None else None
    sides = {"tokenizer_config.json": "{}", "tokenizer.json": "{}", "generation_config.json": "{}"}
    return write_sparse(folder, manifest.config, tensors, shards=files or 1, side_files=sides)
