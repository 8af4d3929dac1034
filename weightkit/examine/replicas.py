"""What is whole on every rank must have the same bytes on each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from weightkit.checkpoint import Header
from weightkit.checkpoint.reading import Bytes
from weightkit.errors import CheckpointError, WeightkitError
from weightkit.examine.stream import Pieces


class Digests:
    """A digest of each of a file's replicated tensors, computed as the file is read."""

    def __init__(self, header: Header, names: frozenset[str]) -> None:
        self._pieces = Pieces(header)
        self._names = names
        self._digests: dict[str, hashlib._Hash] = {}
        self._values: Mapping[str, bytes] | None = None

    @property
    def complete(self) -> bool:
        """Whether the file was read to its end."""
        return self._values is not None

    def feed(self, offset: int, chunk: Bytes) -> None:
        for entry, _, piece in self._pieces.of(offset, chunk):
            if entry.name in self._names:
                self._digests.setdefault(entry.name, hashlib.sha256()).update(piece.data)

    def finish(self) -> Sequence[WeightkitError]:
        begun, empty = self._digests, hashlib.sha256()
        self._values = {name: begun.get(name, empty).digest() for name in self._names}
        return ()

    def values(self) -> Mapping[str, bytes]:
        return self._values or {}

    def adopt(self, values: Mapping[str, bytes]) -> None:
        """Take over what another process found in the file."""
        self._values = values


class Replicas(NamedTuple):
    """Replicated tensors, by their names in the files, and the digests of each rank's file."""

    names: frozenset[str]
    by_file: dict[str, Digests]

    def problems(self) -> Iterator[WeightkitError]:
        """Tensors that differ from the first rank's. A file that could not be read to its end is left out."""
        digests = {file: digest.values() for file, digest in self.by_file.items() if digest.complete}
        if not digests:
            return
        first = next(iter(digests))
        for name in sorted(self.names):
            others = [file for file, values in digests.items() if values[name] != digests[first][name]]
            if others:
                yield CheckpointError(
                    "the ranks hold different bytes of a tensor that is whole on each",
                    where=name,
                    expected=f"those of {first}",
                    found=f"others in {', '.join(others[:4])}" + (f" and {len(others) - 4} more" * (len(others) > 4)),
                    fix="Shard the checkpoint again; its files are of different writes, or damaged.",
                )


def spans_of(header: Header, names: frozenset[str]) -> list[tuple[int, int]]:
    """Byte ranges of the named tensors in the file, neighbours joined."""
    spans: list[tuple[int, int]] = []
    for entry in header.entries:
        if entry.name in names and entry.end > entry.begin:
            begin, end = header.data_offset + entry.begin, header.data_offset + entry.end
            if spans and spans[-1][1] == begin:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((begin, end))
    return spans
