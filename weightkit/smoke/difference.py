"""Two tensors of one weight: by how much they differ, where, and whether their formats explain it.

Looked at as a whole, and in slices of 128 values along both sides (a row's 128 inputs, an input's 128 rows). A slice is
*off* where the two point in different directions (cosine below ``UNLIKE``), or in the same (above ``ALIKE``) but with
lengths more than ``LENGTH_FACTOR`` apart, or where one of them is next to nothing. Rounding does none of these. GPTQ to
int4, whose errors are the largest of all conversions here, makes some slices half as long again as they were on pico,
but then by noise, which turns them too: to cosines of 0.6 and 0.7. A block whose scale is twice too large, a row of
zeros, another expert's values or another rank's rows do.

Of integer codes only rows are sliced: to keep outputs, GPTQ moves errors into the inputs that calibration hardly saw,
and their columns may come to anything. What such a column does to outputs is judged by these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from weightkit.smoke.rounding import Format, explained

FACTOR = 4.0
"""How much more than the estimate a sound conversion may lose: GPTQ, which moves weights to keep outputs, loses up to
twice as much of them as rounding to nearest."""

FLOOR = 2.0**-8
"""Relative difference that every format explains: rounding to BF16, by which each dequantized weight goes."""

SLICE = 128
UNLIKE, ALIKE = 0.5, 0.9
LENGTH_FACTOR = math.sqrt(2)
NOTHING = 0.1

CARRIED = 0.25
"""A slice of which the format loses a larger share is not judged: its values are small beside those that set the
scale."""

NEGLIGIBLE = 1e-3
"""Nor is one whose length is below this share of the mean."""

FEWEST_TURNED = 8
"""Slices of integer codes that must point in other directions: GPTQ's noise turned one of 8192 on pico, with one scale
for 1024 inputs and little calibration."""

MOST = 0.8
"""Share of the rows between the first and the last that is told as all of them."""

_ALL = "all of it"
_STRIP_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Region:
    """The slices of a tensor that are off: rows and columns (for a vector: places, and none)."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        parts = []
        for what, numbers, size in zip(("row", "column"), (self.rows, self.columns), self.shape, strict=False):
            if len(numbers) < size:
                parts.append(f"{what}{'s' * (len(numbers) > 1)} {ranges(_closed(numbers))}")
        return ", ".join(parts) if parts else _ALL


@dataclass(frozen=True)
class TensorDifference:
    """How two tensors of one weight differ.

    Attributes:
        name: published.
        formats: in which they are stored.
        relative: length of the difference over that of the reference.
        explained: the same, of what the formats explain.
        finite: whether both are finite; if not, the rest means nothing.
        region: the slices that are off; None if none is.
        scale: where slices are off by their length alone, or the whole tensor is: that of the other over the
            reference's, 0 for zeros; None else.
        output: relative difference of the outputs for the reference's inputs; None where there were none.
        output_explained: the same, of what the formats explain.
        hint: what it looks like.
    """

    name: str
    formats: tuple[Format, Format]
    relative: float
    explained: float
    finite: bool = True
    region: Region | None = None
    scale: float | None = None
    output: float | None = None
    output_explained: float | None = None
    hint: str = ""

    @property
    def is_suspect(self) -> bool:
        """Whether the formats do not explain it."""
        return (
            not self.finite
            or self.region is not None
            or self.relative > FACTOR * self.explained + FLOOR
            or (
                self.output is not None
                and self.output_explained is not None
                and self.output > FACTOR * self.output_explained + FLOOR
            )
        )

    def describe(self) -> str:
        """One line for people."""
        if not self.finite:
            return f"{self.name}: NaN or Inf"
        what = self.hint or self._by_length()
        place = "" if self.region is None or str(self.region) == _ALL else f" in {self.region}"
        away = f"differs by {self.relative:.3g}, of which {self.formats[0]} and {self.formats[1]} explain "
        away += f"{self.explained:.2g}"
        if self.output is not None:
            away += f"; its outputs by {self.output:.3g}"
        return f"{self.name}{place}: {what + '; ' if what else ''}{away}"

    def _by_length(self) -> str:
        if self.scale is None:
            return ""
        return (
            "zeros"
            if self.scale == 0
            else "zeros in the first"
            if math.isinf(self.scale)
            else f"{self.scale:.3g} times"
        )

    def to_json(self) -> dict[str, object]:
        """Plain values by field."""
        return {
            "name": self.name,
            "formats": [str(form) for form in self.formats],
            "relative": self.relative,
            "explained": self.explained,
            "finite": self.finite,
            "region": None if self.region is None else str(self.region),
            "scale": self.scale,
            "output": self.output,
            "output_explained": self.output_explained,
            "hint": self.hint,
        }


def compare(
    name: str, one: torch.Tensor, other: torch.Tensor, formats: tuple[Format, Format]
) -> tuple[TensorDifference, torch.Tensor]:
    """Compare two tensors of one weight.

    Returns:
        The difference, and ``one`` with what the formats explain added to it, in its dtype: a sound ``other``.
    """
    if torch.equal(one, other):
        return TensorDifference(name, formats, 0.0, 0.0, finite=bool(one.isfinite().all())), one
    sound, sums = torch.empty_like(one), _Sums()
    step = one.shape[0] if one.dim() < 2 else max(1, _STRIP_ELEMENTS // one.shape[1] // SLICE) * SLICE
    for start in range(0, one.shape[0], step):
        rows = slice(start, start + step)
        a, b = one[rows].float(), other[rows].float()
        error = explained(a, b, formats)
        sound[rows] = a + error
        sums.add(a, b, error)
    difference = TensorDifference(name, formats, sums.relative, sums.explained, finite=sums.finite)
    return (sums.locate(difference, tuple(one.shape)) if sums.finite else difference), sound


@dataclass
class _Sums:
    """Sums of products by slice: a*a, b*b, a*b, error*error, of row slices and of column slices."""

    rows: list[torch.Tensor] = field(default_factory=list)
    columns: list[torch.Tensor] = field(default_factory=list)
    away: float = 0.0

    def add(self, a: torch.Tensor, b: torch.Tensor, error: torch.Tensor) -> None:
        """Add rows of a matrix, or a vector, whose slices are single values."""
        products = torch.stack((a * a, b * b, a * b, error * error))
        self.away += float((b - a).double().square().sum())
        if a.dim() < 2:
            self.rows.append(products[:, :, None])
            return
        padded = torch.nn.functional.pad(products, (0, -a.shape[1] % SLICE, 0, -a.shape[0] % SLICE))
        blocks = padded.view(4, padded.shape[1] // SLICE, SLICE, padded.shape[2] // SLICE, SLICE)
        self.rows.append(blocks.sum(dim=4).flatten(1, 2)[:, : a.shape[0]])
        self.columns.append(blocks.sum(dim=2).flatten(2, 3)[:, :, : a.shape[1]])

    @property
    def _totals(self) -> list[float]:
        totals: list[float] = sum(part.double().sum(dim=(1, 2)) for part in self.rows).tolist()  # type: ignore[union-attr]
        return totals

    @property
    def finite(self) -> bool:
        return math.isfinite(self.away) and all(map(math.isfinite, self._totals))

    @property
    def relative(self) -> float:
        return _ratio(self.away, self._totals[0])

    @property
    def explained(self) -> float:
        return _ratio(self._totals[3], self._totals[0])

    def locate(self, difference: TensorDifference, shape: tuple[int, ...]) -> TensorDifference:
        """``difference`` with its region and scale."""
        integers = any(form.is_integer for form in difference.formats)
        off, scale = _off(torch.cat(self.rows, dim=1), FEWEST_TURNED if integers else 1)
        if off.any():
            rows, blocks = (found.unique().tolist() for found in off.nonzero().T)
            return replace(difference, region=Region(tuple(rows), _filled(blocks, shape[-1]), shape), scale=scale)
        if self.columns and not integers:
            off, scale = _off(torch.cat(self.columns, dim=1))
            if off.any():
                blocks, columns = (found.unique().tolist() for found in off.nonzero().T)
                region = Region(_filled(blocks, shape[0]), tuple(columns), shape)
                return replace(difference, region=region, scale=scale)
        aa, bb, ab, _ = self._totals
        alike = aa > 0 and bb > 0 and ab / math.sqrt(aa * bb) > 0.99
        return replace(difference, scale=math.sqrt(bb / aa)) if difference.is_suspect and alike else difference


def _filled(blocks: Sequence[int], size: int) -> tuple[int, ...]:
    """The places in blocks of ``SLICE``, along a side of ``size``."""
    return tuple(i for block in blocks for i in range(block * SLICE, min((block + 1) * SLICE, size)))


def _off(sums: torch.Tensor, fewest_turned: int = 1) -> tuple[torch.Tensor, float | None]:
    """Which slices are off, and if by their length alone, by how much.

    Args:
        sums: [4, ...]: those of ``_Sums``.
        fewest_turned: so many slices must point in other directions before any of these counts.
    """
    aa, bb, ab, ee = sums
    longer = torch.maximum(aa, bb)
    judged = (longer > NEGLIGIBLE**2 * longer.mean()) & (ee <= CARRIED**2 * longer)
    length = (bb / aa).sqrt()
    cosine = ab / (aa * bb).sqrt()
    empty = (length < NOTHING) | (length > 1 / NOTHING)
    turned = judged & (cosine < UNLIKE) & ~empty
    if int(turned.sum()) < fewest_turned:
        turned = torch.zeros_like(turned)
    stretched = (cosine > ALIKE) & ((length < 1 / LENGTH_FACTOR) | (length > LENGTH_FACTOR))
    off = turned | (judged & (empty | stretched))
    if not off.any() or bool(turned.any()):
        return off, None
    return off, float(length[off].median())


def _ratio(difference: float, reference: float) -> float:
    if reference > 0:
        return math.sqrt(difference / reference)
    return 0.0 if difference == 0 else math.inf


def _closed(numbers: Sequence[int]) -> Sequence[int]:
    """All from the first to the last, if most of them are there: some slices are off by less than it takes."""
    span = range(numbers[0], numbers[-1] + 1)
    return span if len(numbers) > MOST * len(span) else numbers


def ranges(numbers: Sequence[int], most: int = 4) -> str:
    """Ascending numbers as ``0:128, 300``, ends exclusive as in Python."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, number + 1])
    shown = [str(start) if end == start + 1 else f"{start}:{end}" for start, end in runs[:most]]
    return ", ".join(shown) + (f" and {len(runs) - most} more" if len(runs) > most else "")
