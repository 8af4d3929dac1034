"""A checkpoint: published names to lazy tensors, with the config and the side files that belong to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weightkit.checkpoint.folder import SideFile
from weightkit.checkpoint.header import Header
from weightkit.checkpoint.stamp import Stamp
from weightkit.checkpoint.tensors import LazyTensor, Stored, size_bytes
from weightkit.errors import MissingTensorError


@dataclass(frozen=True)
class Checkpoint:
    """What a transform takes and returns.

    Attributes:
        root: the folder (or single file) that was opened; of an address a ``RemotePath``.
        layout: how it lies on disk, such as ``published``, ``8 mp ranks`` or ``single file``; words for messages.
        tensors: published name to tensor, in the order in which they are best read.
        config: ``config.json`` as it stands; transforms keep it true.
        side_files: relative path to file: tokenizer, chat template, code.
        placement: published name to the file that holds it, where the source is in the published layout.
        stamps: each source file's size and modification time when it was opened; of a remote one its version.
    """

    root: Path
    layout: str
    tensors: Mapping[str, LazyTensor]
    config: Mapping[str, object]
    side_files: Mapping[str, SideFile] = field(default_factory=dict)
    placement: Mapping[str, str] = field(default_factory=dict)
    stamps: Mapping[str, Stamp] = field(default_factory=dict)

    def __getitem__(self, name: str) -> LazyTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise MissingTensorError("no such tensor", where=f"{self.root}: {name}") from None

    @property
    def size_bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(size_bytes(tensor) for tensor in self.tensors.values())

    @property
    def dtypes(self) -> frozenset[str]:
        """The dtypes of its tensors."""
        return frozenset(tensor.dtype for tensor in self.tensors.values())


def stored_tensors(path: Path, header: Header) -> dict[str, Stored]:
    """The tensors of one file, in the order of their bytes."""
    where = str(path)
    return {
        entry.name: Stored(where, header.data_offset + entry.begin, entry.dtype, entry.shape)
        for entry in header.entries
    }
