"""Plots as inline SVG, by hand: lines, stacked bars, ranges and heatmaps over the layers of a model.

Colours are CSS classes that the page defines for light and dark. A plot is ``Markup``: every text in it went through
``Markup.format``, which escapes. A heatmap is one path a colour with runs of equal cells joined, so that 58 x 257 cells
take about 100 kB, and it needs no script.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

#: Of a plot, in CSS pixels; the wide ones fill a page.
WIDTH, WIDE, HEIGHT = 540, 1116, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 38
#: Labels below a plot and beside a heatmap, at most.
X_LABELS, Y_LABELS = 12, 16
#: Layers that leave room for larger dots.
_FEW = 16
#: Room in a logarithmic scale for zeros, below its least value.
_ZERO_SHARE = 0.09


@dataclass(frozen=True)
class Series:
    """A line or a part of stacked bars: its label, its CSS class, and a value an x or None."""

    label: str
    css: str
    values: Sequence[float | None]
    dashed: bool = False


@dataclass(frozen=True)
class Range:
    """Least, 10th percentile, median, 90th percentile, most."""

    least: float
    low: float
    median: float
    high: float
    most: float


@dataclass(frozen=True)
class Scale:
    """Where values stand between bottom (0) and top (1), and the ticks."""

    ticks: tuple[float, ...]
    place: Callable[[float], float]


def nice_step(span: float, count: int) -> float:
    """The least of 1, 2, 2.5, 5 times a power of ten that covers ``span`` in ``count`` steps."""
    if span <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(span / count))
    return next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor * count >= span * (1 - 1e-9))


def linear(values: Iterable[float | None]) -> Scale:
    """From zero to a nice number not below any of the values."""
    top = max((value for value in values if value is not None), default=0.0) or 1.0
    step = nice_step(top, 5)
    count = math.ceil(top / step - 1e-9)
    return Scale(tuple(step * at for at in range(count + 1)), lambda value: value / (step * count))


def logarithmic(values: Iterable[float]) -> Scale:
    """Between powers of ten, or their halves and fifths where few; zeros, if any, on a line of their own below."""
    values = list(values)
    known = [value for value in values if value > 0] or [1.0]
    base = _ZERO_SHARE if len(known) < len(values) else 0.0
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    grid = [factor * 10.0**power for power in range(low, high + 1) for factor in (1, 2, 5)]
    first = max((at for at, tick in enumerate(grid) if tick <= min(known)), default=0)
    last = min((at for at, tick in enumerate(grid) if tick >= max(known)), default=len(grid) - 1)
    ticks = grid[first : max(last, first + 1) + 1]
    bottom, span = math.log10(ticks[0]), math.log10(ticks[-1] / ticks[0])
    shown = ticks if len(ticks) <= 7 else [tick for tick in ticks if math.log10(tick).is_integer()]

    def place(value: float) -> float:
        return 0.0 if value <= 0 else base + (1 - base) * (math.log10(value) - bottom) / span

    return Scale((*((0.0,) if base else ()), *shown), place)


def compact(value: float) -> str:
    """``0.05``, ``500``, ``20k``, ``1.5M``."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def lines(
    title: str, xs: Sequence[int], series: Sequence[Series], text: Callable[[float], str], *, width: int = WIDTH
) -> Markup:
    """A line for each series over the layers ``xs``; None leaves a gap. ``text`` prints a value in a tooltip."""
    frame = _Frame(xs, linear(value for one in series for value in one.values), width)
    return _plot(title, frame, [_line(frame, one, text) for one in series])


def bars(title: str, xs: Sequence[int], series: Sequence[Series], text: Callable[[float], str]) -> Markup:
    """A bar for each layer, the series stacked from the bottom in their order."""
    frame = _Frame(xs, linear(sum(one.values[at] or 0.0 for one in series) for at in range(len(xs))), WIDTH)
    return _plot(title, frame, [_bar(frame, at, series, text) for at in range(len(xs))])


def ranges(
    title: str, xs: Sequence[int], values: Sequence[Range], text: Callable[[float], str], *, marks: Sequence[float] = ()
) -> Markup:
    """For each layer a thin bar from least to most, a thick one between the percentiles and a mark at the median;
    across them a line at each of the ``marks``."""
    bounds = [bound for one in values for bound in (one.least, one.low, one.median, one.high, one.most)]
    frame = _Frame(xs, logarithmic([*bounds, *marks]), WIDE)
    drawn = [
        Markup('<path class="mark alert" d="M{} {}H{}"/>').format(LEFT, _n(frame.y(mark)), WIDE - RIGHT)
        for mark in marks
    ]
    return _plot(title, frame, [*(_range(frame, at, one, text) for at, one in enumerate(values)), *drawn])


def heatmap(
    title: str, rows: Sequence[int], cells: Sequence[Sequence[str | None]], *, experts: int, shared: bool
) -> Markup:
    """Cells by layer (down) and column (across), each the CSS class of its colour or None for no cell.

    Args:
        title: for those who cannot see it.
        rows: layers.
        cells: a row for each.
        experts: columns that are routed experts, the first ones.
        shared: whether columns after those are the shared experts; they get a label.

    The element carries the box of its cells (``data-box``: left, top, width and height of a cell) for a script that
    looks for the cell under the pointer.
    """
    columns = max(map(len, cells), default=0)
    width = min(24.0, (WIDE - LEFT - RIGHT) / max(columns, 1))
    height = min(18.0, max(6.0, 420 / max(len(rows), 1)))
    right, bottom = LEFT + width * columns, TOP + height * len(rows)
    names = sorted({cell for row in cells for cell in row if cell is not None})
    paths = Markup("").join(Markup('<path class="{}" d="{}"/>').format(name, _runs(cells, name)) for name in names)
    body = Markup('<g class="cells" transform="translate({} {}) scale({:.4f} {:.4f})">{}</g>').format(
        LEFT, TOP, width, height, paths
    )
    numbers = range(experts)
    texts = [_text(LEFT + (at + 0.5) * width, bottom + 14, str(at), "middle") for at in labelled(numbers, X_LABELS)]
    texts += [_text(LEFT - 6, TOP + (at + 0.5) * height + 4, str(rows[at]), "end") for at in labelled(rows, Y_LABELS)]
    texts.append(_text(LEFT + experts * width / 2, bottom + 31, "routed expert", "middle"))
    if shared:
        texts.append(_text(max(right, LEFT + experts * width / 2 + 90), bottom + 31, "shared", "end"))
    texts.append(_upright(TOP + height * len(rows) / 2))
    whole = max(right, LEFT + 200) + RIGHT
    kind = "wide" if whole > WIDTH else "small"
    box = Markup(' class="{}" data-box="{} {} {:.4f} {:.4f}"').format(kind, LEFT, TOP, width, height)
    return _svg(title, whole, bottom + BOTTOM, [body, *texts], box)


def labelled(numbers: Sequence[int], most: int) -> list[int]:
    """Positions of the numbers that get a label: multiples of 1, 2, 5, 10, ... so that there are not more than
    ``most``."""
    for power in range(9):
        for step in (10**power, 2 * 10**power, 5 * 10**power):
            found = [at for at, number in enumerate(numbers) if number % step == 0]
            if len(found) <= most and len(numbers) <= most * step:
                return found or [0]
    return []


@dataclass(frozen=True)
class _Frame:
    """Where layers and values stand in a plot."""

    xs: Sequence[int]
    scale: Scale
    width: int

    def x(self, at: int) -> float:
        """Middle of a layer's room."""
        return LEFT + (at + 0.5) * (self.width - LEFT - RIGHT) / len(self.xs)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - self.scale.place(value) * (HEIGHT - BOTTOM - TOP)

    @property
    def half_bar(self) -> float:
        return min(14.0, 0.4 * (self.width - LEFT - RIGHT) / len(self.xs))


def _runs(cells: Sequence[Sequence[str | None]], name: str) -> str:
    """A path over all cells of one class: a horizontal line of width 1 for every run of them."""
    moves: list[str] = []
    for y, row in enumerate(cells):
        x = 0
        for value, run in groupby(row):
            length = len(list(run))
            if value == name:
                moves.append(f"M{x} {y}.5h{length}")
            x += length
    return "".join(moves)


def _line(frame: _Frame, one: Series, text: Callable[[float], str]) -> Markup:
    path, dots, joined = "", [], False
    radius = _n((1.7 if one.dashed else 2.2) + (1.5 if len(frame.xs) <= _FEW else 0))
    for at, value in enumerate(one.values):
        if value is not None:
            x, y = _n(frame.x(at)), _n(frame.y(value))
            path += f"{'L' if joined else 'M'}{x} {y}"
            said = f"layer {frame.xs[at]}: {one.label} {text(value)}"
            dots.append(Markup('<circle cx="{}" cy="{}" r="{}"><title>{}</title></circle>').format(x, y, radius, said))
        joined = value is not None
    css = f"line {one.css}{' dashed' if one.dashed else ''}"
    return Markup('<g class="{}"><path d="{}"/>{}</g>').format(css, path, Markup("").join(dots))


def _bar(frame: _Frame, at: int, series: Sequence[Series], text: Callable[[float], str]) -> Markup:
    base, parts, said = 0.0, [], []
    for one in series:
        value = one.values[at]
        if value:
            parts.append(_rect(one.css, frame, at, 1, base, base + value))
            said.append(f"{one.label} {text(value)}")
            base += value
    title = "\n".join([f"layer {frame.xs[at]}: {text(base)}", *reversed(said)])
    return Markup('<g class="bar"><title>{}</title>{}</g>').format(title, Markup("").join(parts))


def _range(frame: _Frame, at: int, one: Range, text: Callable[[float], str]) -> Markup:
    parts = [
        _rect("c0 faint", frame, at, 0.35, one.least, one.most),
        _rect("c0 half", frame, at, 1, one.low, one.high),
        _rect("c0", frame, at, 1, one.median, one.median, least=2.4),
    ]
    said = f"layer {frame.xs[at]}: median {text(one.median)}, 10 % to 90 %: {text(one.low)} to {text(one.high)}"
    said += f", least {text(one.least)}, most {text(one.most)}"
    return Markup("<g><title>{}</title>{}</g>").format(said, Markup("").join(parts))


def _rect(css: str, frame: _Frame, at: int, share: float, low: float, high: float, *, least: float = 0.5) -> Markup:
    """From one value to another, over a share of a bar's width, and never less than ``least`` high."""
    half, top, bottom = share * frame.half_bar, frame.y(high), frame.y(low)
    short = max(0.0, least - (bottom - top))
    return Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}"/>').format(
        css, _n(frame.x(at) - half), _n(top - short / 2), _n(2 * half), _n(bottom - top + short)
    )


def _plot(title: str, frame: _Frame, parts: Sequence[Markup]) -> Markup:
    """Grid and labels, then the marks."""
    grid = []
    for tick in frame.scale.ticks:
        y = frame.y(tick)
        grid.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(LEFT, _n(y), frame.width - RIGHT))
        grid.append(_text(LEFT - 6, y + 4, compact(tick), "end"))
    most = X_LABELS * frame.width // WIDTH
    grid += [_text(frame.x(at), HEIGHT - BOTTOM + 16, str(frame.xs[at]), "middle") for at in labelled(frame.xs, most)]
    grid.append(_text((LEFT + frame.width - RIGHT) / 2, HEIGHT - 5, "layer", "middle"))
    kind = Markup(' class="wide"') if frame.width > WIDTH else Markup("")
    return _svg(title, frame.width, HEIGHT, [*grid, *parts], kind)


def _svg(title: str, width: float, height: float, parts: Sequence[Markup], attributes: Markup) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" width="{}" role="img" aria-label="{}"{}>{}</svg>').format(
        _n(width), _n(height), _n(width), title, attributes, Markup("").join(parts)
    )


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(_n(x), _n(y), anchor, text)


def _upright(y: float) -> Markup:
    return Markup('<text transform="translate(14 {}) rotate(-90)" text-anchor="middle">layer</text>').format(_n(y))


def _n(value: float) -> str:
    """A coordinate to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")
