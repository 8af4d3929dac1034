"""Which values of a heatmap share a colour, and what the legend says of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from weightkit.quantization.report_plots import compact, nice_step

#: Colours of the ramp, ``q0`` to ``q7``.
RAMP = 8
#: Share of the values at either end that do not stretch the ramp.
_TAIL = 0.01
_WORDS = {
    "rounded": ("alert", "rounded instead of solved"),
    "unknown": ("blank", "no error known"),
    "few": ("alert", "fewer tokens than columns"),
    "none": ("bad", "no tokens"),
}

Rows = Sequence[Sequence[float | str | None]]


@dataclass(frozen=True)
class Level:
    """Values from ``low`` up to but not including ``high``, or one ``word``."""

    css: str
    label: str
    low: float = 0.0
    high: float = 0.0
    word: str | None = None

    def holds(self, value: float | str | None) -> bool:
        """Whether a value is one of these."""
        if isinstance(value, str) or value is None:
            return value is not None and value == self.word
        return self.word is None and self.low <= value < self.high


def ratio_levels(rows: Rows, *, solved: bool) -> list[Level]:
    """Even steps between the bulk of the values; a level of its own above 1 for what rounding would do better."""
    top = 1.0 if solved else math.inf
    low, high = _bulk([value for value in _numbers(rows) if value <= top])
    step = nice_step(high - low, RAMP - 2) if high > low else 0.0
    first = math.floor(low / step + 1e-9) if step else 0
    count = max(1, min(RAMP, math.ceil((high - low) / step) + 1)) if step else 1
    edges = [step * (first + at) for at in range(1, count)]
    levels = _between(edges, math.nextafter(top, 2) if solved else math.inf, low)
    worse = [Level("bad", "worse than rounding", math.nextafter(1.0, 2), math.inf)] if solved else []
    return [*levels, *worse, *_words("rounded", "unknown")]


def log_levels(rows: Rows) -> list[Level]:
    """Even factors between the bulk of the values, edges rounded to two digits."""
    low, high = _bulk([value for value in _numbers(rows) if value > 0])
    count = RAMP if high > low else 1
    factor = (high / low) ** (1 / (count - 2)) if count > 1 else 1.0
    edges = sorted({float(f"{low * factor**at:.2g}") for at in range(count - 1)})
    return [*_between(edges, math.inf, low), *_words("few", "none")]


def _numbers(rows: Rows) -> list[float]:
    return sorted(value for row in rows for value in row if isinstance(value, float))


def _bulk(values: list[float]) -> tuple[float, float]:
    if not values:
        return 0.0, 0.0
    cut = int(len(values) * _TAIL)
    return values[cut], values[-1 - cut]


def _between(edges: list[float], top: float, alone: float) -> list[Level]:
    """Levels below, between and above the edges, spread over the whole ramp; without edges one, of values around
    ``alone``."""
    bounds = [0.0, *edges, top]
    return [
        Level(f"q{_colour(at, len(bounds) - 1)}", _label(edges, at, alone), low, high)
        for at, (low, high) in enumerate(pairwise(bounds))
    ]


def _colour(at: int, count: int) -> int:
    return round(at * (RAMP - 1) / (count - 1)) if count > 1 else RAMP // 2


def _label(edges: list[float], at: int, alone: float) -> str:
    if not edges:
        return f"about {compact(alone)}"
    if at == 0:
        return f"under {compact(edges[0])}"
    if at == len(edges):
        return f"{compact(edges[-1])} and more"
    return f"{compact(edges[at - 1])} to {compact(edges[at])}"


def _words(*words: str) -> list[Level]:
    return [Level(*_WORDS[word], word=word) for word in words]
