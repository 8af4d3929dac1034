"""The plan of a write, as data: it prints, it hashes, it can be executed elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from weightkit.checkpoint import build_header
from weightkit.checkpoint.copies import copies
from weightkit.checkpoint.folder import LOCK_NAME, SideFile
from weightkit.checkpoint.index import INDEX_NAME, index_bytes, is_file_name, is_relative_path
from weightkit.checkpoint.stamp import Stamp
from weightkit.checkpoint.tensors import (
    BlockQuantized,
    Cast,
    Concat,
    Dequantized,
    GroupDequantized,
    LazyTensor,
    Narrow,
    Promised,
    Stored,
    is_plain,
    made_from,
    size_bytes,
    stored_parts,
)
from weightkit.durable import PARTIAL, STATE_DIR
from weightkit.errors import PlanError, TargetError
from weightkit.layouts import FileSet
from weightkit.remote.path import as_path, is_remote

#: Loaders (transformers among them) refuse files without it.
METADATA = {"format": "pt"}


@dataclass(frozen=True)
class PlannedFile:
    """One output file: ``header`` and then the tensors in order."""

    name: str
    tensors: Mapping[str, LazyTensor]
    header: bytes
    size_bytes: int

    @property
    def computed(self) -> list[LazyTensor]:
        """The tensors that are converted; the rest is copied."""
        return [tensor for tensor in self.tensors.values() if not is_plain(tensor)]


@dataclass(frozen=True)
class Plan:
    """What will be written where, from which bytes.

    Attributes:
        target: the folder to fill.
        files: the weight files.
        side_files: relative path to small file, the index among them where the layout has one.
        stamps: size and modification time, or version, of every source file.
        root: the source's folder, file or address.
    """

    target: Path
    files: tuple[PlannedFile, ...]
    side_files: Mapping[str, SideFile]
    stamps: Mapping[str, Stamp]
    root: str

    @property
    def bytes_written(self) -> int:
        """Bytes of all weight files."""
        return sum(file.size_bytes for file in self.files)

    @cached_property
    def bytes_read(self) -> int:
        """Bytes that are read of the source, as ``read_bytes`` counts, for each output that needs them; codes and
        scales of a weight in one file are one."""
        return sum(read_bytes(tensor) for file in self.files for tensor in _read_for(file.tensors.values()))

    @cached_property
    def source_bytes(self) -> int:
        """Bytes of source tensors that the outputs are made from, each counted once: a disk reads no less, however much
        the page cache keeps of what several outputs need."""
        tensors = (tensor for file in self.files for tensor in file.tensors.values())
        return sum(map(size_bytes, {part for tensor in tensors for part in stored_parts(tensor)}))

    @property
    def reads_once(self) -> bool:
        """Whether the source is read from front to back: the outputs share next to none of it, and no tensor is put
        together or cut."""
        whole = all(_is_whole(tensor) for file in self.files for tensor in file.tensors.values())
        return whole and self.bytes_read <= 1.02 * self.source_bytes

    @property
    def computed(self) -> list[LazyTensor]:
        """The tensors that are converted; the rest is copied."""
        return [tensor for file in self.files for tensor in file.computed]

    @property
    def computed_tensors(self) -> int:
        """How many tensors are converted."""
        return len(self.computed)

    @property
    def tensors(self) -> int:
        """How many tensors the outputs hold."""
        return sum(len(file.tensors) for file in self.files)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over outputs and sources: equal plans write equal bytes. The target's place is no part of it."""
        digest = hashlib.sha256()
        for line in self._lines():
            digest.update(json.dumps(line, separators=(",", ":"), ensure_ascii=False).encode() + b"\n")
        return digest.hexdigest()

    def _lines(self) -> list[object]:
        paths = {path: str(number) for number, path in enumerate(self.stamps)}
        sources = [[Path(path).name, *stamp.to_list()] for path, stamp in self.stamps.items()]
        sides = {name: _sha256(file) for name, file in sorted(self.side_files.items())}
        lines: list[object] = [["weightkit plan", 1], sources, sides]
        for file in self.files:
            described = [[name, describe(tensor, paths)] for name, tensor in file.tensors.items()]
            lines.append([file.name, hashlib.sha256(file.header).hexdigest(), described])
        return lines


def _is_whole(tensor: LazyTensor) -> bool:
    """Whether it takes all bytes of what it is made from, as they lie in one file."""
    if isinstance(tensor, (Dequantized, Cast, BlockQuantized)):
        return all(map(_is_whole, made_from(tensor)))
    return isinstance(tensor, (Stored, Promised))


def _read_for(tensors: Iterable[LazyTensor]) -> Iterator[LazyTensor]:
    """All but block scales that are found with the codes before them."""
    last: LazyTensor | None = None
    for tensor in tensors:
        if not (isinstance(tensor, BlockQuantized) and tensor.scales and replace(tensor, scales=False) == last):
            yield tensor
        last = tensor


def read_bytes(tensor: LazyTensor) -> int:
    """Bytes of files that are read to make a tensor. A part of the columns is read with what lies between its rows, or
    without it where the reader goes from run to run."""
    if is_plain(tensor):
        return sum(copy.read_bytes for copy in copies(tensor))
    return sum(map(read_bytes, made_from(tensor)))


def _sha256(file: SideFile) -> str:
    digest = hashlib.sha256()
    for chunk in file.chunks():
        digest.update(chunk)
    return digest.hexdigest()


def describe(tensor: LazyTensor, paths: Mapping[str, str]) -> list[object]:
    """A tensor as nested lists, files under the names that ``paths`` gives them."""
    match tensor:
        case Stored(path, offset, dtype, shape):
            return ["stored", paths.get(path, path), offset, dtype, list(shape)]
        case Narrow(source, dim, start, length):
            return ["narrow", describe(source, paths), dim, start, length]
        case Concat(parts, dim):
            return ["concat", [describe(part, paths) for part in parts], dim]
        case Dequantized(weight, scale, dtype):
            return ["dequantized", describe(weight, paths), describe(scale, paths), dtype]
        case GroupDequantized(qweight, qzeros, scales, g_idx, bits, zero_offset, dtype, first_group):
            stored = [describe(part, paths) for part in (qweight, qzeros, scales, g_idx)]
            return ["group dequantized", stored, bits, zero_offset, dtype, *([first_group] if first_group else [])]
        case Cast(source, dtype):
            return ["cast", describe(source, paths), dtype]
        case BlockQuantized(source, scales, power_of_two):
            return ["block quantized", describe(source, paths), scales, power_of_two]
        case Promised(recipe, dtype, shape):
            return ["promised", recipe, dtype, list(shape)]


def make_plan(files: FileSet, target: str | Path) -> Plan:
    """Plan to write a file set into ``target``. Reads nothing but side files.

    Raises:
        PlanError: nothing to write, or a file name that leaves the target or is taken.
        TargetError: the target is the source, or one lies inside the other.
    """
    target = Path(target)
    _require_apart(target, as_path(files.root))
    if not files.files:
        raise PlanError("there is nothing to write")
    _require_names(list(files.files), [*files.side_files, *([INDEX_NAME] if files.index else [])])
    planned = tuple(_planned_file(name, tensors) for name, tensors in files.files.items())
    sides = dict(files.side_files)
    if files.index:
        weight_map = {name: file.name for file in planned for name in file.tensors}
        total = sum(file.size_bytes - len(file.header) for file in planned)
        sides[INDEX_NAME] = SideFile(content=index_bytes(weight_map, total))
    return Plan(target, planned, sides, files.stamps, files.root)


def _require_names(weights: Sequence[str], sides: Sequence[str]) -> None:
    """Each file needs a name of its own, within the target, and none that the writer needs itself."""
    taken = {LOCK_NAME, *sides}
    bad = [name for name in weights if not is_file_name(name) or name in taken]
    bad += [name for name in sides if not is_relative_path(name) or name == LOCK_NAME]
    bad += [name for name in [*weights, *sides] if name.endswith(PARTIAL) or name.split("/")[0] == STATE_DIR]
    if bad:
        raise PlanError("file names that cannot be written", found=", ".join(map(repr, bad[:4])))


def _planned_file(name: str, tensors: Mapping[str, LazyTensor]) -> PlannedFile:
    header = build_header(((key, tensor.dtype, tensor.shape) for key, tensor in tensors.items()), METADATA)
    return PlannedFile(name, tensors, header, len(header) + sum(map(size_bytes, tensors.values())))


def _require_apart(target: Path, root: Path) -> None:
    if is_remote(root):
        return
    source = (root if root.is_dir() else root.parent).resolve()
    resolved = target.resolve()
    if resolved == source or source in resolved.parents or resolved in source.parents:
        raise TargetError(
            "target and source must be two folders, neither inside the other",
            where=target,
            found=f"source {source}",
            fix="Name another target.",
        )
