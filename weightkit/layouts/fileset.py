"""A checkpoint laid out in files: what the writer takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weightkit.checkpoint import Checkpoint
from weightkit.checkpoint.folder import CONFIG_NAME, SideFile
from weightkit.checkpoint.json_file import json_bytes
from weightkit.checkpoint.stamp import Stamp
from weightkit.checkpoint.tensors import LazyTensor
from weightkit.layouts.declare import declare_in_side_files, without_stale_quantization


@dataclass(frozen=True)
class FileSet:
    """Files to be written.

    Attributes:
        files: file name to its tensors, in the order of their bytes.
        side_files: relative path to file, config included.
        index: whether an index goes with the files.
        stamps: of the source files.
        root: the source, which the target must not touch.
    """

    files: Mapping[str, Mapping[str, LazyTensor]]
    side_files: Mapping[str, SideFile]
    index: bool
    stamps: Mapping[str, Stamp]
    root: str


def file_set(
    checkpoint: Checkpoint,
    files: Mapping[str, Mapping[str, LazyTensor]],
    *,
    index: bool,
    extra: Mapping[str, bytes] | None = None,
) -> FileSet:
    """The files with the checkpoint's side files, its config, true of these tensors (and of GPTQ the
    ``quantize_config.json`` that repeats it), and ``extra`` files by name."""
    config = without_stale_quantization(checkpoint.config, checkpoint.tensors.values())
    sides = declare_in_side_files(config, checkpoint.side_files)
    for name, content in {CONFIG_NAME: json_bytes(dict(config)), **(extra or {})}.items():
        sides[name] = SideFile(content=content)
    return FileSet(files, sides, index, checkpoint.stamps, str(checkpoint.root))
