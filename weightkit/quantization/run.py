"""The whole road of a quantization: layer after layer, each written and journalled when it is done."""

from __future__ import annotations

import datetime
import resource
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

import weightkit
from weightkit.checkpoint import Reader, read_header
from weightkit.checkpoint.checkpoint import stored_tensors
from weightkit.compute.engines import cuda_errors
from weightkit.durable import STATE_DIR, only_writer
from weightkit.errors import FormatError, Interrupted, MissingFileError, SpaceError, WriteError
from weightkit.model import Layer, Rope, Rotation
from weightkit.model.checkpoint_weights import ROUTER
from weightkit.model.loading import Loader
from weightkit.quantization.activations import Activations, sequences_a_batch
from weightkit.quantization.calibration import Calibration
from weightkit.quantization.clock import Clock
from weightkit.quantization.job import Calibrated, Job, require_disk
from weightkit.quantization.layer import LayerQuantizer
from weightkit.quantization.layer_weights import LayerWeights
from weightkit.quantization.outbox import Outbox
from weightkit.quantization.packed import PARTS, Packed
from weightkit.quantization.report import (
    CalibrationReport,
    LayerReport,
    QuantizationReport,
    QuantizationSettings,
    Sizes,
)
from weightkit.quantization.report_page import JSON_NAME, write_report
from weightkit.quantization.solver import Solver
from weightkit.quantization.source import Source
from weightkit.quantization.state import State
from weightkit.units import human_bytes
from weightkit.writer.executor import CONTINUE, Run, end_pool, open_run
from weightkit.writer.target import inspect_target

#: Threads that write: one for the layer in work, one for files in which nothing is quantized.
WRITERS = 2


@dataclass(frozen=True)
class Outcome:
    """What a call of ``carry_out`` came to.

    Attributes:
        target: the folder.
        report: of the run that completed it; None where that was an earlier one and its report is gone or damaged.
        complete_before: an earlier run had completed the target: nothing was done.
    """

    target: Path
    report: QuantizationReport | None
    complete_before: bool

    def to_json(self) -> dict[str, object]:
        """What a script wants to know; the rest is in the report beside the output."""
        found: dict[str, object] = {"target": str(self.target), "complete_before": self.complete_before}
        return found | ({"report": None} if self.report is None else _figures(self.report, self.target))

    def render(self) -> str:
        """Lines for a terminal."""
        said = [f"{self.target}: complete already."] if self.complete_before else []
        return "\n".join([*said, "Its report is gone." if self.report is None else self.report.summary()])


def carry_out(job: Job, *, progress: bool = True, force: bool = False) -> Outcome | None:
    """Quantize, as the job says. None on ranks other than the first.

    Raises:
        TargetError, SpaceError, WriteError: as the writer; SpaceError also where a GPU's memory runs out.
        QuantizationError: weights or activations that are not finite.
        DeviceError: a GPU that fails on the way.
        Interrupted: by Ctrl-C; the next run continues.
    """
    started, outbox, is_first = time.monotonic(), Outbox(), job.ranks.rank == 0
    with ExitStack() as stack, torch.no_grad(), cuda_errors(job.device, fix=CONTINUE), _said_clearly(job):
        run: Run | None = None
        refused: Exception | None = None
        try:
            run = _begun(job, outbox, stack, progress=progress, force=force) if is_first else None
        except Exception as exc:
            refused = exc
        goes_on = job.ranks.everybodys(run is not None)[0]  # the others must not wait for a rank that has nothing to do
        if refused is not None:
            raise refused
        if not goes_on:
            return _complete(job.plan.write.target) if is_first else None
        reader = stack.enter_context(Reader(job.plan.exact.stamps))
        loader = Loader(reader, job.engine, job.device)
        source = Source(job.plan.exact, loader)
        stack.callback(source.close)
        work = _Work(job, run, outbox, loader, source)
        try:
            reports = work.layers()
        finally:
            work.stop()
        if run is None:
            return None
        report = _report(job, reports, work.resumed, time.monotonic() - started)
        write_report(report, job.plan.write.target)
        run.seal()
        work.state.clear()
        return Outcome(job.plan.write.target, report, complete_before=False)


def _begun(job: Job, outbox: Outbox, stack: ExitStack, *, progress: bool, force: bool) -> Run | None:
    """The first rank's hold on the target, until ``stack`` closes; None where it is complete."""
    plan = job.plan.write
    state = inspect_target(plan, force=force)
    if state.complete:
        return None
    require_disk(job, state.files, force=force)
    return stack.enter_context(open_run(plan, engine=job.engine, progress=progress, force=force, promises=outbox))


def _complete(target: Path) -> Outcome:
    """Of an earlier run, which may have been killed when all but its state's removal was done."""
    if (target / STATE_DIR).exists():
        with suppress(OSError, WriteError), only_writer(target):
            State(target).clear()
    try:
        return Outcome(target, QuantizationReport.load(target / JSON_NAME), complete_before=True)
    except (FormatError, MissingFileError):
        return Outcome(target, None, complete_before=True)


@contextmanager
def _said_clearly(job: Job) -> Iterator[None]:
    target = job.plan.write.target
    try:
        yield
    except KeyboardInterrupt as exc:
        raise Interrupted("stopped; finished layers are kept", where=target, fix=CONTINUE) from exc
    except torch.cuda.OutOfMemoryError as exc:
        raise SpaceError(
            "a GPU's memory ran out",
            where="--gpu-memory",
            found=f"{human_bytes(torch.cuda.mem_get_info()[0])} free",
            fix=f"Name a smaller --gpu-memory, so that more is kept in host memory. {CONTINUE}",
        ) from exc


class _Work:
    """One run of a job on this rank; ``run`` is the writer's, on the first rank."""

    def __init__(self, job: Job, run: Run | None, outbox: Outbox, loader: Loader, source: Source) -> None:
        self.job, self.run, self.outbox, self.loader, self.source = job, run, outbox, loader, source
        self.plan, self.ranks, self.device = job.plan, job.ranks, job.device
        self.dtype = torch.bfloat16 if job.device.type == "cuda" else torch.float32
        self.state = State(job.plan.write.target)
        self.resumed: list[int] = []
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
        self._writing: list[Future[None]] = []

    def stop(self) -> None:
        """Nothing more comes: whoever still writes stops."""
        self.outbox.close()
        if self.run is not None:
            self.run.stop.set()
        end_pool(self._pool)

    def layers(self) -> list[LayerReport]:
        """All layers; their reports, those of earlier runs among them."""
        plan, last = self.plan, max(map(_layer_of, self.plan.shapes))
        done = self._done_layers()
        if self.run is not None:
            if not done:
                self.state.clear()
            self._writing += [self._pool.submit(self.run.write_file, file) for file in plan.plain_files]
        first = next((layer for layer in range(last + 1) if plan.shapes_in(layer) and layer not in done), last + 1)
        reports = {layer: report for layer in range(first) if (report := self.state.report(layer)) is not None}
        self.resumed = [layer for layer in range(first) if plan.shapes_in(layer)]
        if first <= last:
            reports |= {report.layer: report for report in self._from(first, last)}
        for future in self._writing:
            future.result()
        return [reports[layer] for layer in sorted(reports)]

    def _done_layers(self) -> frozenset[int]:
        """Layers that an earlier run has written."""
        found: frozenset[int] = frozenset()
        if self.run is not None:
            numbers = set(map(_layer_of, self.plan.shapes))
            found = frozenset(layer for layer in numbers if self.run.is_done(self.plan.file_of(layer)))
        return self.ranks.everybodys(found)[0]

    def _from(self, first: int, last: int) -> list[LayerReport]:
        calibrated = self.job.calibrated
        if calibrated is None:
            return [self._round(layer) for layer in range(first, last + 1) if self.plan.shapes_in(layer)]
        activations, begin = self._activations(calibrated, first)
        positions = torch.arange(activations.seq_len, device=self.device)
        rotation = Rope.of(self.plan.arch).at(positions)
        reports = []
        for layer in range(begin, last + 1):
            report = self._layer(layer, activations, rotation, quantized=layer < first, forward=layer < last)
            if layer >= first or not self.plan.shapes_in(layer):
                reports.append(report)
            if first <= layer < last:
                self._keep(layer, activations, calibrated.sequences.start)
        return reports

    # --- activations --------------------------------------------------------------------------------------------------

    def _activations(self, calibrated: Calibrated, first: int) -> tuple[Activations, int]:
        """Hidden states before the layer that is returned: from the last snapshot, or the embedding's."""
        tokens, mine = calibrated.data.tokens, calibrated.sequences
        place = self.device if calibrated.memory.on_device else torch.device("cpu")
        shape = (len(mine), tokens.shape[1], self.plan.arch.hidden_size)
        hidden = torch.empty(shape, dtype=self.dtype, device=place, pin_memory=place != self.device)
        activations = Activations(hidden, self.device, tokens.size)
        kept = None
        if self.ranks.rank == 0:
            kept = self.state.latest_snapshot(first, self.job.snapshot_bytes)
        kept = self.ranks.everybodys(kept)[0]
        if kept is not None:
            self.state.read_part(kept, hidden, mine.start)
            return activations, kept + 1
        self._tell("embedding")
        table = self.loader.load(self.plan.plain["model.embed_tokens.weight"], self.dtype)
        ids = torch.from_numpy(tokens[mine.start : mine.stop]).to(self.device, torch.int64)
        for start in range(0, len(mine), sequences_a_batch(shape[1])):
            part = slice(start, start + sequences_a_batch(shape[1]))
            hidden[part] = table[ids[part]].to(place)
        return activations, 0

    def _keep(self, layer: int, activations: Activations, first_sequence: int) -> None:
        """Write the activations down, every so many layers."""
        every = self.job.snapshot_layers
        if not every or (layer + 1) % every:
            return
        self._tell(f"layer {layer}: keeping activations")
        if self.ranks.rank == 0:
            self.state.begin_snapshot(layer, self.job.snapshot_bytes)
        self.ranks.wait()
        self.state.write_part(layer, activations.hidden, first_sequence)
        self.ranks.wait()
        if self.ranks.rank == 0:
            self.state.finish_snapshot(layer)

    # --- layers -------------------------------------------------------------------------------------------------------

    def _layer(
        self, index: int, activations: Activations, rotation: Rotation, *, quantized: bool, forward: bool
    ) -> LayerReport:
        """Take the activations through a layer: one that is ``quantized`` already, or one that is to be."""
        started, clock = time.monotonic(), Clock(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        shapes = {} if quantized else self.plan.shapes_in(index)
        quantizer = self._quantizer(shapes, clock)
        if quantized:
            self._load_quantized(index, quantizer.weights)
        layer = Layer(
            self.plan.arch, index, quantizer.weights, Rope.of(self.plan.arch), quantizer.observe if shapes else None
        )
        writing = self._begin(index) if shapes else None
        self._tell(f"layer {index}: attention")
        quantizer.attention(layer, activations, rotation)
        self._tell(f"layer {index}: {'experts' if shapes else 'forward'}")
        quantizer.feed_forward(layer, activations, forward=forward)
        return self._finish(index, quantizer, clock, started, writing)

    def _round(self, index: int) -> LayerReport:
        """Round a layer's weights to nearest, without activations; the first rank does it."""
        started, clock = time.monotonic(), Clock(self.device)
        quantizer = self._quantizer(self.plan.shapes_in(index), clock)
        writing = self._begin(index)
        self._tell(f"layer {index}")
        if self.ranks.rank == 0:
            quantizer.round()
        return self._finish(index, quantizer, clock, started, writing)

    def _quantizer(self, shapes: Mapping[str, tuple[int, int]], clock: Clock) -> LayerQuantizer:
        kept = 0 if self.job.calibrated is None else self.job.calibrated.memory.kept
        weights = LayerWeights(self._load_plain, self.device, self.dtype, kept)
        solver = Solver(self.plan.settings, clock)
        return LayerQuantizer(
            weights, self.source.get, self.source.upcoming, shapes, solver, self.ranks, clock, self.outbox
        )

    def _load_plain(self, name: str) -> torch.Tensor:
        dtype = torch.float32 if name.endswith(ROUTER) else self.dtype
        return self.loader.load(self.plan.plain[name], dtype)

    def _load_quantized(self, index: int, weights: LayerWeights) -> None:
        """The integers of a layer that an earlier run has written."""
        names = self.plan.shapes_in(index)
        if not names:
            return
        path = self.plan.write.target / self.plan.file_of(index).name
        stored = stored_tensors(path, read_header(path))
        for name in names:
            module = name.removesuffix(".weight")
            parts = {part: self.loader.raw(stored[f"{module}.{part}"]) for part in PARTS}
            weights.replace(name, Packed(**parts, bits=self.plan.settings.bits))

    def _begin(self, index: int) -> Future[None] | None:
        """Have the layer's file written while its tensors are made."""
        if self.run is None:
            return None
        return self._pool.submit(self.run.write_file, self.plan.file_of(index))

    def _finish(
        self, index: int, quantizer: LayerQuantizer, clock: Clock, started: float, writing: Future[None] | None
    ) -> LayerReport:
        """Wait until the layer is written, and say how it went."""
        found = [matrix for part in self.ranks.everybodys(quantizer.reports(index)) for matrix in part]
        order = {name.removesuffix(".weight"): place for place, name in enumerate(self.plan.shapes)}
        report = LayerReport(
            layer=index,
            matrices=tuple(sorted(found, key=lambda matrix: order[matrix.name])),
            stage_s=clock.seconds(),
            wall_s=time.monotonic() - started,
            gpu_peak_bytes=torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0,
            host_peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
            tokens_by_expert=quantizer.tokens_by_expert,
        )
        for plain in self._writing:
            if plain.done():
                plain.result()  # a disk that is full is better known now than after the last layer
        if self.run is None:
            return report
        if writing is None:
            if not self.plan.shapes_in(index):  # else an earlier run quantized this layer, and kept what it found
                self.state.keep_report(report)
            return report
        self.state.keep_report(report)
        self.outbox.allow(self.plan.file_of(index).name)  # no layer counts as done without its report
        waited = time.monotonic()
        writing.result()
        report.stage_s["write"] = time.monotonic() - waited
        self.state.keep_report(report)
        return report

    def _tell(self, what: str) -> None:
        if self.run is not None:
            self.run.bar.note(what)


def _layer_of(name: str) -> int:
    return int(name.split(".", 3)[2])


def _report(job: Job, layers: list[LayerReport], resumed: list[int], wall_s: float) -> QuantizationReport:
    settings, plan = job.plan.settings, job.plan
    calibration = None if job.calibrated is None else job.calibrated.data
    on_gpu = job.device.type == "cuda"
    return QuantizationReport(
        title=job.title,
        source=str(plan.exact.root),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        versions={"weightkit": weightkit.__version__, "torch": torch.__version__, "triton": triton.__version__},
        device=torch.cuda.get_device_name(job.device) if on_gpu else "cpu",
        gpus=job.ranks.size if on_gpu else 0,
        settings=QuantizationSettings(
            method=settings.method,  # type: ignore[arg-type]
            bits=settings.bits,
            group_size=settings.group_size,
            scope=settings.scope,
            order={"act": "activation", "none": "natural"}[settings.order],
            damping=settings.damping,
            scale_search=settings.scales,
            mtp=settings.mtp,
            seed=0 if calibration is None else calibration.seed,
        ),
        calibration=None if calibration is None else _described(calibration),
        layers=tuple(layers),
        sizes=Sizes(plan.source_bytes, plan.write.bytes_written, {}),
        wall_s=wall_s,
        resumed_layers=tuple(resumed),
    )


def _described(calibration: Calibration) -> CalibrationReport:
    samples, seq_len = calibration.tokens.shape
    return CalibrationReport(calibration.source, calibration.sha256, samples, seq_len, calibration.tokens.size)


def _figures(report: QuantizationReport, target: Path) -> dict[str, object]:
    errors = [matrix.error for matrix in report.matrices if matrix.error is not None]
    rounding = [matrix.rounding_error for matrix in report.matrices if matrix.rounding_error is not None]
    return {
        "report": str(target / JSON_NAME),
        "matrices": len(report.matrices),
        "mean_error": sum(errors) / len(errors) if errors else None,
        "mean_rounding_error": sum(rounding) / len(rounding) if rounding else None,
        "rounded": len(report.rounded),
        "starved": len(report.starved),
        "warnings": list(report.warnings),
        "output_bytes": report.sizes.output_bytes,
        "resumed_layers": list(report.resumed_layers),
        "wall_s": report.wall_s,
    }
