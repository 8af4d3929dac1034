"""The report's plots: which numbers each one shows, and its legend."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from dataclasses import dataclass

from markupsafe import Markup

from weightkit.errors import printable
from weightkit.quantization import report_plots as plots
from weightkit.quantization.report import LayerReport, MatrixReport, QuantizationReport
from weightkit.quantization.report_levels import Level, log_levels, ratio_levels
from weightkit.quantization.report_summary import clipped, error_text
from weightkit.units import human_bytes, human_seconds

#: Stages with a colour of their own; the rest share one.
STAGES_SHOWN = 7


@dataclass(frozen=True)
class Figure:
    """A plot, and its legend: (CSS class, label, count or empty) each."""

    svg: Markup
    legend: tuple[tuple[str, str, str], ...]
    title: str = ""


def error_plot(report: QuantizationReport) -> Figure | None:
    """Median and worst error of each layer, beside rounding's. None where no error is known."""
    layers = [layer for layer in report.layers if errors(layer)]
    if not layers:
        return None
    shown = [("rounding", "c1", [roundings(layer) for layer in layers])]
    if report.settings.method == "gptq":
        shown.insert(0, ("GPTQ", "c0", [errors(layer) for layer in layers]))
    series = []
    for label, css, values in shown:
        series.append(plots.Series(f"{label}, median", css, [median(some) for some in values]))
        series.append(plots.Series(f"{label}, worst", css, [max(some, default=None) for some in values], dashed=True))
    svg = plots.lines(
        "Relative output error by layer", [layer.layer for layer in layers], series, error_text, width=plots.WIDE
    )
    return Figure(svg, tuple((f"{one.css}{' dashed' if one.dashed else ''}", one.label, "") for one in series))


def errors(layer: LayerReport) -> list[float]:
    """The known errors of a layer's matrices."""
    return [m.error for m in layer.matrices if m.error is not None]


def roundings(layer: LayerReport) -> list[float]:
    """The known errors of rounding them."""
    return [m.rounding_error for m in layer.matrices if m.rounding_error is not None]


def median(values: list[float]) -> float | None:
    """None of none."""
    return statistics.median(values) if values else None


def _experts(layer: LayerReport) -> list[list[MatrixReport]]:
    """Matrices by routed expert."""
    found: list[list[MatrixReport]] = [[] for _ in layer.tokens_by_expert]
    for matrix in layer.matrices:
        if matrix.expert is not None and 0 <= matrix.expert < len(found):
            found[matrix.expert].append(matrix)
    return found


def error_map(report: QuantizationReport, moe: list[LayerReport]) -> Figure:
    """Of every expert its worst matrix: error over rounding's, or the error itself where all was to be rounded."""
    solved = report.settings.method == "gptq"
    title = "Error as a share of rounding's" if solved else "Error"
    values = [[_value(matrices, solved=solved) for matrices in _experts(layer)] for layer in moe]
    shared = [_value(_shared(layer), solved=solved) for layer in moe]
    return _map(title, moe, values, ratio_levels([*values, shared], solved=solved), shared)


def _shared(layer: LayerReport) -> list[MatrixReport]:
    return [matrix for matrix in layer.matrices if matrix.is_shared]


def _value(matrices: list[MatrixReport], *, solved: bool) -> float | str | None:
    """The worst matrix's number, or a word for what has none."""
    if not matrices:
        return None
    if solved and any(m.method == "rtn" for m in matrices):
        return "rounded"
    known = [value for m in matrices if (value := m.ratio if solved else m.error) is not None]
    return max(known) if known else "unknown"


def token_map(report: QuantizationReport, moe: list[LayerReport]) -> Figure:
    """Calibration tokens of every routed expert; those that were too few in a colour of their own."""
    starved = {(item.layer, item.expert) for item in report.starved}
    values: list[list[float | str | None]] = [
        [
            "none" if not tokens else "few" if (layer.layer, expert) in starved else float(tokens)
            for expert, tokens in enumerate(layer.tokens_by_expert)
        ]
        for layer in moe
    ]
    return _map("Tokens", moe, values, log_levels(values), [None] * len(moe))


def _map(
    title: str,
    moe: list[LayerReport],
    values: list[list[float | str | None]],
    levels: list[Level],
    shared: list[float | str | None],
) -> Figure:
    """A heatmap of the routed experts' values, and of the shared experts' behind a gap where there are any."""
    experts = max(map(len, values))
    cells = [[_css(levels, value) for value in row] for row in values]
    has_shared = any(value is not None for value in shared)
    if has_shared:
        wide, gap = max(1, experts // 48), max(1, experts // 96)
        cells = [
            [*row, *[None] * (experts - len(row) + gap), *[_css(levels, value)] * wide]
            for row, value in zip(cells, shared, strict=True)
        ]
    label = f"{title}, by layer and expert"
    svg = plots.heatmap(label, [layer.layer for layer in moe], cells, experts=experts, shared=has_shared)
    every = [value for row in [*values, shared] for value in row if value is not None]
    counts = Counter(level.label for value in every for level in levels if level.holds(value))
    legend = tuple((level.css, level.label, f"{counts[level.label]:,}") for level in levels if counts[level.label])
    return Figure(svg, legend, title)


def _css(levels: list[Level], value: float | str | None) -> str | None:
    return next((level.css for level in levels if level.holds(value)), None)


def token_plot(report: QuantizationReport, moe: list[LayerReport]) -> Figure:
    """How evenly a layer's tokens fall on its experts, and the number of columns that they have to exceed."""
    values = [_range(sorted(layer.tokens_by_expert)) for layer in moe]
    columns = sorted({m.shape[1] for m in report.matrices if m.expert is not None})[-1:]
    title = "Tokens of a layer's experts"
    svg = plots.ranges(title, [layer.layer for layer in moe], values, lambda value: f"{value:,.0f}", marks=columns)
    legend = [("c0", "median", ""), ("c0 half", "10 % to 90 %", ""), ("c0 faint", "least to most", "")]
    legend += [("alert dashed", f"columns of the widest matrix: {count:,}", "") for count in columns]
    return Figure(svg, tuple(legend))


def _range(tokens: list[int]) -> plots.Range:
    last = len(tokens) - 1
    low, high = (tokens[round(last * share)] for share in (0.1, 0.9))
    return plots.Range(tokens[0], low, statistics.median(tokens), high, tokens[-1])


def time_plot(report: QuantizationReport) -> Figure | None:
    """The stages that take most, in the order of the work, and what is left as one. None where no time was recorded."""
    total, layers = report.stage_s, report.layers
    if not any(total.values()):
        return None
    shown = sorted(total, key=lambda stage: -total[stage])[:STAGES_SHOWN]
    series = [
        plots.Series(printable(clipped(stage, 40)), f"c{at}", [layer.stage_s.get(stage) for layer in layers])
        for at, stage in enumerate(stage for stage in total if stage in shown)
    ]
    if len(total) > len(shown):
        rest = [sum(s for stage, s in layer.stage_s.items() if stage not in shown) for layer in layers]
        series.append(plots.Series("other", "rest", rest))
    svg = plots.bars("Seconds by layer and stage", [layer.layer for layer in layers], series, human_seconds)
    return Figure(svg, tuple((one.css, one.label, "") for one in series))


def memory_plot(layers: tuple[LayerReport, ...]) -> Figure | None:
    """Peak memory of each layer. None where none was recorded."""
    peaks = (
        ("GPU", "c0", [layer.gpu_peak_bytes / 1e9 for layer in layers]),
        ("host", "c1", [layer.host_peak_bytes / 1e9 for layer in layers]),
    )
    series = [plots.Series(label, css, values) for label, css, values in peaks if any(values)]
    if not series:
        return None
    title = "Peak memory by layer, GB"
    svg = plots.lines(title, [layer.layer for layer in layers], series, lambda value: human_bytes(value * 1e9))
    return Figure(svg, tuple((one.css, one.label, "") for one in series))


def cells(moe: list[LayerReport]) -> Markup:
    """The numbers that the script shows: tokens of every routed expert, and its worst matrix's errors in
    ten-thousandths; last the shared experts'. Numbers alone, so nothing in it can end the element that holds it."""
    rows = []
    for layer in moe:
        shared = _shared(layer)
        worst = [max(ms, key=lambda m: m.error or 0.0) if ms else None for ms in [*_experts(layer), shared]]
        rows.append(
            {
                "layer": layer.layer,
                "tokens": [*layer.tokens_by_expert, min((m.tokens for m in shared), default=None)],
                "errors": [_ten_thousandths(m.error if m else None) for m in worst],
                "rounding": [_ten_thousandths(m.rounding_error if m else None) for m in worst],
            }
        )
    return Markup(json.dumps(rows, separators=(",", ":")))


def _ten_thousandths(value: float | None) -> int | None:
    return None if value is None else round(value * 10_000)
