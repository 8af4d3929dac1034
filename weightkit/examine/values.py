"""NaN, Inf and impossible scales, found in a stream of bytes by bit patterns.

A float is finite exactly if its bits without the sign, as an integer, are below those of infinity (below those of NaN
in E4M3, which has no infinity). So the largest such integer of a piece says whether anything is wrong: an ``and`` and a
``max``, which run at memory speed. Only a piece with something wrong is looked at closer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from weightkit.checkpoint import Entry, Header
from weightkit.checkpoint.reading import Bytes
from weightkit.errors import ValuesError, WeightkitError
from weightkit.examine.stream import Pieces

#: Elements looked at together: small enough to stay in a core's cache.
BLOCK_BYTES = 256 << 10


class Format(NamedTuple):
    """``bits & magnitude`` from ``limit`` on is not finite; ``limit`` itself is Inf where the format has one."""

    bits: type[np.unsignedinteger[Any]]
    magnitude: int
    limit: int
    infinity: bool = True


FORMATS = {
    "F8_E4M3": Format(np.uint8, 0x7F, 0x7F, infinity=False),
    "F8_E5M2": Format(np.uint8, 0x7F, 0x7C),
    "F8_E8M0": Format(np.uint8, 0xFF, 0xFF, infinity=False),
    "F16": Format(np.uint16, 0x7FFF, 0x7C00),
    "BF16": Format(np.uint16, 0x7FFF, 0x7F80),
    "F32": Format(np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
    "F64": Format(np.uint64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
}
#: Scales of blocks, by the last component of their published and their demo name, and of GPTQ's groups.
SCALE_LEAVES = frozenset(("weight_scale_inv", "scale", "scales"))


@dataclass
class _Tally:
    """What is wrong with one tensor so far; ``first`` is the flat index of its first bad element."""

    nan: int = 0
    inf: int = 0
    not_positive: int = 0
    first: int = 0

    @property
    def total(self) -> int:
        return self.nan + self.inf + self.not_positive


class ValueScan:
    """Looks at every float of a file. ``file`` is its name for messages."""

    def __init__(self, file: str, header: Header) -> None:
        self._file = file
        self._pieces = Pieces(header)
        self._tallies: dict[Entry, _Tally] = {}

    def feed(self, offset: int, chunk: Bytes) -> None:
        scratch = np.empty(BLOCK_BYTES, np.uint8)
        for entry, begin, piece in self._pieces.of(offset, chunk):
            form = FORMATS.get(entry.dtype)
            if form is not None:
                self._scan(entry, form, begin, piece, scratch)

    def _scan(self, entry: Entry, form: Format, begin: int, piece: Bytes, room: Bytes) -> None:
        scale = is_scale(entry.name) and form.magnitude >= 0x7FFF  # floats of 16 bits and more: sign and zero matter
        for start in range(0, len(piece), BLOCK_BYTES):
            bits = piece[start : start + BLOCK_BYTES].view(form.bits)
            scratch = room[: bits.nbytes].view(form.bits)
            if scale:  # in unsigned arithmetic, 0 and negative numbers come out above every positive one
                np.subtract(bits, form.bits(1), out=scratch)
                wrong = scratch.max() >= form.limit - 1
            else:
                np.bitwise_and(bits, form.bits(form.magnitude), out=scratch)
                wrong = scratch.max() >= form.limit
            if wrong:
                self._tally(entry, form, (begin + start) // bits.itemsize, bits, scale)

    def _tally(self, entry: Entry, form: Format, index: int, bits: npt.NDArray[Any], scale: bool) -> None:
        tally = self._tallies.get(entry)
        magnitude = bits & form.bits(form.magnitude)
        broken = magnitude >= form.limit
        inf = int(np.count_nonzero(magnitude == form.limit)) if form.infinity else 0
        nan = int(np.count_nonzero(broken)) - inf
        below = ((bits == 0) | (bits > form.magnitude)) & ~broken if scale else np.zeros_like(broken)
        if tally is None:
            tally = self._tallies[entry] = _Tally(first=index + int(np.argmax(broken | below)))
        tally.nan += nan
        tally.inf += inf
        tally.not_positive += int(np.count_nonzero(below))

    def finish(self) -> Iterator[WeightkitError]:
        for entry, tally in self._tallies.items():
            counts = [(tally.nan, "NaN"), (tally.inf, "Inf"), (tally.not_positive, "zero or negative")]
            found = ", ".join(f"{count:,} {word}" for count, word in counts if count)
            coordinate = [int(index) for index in np.unravel_index(tally.first, entry.shape)]
            scale = is_scale(entry.name)
            yield ValuesError(
                "scales that are not positive and finite" if scale else "values that are not finite",
                where=f"{self._file}: {entry.name}",
                found=f"{found} of {entry.dtype} {list(entry.shape)}, the first at {coordinate}",
                fix="Fetch the file again; if its checksum is right, the weights were published or written so.",
            )


def is_scale(name: str) -> bool:
    """Whether a tensor holds scales, by its published or demo name."""
    return name.rpartition(".")[2] in SCALE_LEAVES
