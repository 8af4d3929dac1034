"""What GPTQ's integers must be: group numbers that there are, in order where the config says so; equal zero points."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from weightkit.checkpoint import Entry, Header
from weightkit.checkpoint.reading import Bytes
from weightkit.errors import ValuesError, WeightkitError
from weightkit.examine.stream import Pieces
from weightkit.family import Expected, Quantization

Words = npt.NDArray[np.uint32]
_FIX = (
    "Fetch the file again; if its checksum is right, it was written so, and engines read other weights than were meant."
)


@dataclass(frozen=True)
class Wish:
    """What the words of a tensor must be.

    Attributes:
        what: the defect where one is not.
        wanted: the right words at given flat indices.
        bound: where it is set, every word below it is right.
        shown: a word as a message shows it.
    """

    what: str
    wanted: Callable[[npt.NDArray[np.int64]], Any]
    bound: int | None = None
    shown: Callable[[int], str] = str


def wishes(
    header: Header,
    expected: Mapping[str, Expected],
    quantization: Quantization,
    *,
    published: Callable[[str], str | None],
    rank: int,
    ranks: int,
) -> dict[str, Wish]:
    """By the name in the file, for each ``g_idx`` and each ``qzeros`` of a symmetric checkpoint.

    Args:
        published: the published name of a name in the file.
        rank: of ``ranks`` that cut ``g_idx`` along the input features; 0 of 1 where nothing is cut.
    """
    found: dict[str, Wish] = {}
    for entry in header.entries:
        name = published(entry.name)
        item = expected.get(name) if name is not None else None
        if item is None or item.weight_name is None or entry.dtype != "I32":
            continue
        leaf = item.name.rpartition(".")[2]
        if leaf == "g_idx":
            groups = expected[item.name.removesuffix("g_idx") + "scales"].shape[0]
            start = rank * (item.shape[0] // ranks) if item.split_dim is not None else 0
            found[entry.name] = _order(quantization, groups, start)
        elif leaf == "qzeros" and quantization.sym:
            found[entry.name] = _zeros(quantization.symmetric_zeros)
    return found


def _order(quantization: Quantization, groups: int, start: int) -> Wish:
    """Neighbours share a group, from the number of input ``start`` on; with ``desc_act``, any group that there is."""
    if quantization.desc_act:
        return Wish(f"g_idx names a group that there is not; there are {groups}", lambda at: 0 * at, bound=groups)
    if groups == 1:
        return Wish("g_idx is not 0 everywhere, where all input features are one group", lambda at: 0 * at)
    size = quantization.group_size
    what = f"g_idx is not the input feature's number divided by group_size {size}, where desc_act is false"
    return Wish(what, lambda at: (at + start) // size)


def _zeros(word: int) -> Wish:
    return Wish("zero points that are not all the middle, where sym is true", lambda at: word + 0 * at, shown=hex)


@dataclass
class _Tally:
    """How many words of a tensor are wrong; the first of them."""

    wrong: int
    first: int
    wanted: int
    found: int


class IntegerScan:
    """Looks at every ``g_idx`` and ``qzeros`` of a file. ``file`` is its name for messages."""

    def __init__(self, file: str, header: Header, wished: Mapping[str, Wish]) -> None:
        self._file, self._wished = file, wished
        self._pieces = Pieces(header)
        self._tallies: dict[Entry, _Tally] = {}

    def feed(self, offset: int, chunk: Bytes) -> None:
        for entry, begin, piece in self._pieces.of(offset, chunk):
            wish = self._wished.get(entry.name)
            if wish is not None:
                self._scan(entry, wish, begin // 4, piece.view("<u4"))

    def _scan(self, entry: Entry, wish: Wish, start: int, words: Words) -> None:
        wanted = np.asarray(wish.wanted(np.arange(start, start + len(words))))
        wrong = words >= wish.bound if wish.bound is not None else words != wanted
        count = int(np.count_nonzero(wrong))
        if not count:
            return
        if entry in self._tallies:
            self._tallies[entry].wrong += count
            return
        at = int(np.argmax(wrong))
        self._tallies[entry] = _Tally(count, start + at, int(wanted[at]), int(words[at]))

    def finish(self) -> Iterator[WeightkitError]:
        for entry, tally in self._tallies.items():
            wish = self._wished[entry.name]
            coordinate = [int(index) for index in np.unravel_index(tally.first, entry.shape)]
            found = tally.found if wish.shown is hex or tally.found < 1 << 31 else tally.found - (1 << 32)
            yield ValuesError(
                wish.what,
                where=f"{self._file}: {entry.name}",
                expected=f"0 to {wish.bound - 1}" if wish.bound is not None else wish.shown(tally.wanted),
                found=f"{wish.shown(found)} at {coordinate}, the first of {tally.wrong:,} of I32 {list(entry.shape)}",
                fix=_FIX,
            )
