"""The report of a quantization: exact JSON, honest summary, and a page that shows the data and trusts none of it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from weightkit.errors import FormatError, MissingFileError
from weightkit.quantization.report import (
    CalibrationReport,
    LayerReport,
    MatrixReport,
    QuantizationReport,
    QuantizationSettings,
    Sizes,
)
from weightkit.quantization.report_page import render_page, write_report

HIDDEN, INTER = 64, 32
SETTINGS = QuantizationSettings("gptq", 4, 32, "experts", "activation", 0.01, "search", 7, True)
STAGES = ("read", "attention", "route", "hessian", "factor", "solve", "pack", "forward", "write")
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202e\ud800{{ 7*7 }}&amp;'


def matrix(name: str, error: float | None = 0.02, rounding: float | None = 0.1, **fields: Any) -> MatrixReport:
    """One of ``model.layers.NAME``; layer and expert as the name says."""
    numbers = re.match(r"(\d+)(?:\.mlp\.experts\.(\d+))?", name)
    assert numbers is not None
    values: dict[str, Any] = {
        "name": f"model.layers.{name}",
        "layer": int(numbers[1]),
        "expert": None if numbers[2] is None else int(numbers[2]),
        "shape": (HIDDEN, INTER) if name.endswith("down_proj") else (INTER, HIDDEN),
        "tokens": 100,
        "method": "gptq",
        "error": error,
        "rounding_error": rounding,
        "damping": 0.01,
        "retries": 0,
    }
    return MatrixReport(**{**values, **fields})


def small() -> QuantizationReport:
    """A dense layer, then one of four experts: one with enough tokens, one with few, one damped, one with none."""
    dense = LayerReport(0, (), {"read": 1.0, "forward": 0.5}, 1.5, 2_000_000_000, 5_000_000_000)
    matrices = (
        matrix("1.mlp.experts.0.gate_proj", 0.02, 0.1),
        matrix("1.mlp.experts.0.down_proj", 0.04, 0.12),
        matrix("1.mlp.experts.1.gate_proj", 0.05, 0.1, tokens=40),
        matrix("1.mlp.experts.1.down_proj", 0.13, 0.12, tokens=40),
        matrix("1.mlp.experts.2.gate_proj", 0.03, 0.1, damping=0.08, retries=3),
        matrix("1.mlp.experts.3.gate_proj", None, None, tokens=0, method="rtn", damping=None, note="no tokens"),
        matrix("1.mlp.shared_experts.gate_proj", 0.01, 0.1, tokens=240),
    )
    stages = {"read": 2.0, "hessian": 1.5, "solve": 4.5, "forward": 0.5}
    moe = LayerReport(1, matrices, stages, 8.0, 3_000_000_000, 6_000_000_000, (100, 40, 100, 0))
    return QuantizationReport(
        title="Tiny",
        source="/models/tiny",
        created="2026-02-03T04:05:06+00:00",
        versions={"weightkit": "0.1.0", "torch": "2.13.0", "triton": "3.5.0"},
        device="NVIDIA H100 80GB HBM3",
        gpus=1,
        settings=SETTINGS,
        calibration=CalibrationReport("text.jsonl", "ab" * 32, 4, 60, 240),
        layers=(dense, moe),
        sizes=Sizes(4_000_000_000, 1_000_000_000, {"vLLM": 1_100_000_000}),
        wall_s=9.6,
        resumed_layers=(0,),
    )


def real_size() -> QuantizationReport:
    """58 layers of 256 routed experts and a shared one, each with three matrices, after three dense layers."""
    draw = random.Random(0)
    layers = [LayerReport(at, (), {"read": 1.0, "attention": 9.0}, 10.0, 20 << 30, 40 << 30) for at in range(3)]
    for at in range(3, 61):
        tokens = [int(draw.lognormvariate(11, 0.7)) for _ in range(256)]
        matrices = []
        for expert in [*range(256), None]:
            part = "shared_experts" if expert is None else f"experts.{expert}"
            for projection, shape in (
                ("gate_proj", (2048, 7168)),
                ("up_proj", (2048, 7168)),
                ("down_proj", (7168, 2048)),
            ):
                rounding = draw.uniform(0.1, 0.12)
                matrices.append(
                    matrix(
                        f"{at}.mlp.{part}.{projection}",
                        rounding * draw.uniform(0.2, 0.5),
                        rounding,
                        shape=shape,
                        tokens=2_097_152 if expert is None else tokens[expert],
                    )
                )
        stages = {stage: draw.uniform(1, 20) for stage in STAGES}
        layers.append(LayerReport(at, tuple(matrices), stages, 60.0, 60 << 30, 50 << 30, tuple(tokens)))
    return replace(small(), title="DeepSeek-V3", layers=tuple(layers))


class Page(HTMLParser):
    """What a browser would see: elements, the text of table cells and list items, scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.items: list[str] = []
        self.scripts: list[str] = []
        self.titles: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)
        fresh: dict[str, tuple[list[Any], Any]] = {
            "tr": (self.rows, []),
            "li": (self.items, ""),
            "script": (self.scripts, ""),
            "title": (self.titles, ""),
        }
        if tag in fresh:
            kept, empty = fresh[tag]
            kept.append(empty)
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open:
            return
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if "li" in self.open:
            self.items[-1] += data
        if self.open[-1] == "script":
            self.scripts[-1] += data
        if self.open[-1] == "title":
            self.titles[-1] += data

    @property
    def cells(self) -> list[Any]:
        return list(json.loads(self.scripts[0]))


def svgs(page: str) -> dict[str, ElementTree.Element]:
    """The plots by their label; each parses as XML."""
    found = (ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    return {element.attrib["aria-label"]: element for element in found}


def heatmap_cells(svg: ElementTree.Element) -> Iterator[tuple[int, int, str]]:
    """(row, column, CSS class) of every cell that is drawn."""
    for path in svg.iterfind("./g[@class='cells']/path"):
        for x, y, length in re.findall(r"M(\d+) (\d+)\.5h(\d+)", path.attrib["d"]):
            yield from ((int(y), int(x) + step, path.attrib["class"]) for step in range(int(length)))


@pytest.fixture(scope="module")
def large() -> QuantizationReport:
    return real_size()


# JSON


def test_json_and_back_is_the_same_report(tmp_path: Path) -> None:
    odd = replace(small(), wall_s=0.1 + 0.2, versions={}, title=HOSTILE, source="/data/\udcff")
    odd = replace(odd, layers=(replace(odd.layers[0], stage_s={"read": 5e-324, HOSTILE: 1e300}), odd.layers[1]))
    for report in (small(), odd, replace(small(), calibration=None, layers=())):
        report.save(tmp_path / "report.json")
        again = QuantizationReport.load(tmp_path / "report.json")
        assert again == report
        assert [list(layer.stage_s) for layer in again.layers] == [list(layer.stage_s) for layer in report.layers]
        assert again.json_bytes() == report.json_bytes()
    layer = small().layers[1]
    assert LayerReport.from_json(json.loads(json.dumps(layer.to_json()))) == layer


def test_json_is_versioned_and_plain() -> None:
    value = json.loads(small().json_bytes())
    assert (value["format"], value["version"]) == ("weightkit quantization report", 1)
    assert value["layers"][1]["matrices"][5] == {
        "name": "model.layers.1.mlp.experts.3.gate_proj",
        "layer": 1,
        "expert": 3,
        "shape": [32, 64],
        "tokens": 0,
        "method": "rtn",
        "error": None,
        "rounding_error": None,
        "damping": None,
        "retries": 0,
        "note": "no tokens",
    }


def test_json_has_no_nan() -> None:
    unknown = matrix("1.mlp.experts.0.gate_proj", math.nan, math.inf, damping=-math.inf)
    assert (unknown.error, unknown.rounding_error, unknown.damping, unknown.ratio) == (None, None, None, None)
    report = replace(small(), layers=(replace(small().layers[1], matrices=(unknown,)),))
    assert not re.search(rb"NaN|Infinity", report.json_bytes())
    assert QuantizationReport.from_json(json.loads(report.json_bytes())) == report


def _set(*path: Any, to: Any) -> Callable[[Any], None]:
    def change(value: Any) -> None:
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("format", to="other"), "not a quantization report"),
        (_set("version", to=2), "a report of another version"),
        (_set("gpus", to=True), r"report\.gpus: a value of another type: expected an integer, found bool"),
        (_set("gpus", to=1.5), r"report\.gpus"),
        (_set("title", to=None), r"report\.title: .*expected a string, found NoneType"),
        (_set("wall_s", to=math.nan), r"report\.wall_s: not a finite number"),
        (_set("layers", to={}), r"report\.layers: .*expected a list"),
        (_set("versions", to=[]), r"report\.versions: .*expected an object"),
        (_set("versions", "torch", to=2), r"report\.versions\.torch: .*expected a string"),
        (_set("extra", to=1), "other fields"),
        (lambda value: value.pop("sizes"), "other fields"),
        (_set("layers", 1, "matrices", 2, "shape", to=[1]), r"layers\[1\]\.matrices\[2\]\.shape: a list of another"),
        (_set("layers", 1, "matrices", 2, "method", to="awq"), r"matrices\[2\]\.method: an unknown word: .*'gptq' or"),
        (_set("layers", 1, "matrices", 2, "error", to="0"), r"matrices\[2\]\.error: .*expected a number, found str"),
    ],
)
def test_damaged_json_names_its_place(change: Callable[[Any], None], said: str) -> None:
    value = json.loads(small().json_bytes())
    change(value)
    with pytest.raises(FormatError, match=said):
        QuantizationReport.from_json(value)


def test_files_that_are_no_report(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(MissingFileError):
        QuantizationReport.load(path)
    path.write_bytes(small().json_bytes()[:-20])
    with pytest.raises(FormatError, match="not JSON"):
        QuantizationReport.load(path)


# What follows from the data


def test_worst_and_starved() -> None:
    report = small()
    assert [m.name.split(".", 4)[-1] for m in report.worst(3)] == [
        "experts.1.down_proj",
        "experts.1.gate_proj",
        "experts.0.down_proj",
    ]
    # expert 1 saw 40 tokens: fewer than gate's 64 columns, not than down's 32
    assert [(item.name, item.layer, item.expert, item.tokens, item.columns) for item in report.starved] == [
        ("model.layers.1.mlp.experts.3", 1, 3, 0, 64),
        ("model.layers.1.mlp.experts.1", 1, 1, 40, 64),
    ]


def test_a_starved_module_is_as_poor_as_its_poorest_matrix() -> None:
    gate = matrix("1.mlp.experts.0.gate_proj", tokens=50)
    down = matrix("1.mlp.experts.0.down_proj", tokens=20)
    (starved,) = replace(small(), layers=(replace(small().layers[1], matrices=(gate, down)),)).starved
    assert (starved.tokens, starved.columns) == (20, 64)


def test_summary_whole() -> None:
    assert small().summary() == (
        "Tiny: 7 matrices of 1 layer in int4 (gptq, groups of 32, scope experts), 9.6 s on 1 x NVIDIA H100 80GB HBM3\n"
        "  error    mean 0.0467, worst 0.1300 (model.layers.1.mlp.experts.1.down_proj);"
        " rounding: mean 0.1067, worst 0.1200\n"
        "  tokens   240 tokens of calibration (4 x 60); an expert: median 40, least 0, most 100\n"
        "  time     solve 4.5 s (45 %), read 3.0 s (30 %), hessian 1.5 s (15 %), forward 1.0 s (10 %)\n"
        "  slowest  layer 1, 8.0 s; median layer 4.8 s\n"
        "  memory   GPU 3.0 GB, host 6.0 GB at the peak\n"
        "  size     4.0 GB to 1.0 GB (25 %); expected by vLLM: 1.1 GB\n"
        "  resumed  layer 0 from an earlier run\n"
        "  warning  1 module saw no calibration tokens: model.layers.1.mlp.experts.3\n"
        "  warning  1 module saw fewer tokens than columns, so the Hessian is singular:"
        " model.layers.1.mlp.experts.1 (40 of 64)\n"
        "  warning  1 matrix of 7 rounded to nearest instead of solved (no tokens):"
        " model.layers.1.mlp.experts.3.gate_proj\n"
        "  warning  1 matrix of 7 needed more damping than 0.01: model.layers.1.mlp.experts.2.gate_proj (0.08)\n"
        "  warning  1 matrix came out worse than rounded:"
        " model.layers.1.mlp.experts.1.down_proj (0.1300; rounding 0.1200)"
    )


def test_fallbacks_are_told_by_reason_and_counted() -> None:
    matrices = [matrix(f"1.mlp.experts.{at}.gate_proj", 0.1, method="rtn", note="singular") for at in range(7)]
    matrices.append(matrix("1.mlp.experts.7.gate_proj", 0.1, method="rtn"))
    report = replace(small(), layers=(replace(small().layers[1], matrices=tuple(matrices)),))
    names = [f"model.layers.1.mlp.experts.{at}.gate_proj" for at in range(8)]
    assert report.warnings == (
        f"7 matrices of 8 rounded to nearest instead of solved (singular): {', '.join(names[:5])}, and 2 more",
        f"1 matrix of 8 rounded to nearest instead of solved (no reason recorded): {names[7]}",
    )


def test_an_error_that_is_not_finite_is_told() -> None:
    broken = matrix("1.mlp.experts.0.gate_proj", math.nan)
    report = replace(small(), layers=(replace(small().layers[1], matrices=(broken,)),))
    assert report.warnings == (f"1 matrix saw tokens but came without a finite error: {broken.name}",)


def test_what_was_asked_for_is_no_warning() -> None:
    as_float32 = matrix("1.mlp.experts.0.gate_proj", damping=0.05000000074505806)
    asked = replace(
        small(), settings=replace(SETTINGS, damping=0.05), layers=(replace(small().layers[1], matrices=(as_float32,)),)
    )
    assert asked.warnings == ()
    rounded = matrix("1.mlp.experts.0.gate_proj", None, None, method="rtn", tokens=0, damping=None)
    layers = (replace(small().layers[1], matrices=(rounded,), tokens_by_expert=()),)
    report = replace(asked, settings=replace(asked.settings, method="rtn"), calibration=None, layers=layers)
    assert report.warnings == ()
    assert "\n  error    not measured\n  tokens   no calibration\n" in report.summary()


def test_summary_drives_no_terminal() -> None:
    report = replace(small(), title=HOSTILE, device="\x07")
    assert report.summary().replace("\n", "").isprintable()


# The page


def test_numbers_on_the_page_are_those_of_the_data() -> None:
    report = small()
    text = render_page(report)
    page = Page(text)
    assert page.titles[0] == "Quantization of Tiny"
    worst = ["model.layers.1.mlp.experts.1.down_proj", "64 x 32", "40", "gptq", "0.1300", "0.1200", "1.08", "0.01"]
    assert worst in page.rows
    note = ["model.layers.1.mlp.experts.3.gate_proj", "rtn", "0", "–", "0", "–", "–", "no tokens"]
    assert note in page.rows
    damped = ["model.layers.1.mlp.experts.2.gate_proj", "gptq", "100", "0.08", "3", "0.0300", "0.1000", ""]
    assert damped in page.rows
    assert ["model.layers.1.mlp.experts.1", "40", "64"] in page.rows
    layer = ["1", "7", "0.0350", "0.1300", "0.1000", "0.1200", "0", "70", "100", "8.0 s", "3.0 GB", "6.0 GB"]
    assert layer in page.rows
    assert ["solve", "4.5 s", "45.0 %"] in page.rows
    assert ["1", "2.00", "1.50", "4.50", "0.50"] in page.rows
    for row in (
        ["Damping", "0.01"],
        ["Seed", "7"],
        ["MTP layers", "kept in BF16"],
        ["SHA-256", "ab" * 32],
        ["torch", "2.13.0"],
    ):
        assert row in page.rows
    assert [item for item in page.items if item in report.warnings] == list(report.warnings)


def test_the_script_gets_the_numbers_of_the_worst_matrix() -> None:
    assert Page(render_page(small())).cells == [
        {
            "layer": 1,
            "tokens": [100, 40, 100, 0, 240],
            "errors": [400, 1300, 300, None, 100],
            "rounding": [1200, 1200, 1000, None, 1000],
        }
    ]


def test_heatmaps_colour_the_right_cells() -> None:
    plots = svgs(render_page(small()))
    tokens = {column: css for _, column, css in heatmap_cells(plots["Tokens, by layer and expert"])}
    assert tokens[3] == "bad"  # none
    assert tokens[1] == "alert"  # fewer than columns
    assert tokens[0] == tokens[2]
    assert tokens[0].startswith("q")
    errors = {
        column: css for _, column, css in heatmap_cells(plots["Error as a share of rounding's, by layer and expert"])
    }
    assert errors[3] == "alert"  # rounded instead
    assert errors[1] == "bad"  # worse than rounding
    ramp = [int(errors[column].removeprefix("q")) for column in (5, 2, 0)]  # 5: shared, behind a gap
    assert ramp == sorted(ramp)  # 0.1, 0.3, 0.333 of rounding's error
    assert ramp[0] < ramp[1]
    assert 4 not in errors


@pytest.mark.parametrize("ratios", [(0.0,), (0.25, 0.25), (0.1, 0.2, 0.3, 0.4, 0.8), (0.0, 1.0), (0.5, 1.0, 1.5)])
def test_every_expert_has_one_colour_and_stands_in_the_legend(ratios: tuple[float, ...]) -> None:
    """Also where a value is exactly the edge between two colours."""
    matrices = tuple(matrix(f"1.mlp.experts.{at}.x", ratio, 1.0) for at, ratio in enumerate(ratios))
    tokens = tuple(100 * (at + 1) for at in range(len(ratios)))
    text = render_page(
        replace(small(), layers=(replace(small().layers[1], matrices=matrices, tokens_by_expert=tokens),))
    )
    for label in ("Error as a share of rounding's, by layer and expert", "Tokens, by layer and expert"):
        drawn = sorted((column, css) for _, column, css in heatmap_cells(svgs(text)[label]))
        assert [column for column, _ in drawn] == list(range(len(ratios)))
    assert sum(map(int, re.findall(r"</i>[^<]*<span>(\d+)</span>", text))) == 2 * len(ratios)
    errors = {
        column: css
        for _, column, css in heatmap_cells(svgs(text)["Error as a share of rounding's, by layer and expert"])
    }
    assert [at for at, css in errors.items() if css == "bad"] == [at for at, ratio in enumerate(ratios) if ratio > 1]


def test_lines_and_bars_stand_where_their_values_say() -> None:
    report = small()
    errors = {1: 0.0, 2: 0.05, 3: 0.1}
    layers = [
        replace(report.layers[1], layer=at, matrices=(matrix(f"{at}.mlp.x", error),)) for at, error in errors.items()
    ]
    plots = svgs(render_page(replace(report, layers=tuple(layers))))
    dots = {dot.findtext("title"): dot for dot in plots["Relative output error by layer"].iter("circle")}
    heights = [float(dots[f"layer {at}: GPTQ, median {error:.4f}"].attrib["cy"]) for at, error in errors.items()]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)
    assert heights[0] - heights[2] > 150
    bar = next(plots["Seconds by layer and stage"].iter("g"))
    parts = [float(part.attrib["height"]) for part in bar.iter("rect")]  # read, hessian, solve, forward from below
    assert [part / sum(parts) * 8.5 for part in parts] == pytest.approx([2.0, 1.5, 4.5, 0.5], rel=0.02)
    bottoms = [float(part.attrib["y"]) for part in bar.iter("rect")]
    assert bottoms == sorted(bottoms, reverse=True)
    assert bar.findtext("title") == "layer 1: 8.5 s\nforward 0.5 s\nsolve 4.5 s\nhessian 1.5 s\nread 2.0 s"


def test_a_page_of_the_real_size(large: QuantizationReport) -> None:
    assert len(large.matrices) == 44_718
    start = time.perf_counter()
    text = render_page(large)
    assert time.perf_counter() - start < 60
    assert len(text.encode()) < 2_000_000
    plots = svgs(text)
    tokens = list(heatmap_cells(plots["Tokens, by layer and expert"]))
    assert len(tokens) == len({(row, column) for row, column, _ in tokens}) == 58 * 256
    assert {css for _, _, css in tokens} >= {f"q{at}" for at in range(8)}
    errors = {
        (row, column) for row, column, _ in heatmap_cells(plots["Error as a share of rounding's, by layer and expert"])
    }
    assert len(errors & {(row, column) for row, column, _ in tokens}) == 58 * 256
    assert {row for row, column in errors if column >= 256} == set(range(58))  # the shared experts
    counts = [int(count.replace(",", "")) for count in re.findall(r"</i>[^<]*<span>([\d,]+)</span>", text)]
    assert sum(counts) == 58 * 257 + 58 * 256  # each legend counts every expert once


def test_a_report_of_the_real_size_survives_json(large: QuantizationReport) -> None:
    data = large.json_bytes()
    assert len(data) < 12_000_000
    assert QuantizationReport.from_json(json.loads(data)) == large


def test_the_page_needs_nothing_from_elsewhere() -> None:
    text = render_page(small())
    page = Page(text)
    assert not re.search(r"https?:|//\w|@import|url\(", text)
    loading = {"src", "href", "srcset", "data", "action", "xlink:href"}
    assert [
        tag for tag, attributes in page.elements if loading & attributes.keys() or tag in ("link", "iframe", "img")
    ] == []
    policy = next(a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_hostile_text_stays_text() -> None:
    report = small()
    bad = replace(report.layers[1].matrices[2], name=HOSTILE, note=HOSTILE, damping=0.5)
    layer = replace(report.layers[1], matrices=(bad,), stage_s={HOSTILE: 2.0})
    settings = replace(SETTINGS, scope=HOSTILE, order=HOSTILE, scale_search=HOSTILE)
    hostile = replace(
        report,
        title=HOSTILE,
        source=HOSTILE,
        created=HOSTILE,
        device=HOSTILE,
        versions={HOSTILE: HOSTILE},
        settings=settings,
        calibration=CalibrationReport(HOSTILE, HOSTILE, 1, 1, 1),
        layers=(layer,),
        sizes=Sizes(1, 1, {HOSTILE: 1}),
    )
    text = render_page(hostile)
    page = Page(text)
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert "img" not in {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert text.replace("\n", "").isprintable()
    assert "{{ 7*7 }}" in text
    shown = HOSTILE.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e").replace("\ud800", r"\ud800")
    assert page.titles[0] == f"Quantization of {shown}"
    assert [row[0] for row in page.rows].count(shown) >= 3  # the worst, the damped, the version
    svgs(text)


def test_long_text_is_clipped() -> None:
    report = small()
    layer = replace(
        report.layers[1], matrices=(replace(report.layers[1].matrices[5], name="n" * 10**6, note="x" * 10**6),)
    )
    report = replace(report, title="t" * 10**6, layers=(layer,))
    assert len(render_page(report)) < 100_000
    assert len(report.warnings[0]) < 300


def test_long_tables_are_cut_and_say_so(large: QuantizationReport) -> None:
    page = render_page(replace(large, settings=replace(large.settings, damping=0.001)))
    assert "The first 100 of 44,718; the JSON file has all." in page
    assert len(page.encode()) < 2_000_000


def _only(*matrices: MatrixReport, tokens: tuple[int, ...] = ()) -> QuantizationReport:
    return replace(small(), layers=(replace(small().layers[1], matrices=matrices, tokens_by_expert=tokens),))


ODD = {
    "no layers": replace(small(), layers=()),
    "nothing quantized": replace(small(), layers=small().layers[:1]),
    "no MoE layer": _only(matrix("1.mlp.gate_proj"), matrix("1.self_attn.o_proj")),
    "one expert": _only(matrix("1.mlp.experts.0.gate_proj"), tokens=(100,)),
    "zero tokens": _only(matrix("1.mlp.experts.0.gate_proj", math.nan, math.nan, tokens=0), tokens=(0, 0)),
    "zero errors": _only(matrix("1.mlp.experts.0.gate_proj", 0.0, 0.0), tokens=(100,)),
    "expert out of range": _only(matrix("1.mlp.experts.9.gate_proj"), tokens=(100,)),
    "no time and memory": replace(small(), layers=(LayerReport(0, (), {}, 0.0, 0, 0),), sizes=Sizes(0, 0, {}), gpus=0),
    "experts of different number": replace(
        small(), layers=(small().layers[1], replace(small().layers[1], layer=2, tokens_by_expert=(5,)))
    ),
    "all rounded": replace(
        _only(matrix("1.mlp.experts.0.gate_proj", 0.1, 0.1, method="rtn", damping=None), tokens=(100,)),
        settings=replace(SETTINGS, method="rtn", group_size=-1, mtp=False),
        calibration=None,
    ),
}


@pytest.mark.parametrize("report", ODD.values(), ids=ODD)
def test_odd_reports_make_a_page_and_a_summary(report: QuantizationReport, tmp_path: Path) -> None:
    data, page = write_report(report, tmp_path)
    assert QuantizationReport.load(data) == report
    text = page.read_text()
    Page(text)
    for svg in svgs(text).values():
        assert not re.search("nan|inf", ElementTree.tostring(svg, encoding="unicode"))
    assert report.summary().startswith("Tiny: ")
    assert "None" not in text
    assert "None" not in report.summary()
