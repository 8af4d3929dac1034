"""What a quantization did: every matrix's error, tokens and damping; every layer's time and memory; and what follows.

Plain records that go to JSON and back exactly (``Record``). Nothing here reads tensors or imports torch. The text for a
terminal is in ``report_summary``, the page with plots in ``report_page``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from weightkit.checkpoint.json_file import read_json_object
from weightkit.durable import write_whole
from weightkit.errors import FormatError
from weightkit.quantization.records import Record

#: First keys of the JSON file.
FORMAT = "weightkit quantization report"
VERSION = 1
#: A damping above the one asked for by less than this share is the same number in another precision.
_SAME_DAMPING = 1e-6

Method = Literal["gptq", "rtn"]


@dataclass(frozen=True, slots=True)
class MatrixReport(Record):
    """One quantized matrix.

    ``error``, ``rounding_error`` and ``damping`` may be given as NaN or Inf; they are kept as None, which JSON can say.

    Attributes:
        name: the module, ``model.layers.3.mlp.experts.5.gate_proj``.
        layer: its decoder layer.
        expert: the routed expert it belongs to; None in a shared expert, attention or a dense MLP.
        shape: (out features, in features).
        tokens: calibration tokens that its Hessian saw.
        method: what made the codes: ``gptq`` (solved) or ``rtn`` (round to nearest).
        error: relative output error of the result over those tokens, ``||X (W - Q)|| / ||X W||``, Frobenius norms;
            None where it is not defined (no tokens, or an output of zeros).
        rounding_error: the same for round-to-nearest on the same grid.
        damping: what was finally added to the Hessian's diagonal, as a share of its mean; None where nothing was
            solved.
        retries: factorizations that failed before one succeeded, each with more damping than the last.
        note: why it was rounded, or anything else worth saying.
    """

    name: str
    layer: int
    expert: int | None
    shape: tuple[int, int]
    tokens: int
    method: Method
    error: float | None
    rounding_error: float | None
    damping: float | None
    retries: int
    note: str | None = None

    def __post_init__(self) -> None:
        for field in ("error", "rounding_error", "damping"):
            value = getattr(self, field)
            if value is not None and not math.isfinite(value):
                object.__setattr__(self, field, None)

    @property
    def module(self) -> str:
        """What the matrix is part of: ``model.layers.3.mlp.experts.5``."""
        return self.name.rpartition(".")[0] or self.name

    @property
    def is_shared(self) -> bool:
        """Whether it belongs to a layer's shared experts."""
        return "shared_experts" in self.name.split(".")

    @property
    def ratio(self) -> float | None:
        """Its error as a share of rounding's; None where either is unknown or rounding makes none."""
        if self.error is None or not self.rounding_error:
            return None
        return self.error / self.rounding_error


@dataclass(frozen=True, slots=True)
class LayerReport(Record):
    """One decoder layer.

    Attributes:
        layer: its number.
        matrices: those quantized in it, in any order; none in a layer that stays as it is.
        stage_s: seconds by stage (``read``, ``hessian``, ``solve``, ...), in the order of the work. Stages that overlap
            add up to more than ``wall_s``.
        wall_s: seconds.
        gpu_peak_bytes: most device memory held at once, 0 without a GPU.
        host_peak_bytes: most host memory resident at once.
        tokens_by_expert: calibration tokens routed to each routed expert; empty in a dense layer.
    """

    layer: int
    matrices: tuple[MatrixReport, ...]
    stage_s: dict[str, float]
    wall_s: float
    gpu_peak_bytes: int
    host_peak_bytes: int
    tokens_by_expert: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class QuantizationSettings(Record):
    """What was asked for.

    Attributes:
        method: ``gptq``, or ``rtn`` where every matrix was to be rounded.
        bits: of a code.
        group_size: input features that share a scale; -1 for a whole column.
        scope: ``experts`` or ``all``.
        order: in which columns are solved: ``activation`` or ``natural``.
        damping: first tried, as a share of the mean of the Hessian's diagonal.
        scale_search: how scales were chosen: ``search`` or ``largest``.
        seed: what the calibration text was drawn with.
        mtp: whether the MTP layers were kept, in BF16; None for a model without any.
    """

    method: Method
    bits: int
    group_size: int
    scope: str
    order: str
    damping: float
    scale_search: str
    seed: int
    mtp: bool | None = None


@dataclass(frozen=True, slots=True)
class CalibrationReport(Record):
    """The calibration text: where from, its SHA-256, and how many sequences of how many tokens."""

    source: str
    sha256: str
    samples: int
    seq_len: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Sizes(Record):
    """Bytes of tensors before and after, and what engines are expected to need, by engine, as far as it is known."""

    source_bytes: int
    output_bytes: int
    expected_bytes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Starved:
    """A module whose Hessian is singular: it saw fewer tokens than it has columns (``columns``: of the widest such
    matrix)."""

    name: str
    layer: int
    expert: int | None
    tokens: int
    columns: int


@dataclass(frozen=True)
class QuantizationReport(Record):
    """One run of ``weightkit quantize``.

    Attributes:
        title: the model's name.
        source: the folder it was read from.
        created: ISO 8601 date and time.
        versions: by package: ``weightkit``, ``torch``, ``triton``.
        device: what computed, ``NVIDIA H100 80GB HBM3`` or ``cpu``.
        gpus: how many of them; 0 on a CPU.
        settings: what was asked for.
        calibration: the text; None where nothing was to be solved and nothing measured.
        layers: every decoder layer, in order.
        sizes: bytes before and after.
        wall_s: seconds of this run.
        resumed_layers: layers that an earlier run had finished; their records are that run's.
    """

    title: str
    source: str
    created: str
    versions: dict[str, str]
    device: str
    gpus: int
    settings: QuantizationSettings
    calibration: CalibrationReport | None
    layers: tuple[LayerReport, ...]
    sizes: Sizes
    wall_s: float
    resumed_layers: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values by field, headed by the format's name and version."""
        return {"format": FORMAT, "version": VERSION, **super().to_json()}

    @classmethod
    def from_json(cls, value: object, *, where: str = "report") -> QuantizationReport:
        """The report that ``to_json`` was called on. Raises ``FormatError`` for anything else."""
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise FormatError("not a quantization report", where=where, expected=f'"format": "{FORMAT}"')
        if value.get("version") != VERSION:
            raise FormatError(
                "a report of another version",
                where=where,
                expected=VERSION,
                found=value.get("version"),
                fix="Read it with the weightkit that wrote it.",
            )
        rest = {key: item for key, item in value.items() if key not in ("format", "version")}
        return super().from_json(rest, where=where)

    def json_bytes(self) -> bytes:
        """The JSON file: ASCII, without spaces (about 10 MB for a 671B checkpoint), no NaN."""
        return (json.dumps(self.to_json(), separators=(",", ":"), allow_nan=False) + "\n").encode("ascii")

    def save(self, path: Path) -> None:
        """Write the JSON file, whole or not at all."""
        write_whole(path, self.json_bytes())

    @classmethod
    def load(cls, path: Path) -> QuantizationReport:
        """Read a JSON file. Raises ``FormatError`` for one that is damaged, ``MissingFileError`` for none."""
        return cls.from_json(read_json_object(path), where=str(path))

    @cached_property
    def matrices(self) -> tuple[MatrixReport, ...]:
        """Every quantized matrix, in the order of the layers."""
        return tuple(matrix for layer in self.layers for matrix in layer.matrices)

    def worst(self, count: int) -> tuple[MatrixReport, ...]:
        """The matrices with the largest error, largest first."""
        known = [matrix for matrix in self.matrices if matrix.error is not None]
        return tuple(sorted(known, key=lambda matrix: -(matrix.error or 0.0))[:count])

    @cached_property
    def starved(self) -> tuple[Starved, ...]:
        """Modules with fewer tokens than columns, fewest tokens first; none where nothing was to be solved."""
        if self.settings.method == "rtn":
            return ()
        by_module: dict[str, list[MatrixReport]] = {}
        for matrix in self.matrices:
            if matrix.tokens < matrix.shape[1]:
                by_module.setdefault(matrix.module, []).append(matrix)
        found = [_starved(name, matrices) for name, matrices in by_module.items()]
        return tuple(sorted(found, key=lambda item: item.tokens))

    @cached_property
    def rounded(self) -> tuple[MatrixReport, ...]:
        """Matrices that were to be solved and were rounded."""
        return tuple(m for m in self.matrices if m.method == "rtn" and self.settings.method != "rtn")

    @cached_property
    def damped(self) -> tuple[MatrixReport, ...]:
        """Matrices solved with more damping than was asked for, most damping first."""
        limit = self.settings.damping * (1 + _SAME_DAMPING)
        found = [m for m in self.matrices if m.method == "gptq" and (m.retries or (m.damping or 0.0) > limit)]
        return tuple(sorted(found, key=lambda matrix: -(matrix.damping or 0.0)))

    @cached_property
    def worse_than_rounding(self) -> tuple[MatrixReport, ...]:
        """Solved matrices whose error is above rounding's, worst first."""
        found = [m for m in self.matrices if m.method == "gptq" and (m.ratio or 0.0) > 1]
        return tuple(sorted(found, key=lambda matrix: -(matrix.ratio or 0.0)))

    @cached_property
    def unmeasured(self) -> tuple[MatrixReport, ...]:
        """Matrices that saw tokens and yet have no finite error."""
        return tuple(m for m in self.matrices if m.tokens and None in (m.error, m.rounding_error))

    @cached_property
    def stage_s(self) -> dict[str, float]:
        """Seconds by stage over all layers, in the order of the work: that of the layers with most stages."""
        total: dict[str, float] = {}
        for layer in sorted(self.layers, key=lambda layer: -len(layer.stage_s)):
            for stage, seconds in layer.stage_s.items():
                total[stage] = total.get(stage, 0.0) + seconds
        return total

    def expert_tokens(self) -> Iterator[int]:
        """Tokens of every routed expert of every layer."""
        for layer in self.layers:
            yield from layer.tokens_by_expert

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader must know before using the result, a sentence each."""
        from weightkit.quantization.report_summary import warnings

        return warnings(self)

    def summary(self) -> str:
        """Lines for a terminal: error against rounding, tokens, time, memory, size, and every warning."""
        from weightkit.quantization.report_summary import render

        return render(self)


def _starved(name: str, matrices: list[MatrixReport]) -> Starved:
    widest = max(matrices, key=lambda matrix: matrix.shape[1])
    fewest = min(matrix.tokens for matrix in matrices)
    return Starved(name, widest.layer, widest.expert, fewest, widest.shape[1])
