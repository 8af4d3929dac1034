"""Calibration data that is tokenized already: arrays in ``.npy`` and ``.safetensors`` files, mapped rather than read.

An array [rows, length] holds a sequence a row, of which the first ``seq_len`` ids count. A flat one is a stream, cut
into sequences from its start; what is left at its end is not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from weightkit.checkpoint.header import Entry, read_header
from weightkit.errors import CalibrationError

Tokens = NDArray[np.int32]

_DTYPES = {
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "<i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "<u1",
}
_NAMES = ("tokens", "input_ids")


@dataclass(frozen=True, slots=True)
class _Sequence:
    """A sequence's place: ``start`` is into the row, or into the flat array where ``row`` is None."""

    path: Path
    array: NDArray[Any]
    row: int | None
    start: int

    def ids(self, length: int) -> NDArray[np.int64]:
        line = self.array if self.row is None else self.array[self.row]
        return np.asarray(line[self.start : self.start + length]).astype(np.int64)

    def where(self, offset: int) -> str:
        place = f"position {self.start + offset:,}"
        return f"{self.path}: {place}" if self.row is None else f"{self.path}: row {self.row:,}, {place}"


@dataclass(frozen=True, slots=True)
class Source:
    """An array of token ids in a file, of which ``sequences`` are ``seq_len`` long."""

    path: Path
    array: NDArray[Any]
    seq_len: int

    @property
    def sequences(self) -> int:
        """How many there are."""
        rows: int = self.array.shape[0]
        return rows if self.array.ndim == 2 else rows // self.seq_len

    @property
    def tokens(self) -> int:
        """Ids that can be used: whole rows up to ``seq_len``, or all of a stream."""
        return self.sequences * self.seq_len if self.array.ndim == 2 else self.array.size

    def places(self) -> Iterator[_Sequence]:
        """The sequences in order."""
        for index in range(self.sequences):
            row, start = (index, 0) if self.array.ndim == 2 else (None, index * self.seq_len)
            yield _Sequence(self.path, self.array, row, start)


def open_sources(files: Sequence[Path], seq_len: int) -> list[Source]:
    """The files' arrays.

    Raises:
        CalibrationError: a file without one, or an array of another type or shape, or of shorter rows.
        HeaderError: a damaged ``.safetensors`` file.
    """
    return [_checked(Source(path, _array(path), seq_len)) for path in files]


def draw_sequences(sources: Sequence[Source], samples: int, *, seed: int, vocab_size: int) -> Tokens:
    """``samples`` sequences that the seed chooses, in the order of the files: I32 [samples, seq_len].

    Raises:
        CalibrationError: an id that the vocabulary does not have.
    """
    draws = Random(seed)
    places = chain.from_iterable(source.places() for source in sources)
    drawn = nsmallest(samples, ((draws.random(), index, place) for index, place in enumerate(places)))
    chosen = [place for _, _, place in sorted(drawn, key=lambda item: item[1])]
    tokens = np.empty((samples, sources[0].seq_len), np.int32)
    for row, place in enumerate(chosen):
        ids = place.ids(tokens.shape[1])
        unknown = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if unknown.size:
            raise unknown_id(int(ids[unknown[0]]), vocab_size, place.where(int(unknown[0])))
        tokens[row] = ids
    return tokens


def unknown_id(found: int, vocab_size: int, where: str) -> CalibrationError:
    """The error for an id that the vocabulary does not have."""
    return CalibrationError(
        "a token id that the model does not have",
        where=where,
        expected=f"0 to {vocab_size - 1:,}",
        found=f"{found:,}",
        fix="Tokenize the text with this model's tokenizer.",
    )


def _array(path: Path) -> NDArray[Any]:
    if path.suffix.lower() == ".safetensors":
        return _safetensors(path)
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as exc:
        raise CalibrationError(f"not an array of numbers ({exc})", where=path, fix="Write it with numpy.save.") from exc


def _safetensors(path: Path) -> NDArray[Any]:
    header = read_header(path)
    entry = _entry(header.entries, path)
    offset = header.data_offset + entry.begin
    if entry.end == entry.begin:
        return np.empty(entry.shape, _DTYPES[entry.dtype])
    return np.memmap(path, _DTYPES[entry.dtype], "r", offset, entry.shape)


def _entry(entries: Sequence[Entry], path: Path) -> Entry:
    named = [entry for entry in entries if entry.name in _NAMES] or list(entries)
    if len(named) == 1 and named[0].dtype in _DTYPES:
        return named[0]
    raise CalibrationError(
        "no telling which tensor holds the token ids",
        where=path,
        expected=f"one tensor of integers, or one that is called {' or '.join(_NAMES)}",
        found=", ".join(f"{entry.name} ({entry.dtype})" for entry in entries[:8]) or "none",
    )


def _checked(source: Source) -> Source:
    array, path = source.array, source.path
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise CalibrationError(
            "not token ids",
            where=path,
            expected="integers [rows, length] or [length]",
            found=f"{array.dtype} {list(array.shape)}",
        )
    if array.ndim == 2 and array.shape[1] < source.seq_len:
        raise CalibrationError(
            "rows shorter than a sequence",
            where=path,
            expected=f"at least {source.seq_len:,} ids a row",
            found=f"{array.shape[1]:,}",
            fix=f"Use --seq-len {array.shape[1]}, or give a flat array, which is cut anywhere.",
        )
    return source
