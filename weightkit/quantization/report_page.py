"""The report as one HTML page that needs nothing from the network: SVG plots, tables, light and dark.

For 58 layers of 257 experts (44,718 matrices) the page takes about 0.6 MB: two heatmaps of some 100 kB each as runs of
equal cells, and 230 kB for the numbers that a small script shows for the cell under the pointer. Without scripts
all else stays. Matrices are aggregated; those that matter are listed (the worst, the starved, the rounded, the damped),
``SHOWN_ROWS`` of a kind at most, and the JSON file has all.

Text from checkpoints is hostile until shown otherwise: it is made printable, clipped and escaped, and a content
security policy allows this page's own script by its hash and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import statistics
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from weightkit.durable import write_whole
from weightkit.errors import printable
from weightkit.quantization import report_figures as figures
from weightkit.quantization.report import LayerReport, MatrixReport, QuantizationReport
from weightkit.quantization.report_summary import clipped, error_text, headline, mean, size_line, spans
from weightkit.units import human_bytes, human_seconds

#: Names of the two files that ``write_report`` makes.
JSON_NAME = "quantization_report.json"
PAGE_NAME = "quantization_report.html"
#: Rows of a table that could be as long as the model.
SHOWN_ROWS = 100
WORST = 20
#: Longest text from outside that is shown.
SHOWN_CHARACTERS = 2000
_SCRIPT = """
const number = value => value == null ? "unknown" : (value / 10000).toFixed(4);
for (const figure of document.querySelectorAll("figure[data-cells]")) {
  const svg = figure.querySelector("svg"), out = figure.querySelector("output"), said = out.textContent;
  const data = JSON.parse(document.getElementById("cells").textContent);
  const [left, top, width, height] = svg.dataset.box.split(" ").map(Number);
  const experts = Math.max(...data.map(layer => layer.tokens.length - 1));
  svg.addEventListener("pointermove", event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const layer = data[Math.floor((at.y - top) / height)], column = Math.floor((at.x - left) / width);
    const last = layer ? layer.tokens.length - 1 : 0, expert = column >= experts ? last : column;
    if (!layer || column < 0 || layer.tokens[expert] == null) { out.textContent = said; return; }
    const name = expert == last ? "shared experts" : "expert " + expert;
    out.textContent = `Layer ${layer.layer}, ${name}: error ${number(layer.errors[expert])}, ` +
      `rounding ${number(layer.rounding[expert])}, ${layer.tokens[expert].toLocaleString("en")} tokens`;
  });
  svg.addEventListener("pointerleave", () => { out.textContent = said; });
}
"""


def write_report(report: QuantizationReport, folder: Path) -> tuple[Path, Path]:
    """Write the JSON file and the page into an existing folder, each whole or not at all. Returns their paths."""
    data, page = folder / JSON_NAME, folder / PAGE_NAME
    report.save(data)
    write_whole(page, render_page(report).encode())
    return data, page


def render_page(report: QuantizationReport) -> str:
    """The whole page. Any report gives one: without layers, experts, tokens or known errors, parts are left out."""
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    moe = [layer for layer in report.layers if layer.tokens_by_expert]
    return _template().render(
        report=report,
        headline=headline(report),
        tiles=_tiles(report),
        error_plot=figures.error_plot(report),
        error_map=figures.error_map(report, moe) if moe else None,
        worst=report.worst(WORST),
        token_plot=figures.token_plot(report, moe) if moe else None,
        token_map=figures.token_map(report, moe) if moe else None,
        time_plot=figures.time_plot(report),
        memory_plot=figures.memory_plot(report.layers),
        stages=_stages(report),
        by_layer=[_layer_row(layer) for layer in report.layers],
        stages_by_layer=[
            (str(layer.layer), *(f"{layer.stage_s.get(stage, 0.0):.2f}" for stage in report.stage_s))
            for layer in report.layers
        ],
        special=_special(report),
        facts=_facts(report),
        cells=figures.cells(moe),
        script=Markup(_SCRIPT),
        script_hash=digest,
        shown_rows=SHOWN_ROWS,
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_shown
    )
    environment.filters.update(
        clip=clipped,
        error=error_text,
        general=lambda value: "–" if value is None else f"{value:.3g}",
        number=lambda value: f"{value:,}",
        ratio=lambda value: "–" if value is None else f"{value:.2f}",
    )
    source = resources.files("weightkit.quantization").joinpath("report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source)


def _shown(value: object) -> object:
    """Every value that enters the page: text printable and of a bounded length, before it is escaped."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(clipped(value, SHOWN_CHARACTERS))
    return value


def _tiles(report: QuantizationReport) -> list[tuple[str, str, str]]:
    """The numbers at the head: (label, value, what it compares with)."""
    ours, theirs = mean(m.error for m in report.matrices), mean(m.rounding_error for m in report.matrices)
    worst = report.worst(1)
    return [
        ("mean error", error_text(ours), f"rounding: {error_text(theirs)}"),
        ("worst error", error_text(worst[0].error if worst else None), clipped(worst[0].name) if worst else ""),
        ("calibration", f"{report.calibration.tokens:,}" if report.calibration else "none", "tokens"),
        ("time", human_seconds(report.wall_s), f"{report.gpus} x {report.device}" if report.gpus else report.device),
        ("size", human_bytes(report.sizes.output_bytes), f"from {human_bytes(report.sizes.source_bytes)}"),
    ]


def _stages(report: QuantizationReport) -> list[tuple[str, str, str]]:
    """(stage, time, share) over all layers."""
    total = sum(report.stage_s.values()) or 1.0
    return [(stage, human_seconds(s), f"{100 * s / total:.1f} %") for stage, s in report.stage_s.items()]


def _layer_row(layer: LayerReport) -> tuple[str, ...]:
    """One row of the numbers behind the plots."""
    errors, roundings, tokens = figures.errors(layer), figures.roundings(layer), sorted(layer.tokens_by_expert)
    return (
        str(layer.layer),
        f"{len(layer.matrices):,}",
        error_text(figures.median(errors)),
        error_text(max(errors, default=None)),
        error_text(figures.median(roundings)),
        error_text(max(roundings, default=None)),
        *((f"{tokens[0]:,}", f"{statistics.median(tokens):,.0f}", f"{tokens[-1]:,}") if tokens else ("–",) * 3),
        human_seconds(layer.wall_s),
        human_bytes(layer.gpu_peak_bytes),
        human_bytes(layer.host_peak_bytes),
    )


def _special(report: QuantizationReport) -> list[MatrixReport]:
    """Matrices rounded instead of solved, damped more than asked, or with a note, each once."""
    noted = [m for m in report.matrices if m.note]
    return list(dict.fromkeys([*report.rounded, *report.damped, *noted]))


def _facts(report: QuantizationReport) -> list[tuple[str, list[tuple[str, str]]]]:
    """The tables of what was asked for and with what: (heading, rows)."""
    settings, calibration = report.settings, report.calibration
    group = "whole column" if settings.group_size == -1 else str(settings.group_size)
    asked = [
        ("Method", {"gptq": "GPTQ", "rtn": "round to nearest"}[settings.method]),
        ("Bits", str(settings.bits)),
        ("Group size", group),
        ("Scope", settings.scope),
        ("Column order", settings.order),
        ("Damping", f"{settings.damping:g}"),
        ("Scale search", settings.scale_search),
        ("Seed", str(settings.seed)),
    ]
    if settings.mtp is not None:
        asked.append(("MTP layers", "kept in BF16" if settings.mtp else "dropped"))
    text = [("Source", "none")]
    if calibration is not None:
        text = [
            ("Source", calibration.source),
            ("SHA-256", calibration.sha256),
            ("Sequences", f"{calibration.samples:,} of {calibration.seq_len:,} tokens"),
            ("Tokens", f"{calibration.tokens:,}"),
        ]
    run = [
        ("Source", report.source),
        ("Size", size_line(report)),
        ("Created", report.created),
        ("Device", f"{report.gpus} x {report.device}" if report.gpus else report.device),
        *((package, version) for package, version in report.versions.items()),
    ]
    if report.resumed_layers:
        run.append(("Resumed", spans(report.resumed_layers, "layer") + " from an earlier run"))
    return [("Settings", asked), ("Calibration", text), ("Run", run)]
