"""The report in a few lines of text, and the warnings that stand in both the text and the page."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from weightkit.errors import printable
from weightkit.quantization.report import LayerReport, QuantizationReport
from weightkit.units import counted, human_bytes, human_seconds

#: Names given for each kind of warning; the JSON file and the page have more.
NAMED = 5
#: Longest name or note shown in a warning.
SHOWN_CHARACTERS = 120
_NO_REASON = "no reason recorded"


def render(report: QuantizationReport) -> str:
    """Aligned lines: error, tokens, time, slowest layer, memory, size, then a line for every warning."""
    rows = {
        "error": _errors(report),
        "tokens": _tokens(report),
        "time": _time(report),
        "slowest": _slowest(report.layers),
        "memory": _memory(report.layers),
        "size": size_line(report),
        "resumed": _resumed(report),
    }
    lines = [f"{report.title}: {headline(report)}"]
    lines += [f"  {key:<8} {value}" for key, value in rows.items() if value]
    lines += [f"  warning  {warning}" for warning in report.warnings]
    return "\n".join(printable(line) for line in lines)


def headline(report: QuantizationReport) -> str:
    """``44,718 matrices of 58 layers in int4 (gptq, ...), 2 h 3 min on 1 x NVIDIA H100``."""
    settings = report.settings
    layers = sum(bool(layer.matrices) for layer in report.layers)
    group = "whole columns" if settings.group_size == -1 else f"groups of {settings.group_size}"
    matrices = f"{len(report.matrices):,} {'matrix' if len(report.matrices) == 1 else 'matrices'}"
    how = f"{settings.method}, {group}, scope {settings.scope}"
    where = f"{report.gpus} x {report.device}" if report.gpus else report.device
    what = f"{matrices} of {counted(layers, 'layer')} in int{settings.bits} ({how})"
    return f"{what}, {human_seconds(report.wall_s)} on {where}"


def error_text(value: float | None) -> str:
    """``0.0274``; small ones keep three digits; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:.4f}" if value == 0 or value >= 0.01 else f"{value:.3g}"


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _errors(report: QuantizationReport) -> str:
    worst = report.worst(1)
    if not worst:
        return "not measured" if report.matrices else ""
    rounding = [m.rounding_error for m in report.matrices if m.rounding_error is not None]
    ours = f"mean {error_text(mean(m.error for m in report.matrices))}, worst {error_text(worst[0].error)}"
    theirs = f"mean {error_text(mean(rounding))}, worst {error_text(max(rounding, default=None))}"
    return f"{ours} ({clipped(worst[0].name)}); rounding: {theirs}"


def _tokens(report: QuantizationReport) -> str:
    calibration = report.calibration
    if calibration is None:
        return "no calibration"
    total = f"{counted(calibration.tokens, 'token')} of calibration ({calibration.samples:,} x {calibration.seq_len:,})"
    by_expert = list(report.expert_tokens())
    if not by_expert:
        return total
    median = statistics.median_low(by_expert)
    return f"{total}; an expert: median {median:,}, least {min(by_expert):,}, most {max(by_expert):,}"


def _time(report: QuantizationReport) -> str:
    total = sum(report.stage_s.values())
    stages = sorted(report.stage_s.items(), key=lambda item: -item[1])
    return ", ".join(f"{stage} {human_seconds(s)} ({100 * s / total:.0f} %)" for stage, s in stages if s > 0)


def _slowest(layers: Sequence[LayerReport]) -> str:
    if not layers:
        return ""
    slowest = max(layers, key=lambda layer: layer.wall_s)
    median = statistics.median(layer.wall_s for layer in layers)
    return f"layer {slowest.layer}, {human_seconds(slowest.wall_s)}; median layer {human_seconds(median)}"


def _memory(layers: Sequence[LayerReport]) -> str:
    gpu = max((layer.gpu_peak_bytes for layer in layers), default=0)
    host = max((layer.host_peak_bytes for layer in layers), default=0)
    peaks = [f"{name} {human_bytes(peak)}" for name, peak in (("GPU", gpu), ("host", host)) if peak]
    return ", ".join(peaks) + " at the peak" if peaks else ""


def size_line(report: QuantizationReport) -> str:
    """``688.6 GB to 352.1 GB (51 %)``, and what engines are expected to need."""
    sizes = report.sizes
    share = f" ({100 * sizes.output_bytes / sizes.source_bytes:.0f} %)" if sizes.source_bytes else ""
    needs = "".join(f"; expected by {engine}: {human_bytes(size)}" for engine, size in sizes.expected_bytes.items())
    return f"{human_bytes(sizes.source_bytes)} to {human_bytes(sizes.output_bytes)}{share}{needs}"


def _resumed(report: QuantizationReport) -> str:
    layers = report.resumed_layers
    return f"{spans(layers, 'layer')} from an earlier run" if layers else ""


def spans(numbers: Sequence[int], noun: str) -> str:
    """``layers 3 to 7, 9``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in runs)
    return f"{noun}{'s' * (len(set(numbers)) != 1)} {text}"


def warnings(report: QuantizationReport) -> tuple[str, ...]:
    """A sentence for each thing that went otherwise than asked; nothing that was rounded or damped stays unsaid."""
    total = len(report.matrices)
    without = [item.name for item in report.starved if not item.tokens]
    few = [f"{item.name} ({item.tokens:,} of {item.columns:,})" for item in report.starved if item.tokens]
    damped = [f"{m.name} ({m.damping:.3g})" if m.damping is not None else m.name for m in report.damped]
    worse = [
        f"{m.name} ({error_text(m.error)}; rounding {error_text(m.rounding_error)})" for m in report.worse_than_rounding
    ]
    found = [
        (without, "saw no calibration tokens", "module"),
        (few, "saw fewer tokens than columns, so the Hessian is singular", "module"),
        *_fallbacks(report, total),
        (damped, f"of {total:,} needed more damping than {report.settings.damping:g}", "matrix"),
        (worse, "came out worse than rounded", "matrix"),
        ([m.name for m in report.unmeasured], "saw tokens but came without a finite error", "matrix"),
    ]
    return tuple(f"{_count(names, noun)} {what}: {_named(names)}" for names, what, noun in found if names)


def _fallbacks(report: QuantizationReport, total: int) -> list[tuple[list[str], str, str]]:
    by_note: dict[str, list[str]] = {}
    for matrix in report.rounded:
        by_note.setdefault(matrix.note or _NO_REASON, []).append(matrix.name)
    what = f"of {total:,} rounded to nearest instead of solved"
    return [(names, f"{what} ({clipped(note)})", "matrix") for note, names in by_note.items()]


def _count(names: Sequence[str], noun: str) -> str:
    return f"{len(names):,} matrices" if noun == "matrix" and len(names) != 1 else counted(len(names), noun)


def _named(names: Sequence[str]) -> str:
    more = f", and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(clipped(name) for name in names[:NAMED]) + more


def clipped(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """The text without its middle where it is longer than any real name."""
    return text if len(text) <= limit else f"{text[: limit // 2]}…{text[-(limit // 2 - 1) :]}"
