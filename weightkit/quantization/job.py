"""A quantization that was asked for: planned, its calibration read, its needs held against the machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import weightkit
from weightkit.checkpoint import Checkpoint
from weightkit.compute import Engine, open_engine
from weightkit.errors import CalibrationError, SpaceError, UnsupportedError
from weightkit.generation.tokenizer import Tokenizer
from weightkit.layouts.declare import architecture_of
from weightkit.machine import available_memory_bytes, free_disk_bytes
from weightkit.quantization.activations import sequences_a_batch
from weightkit.quantization.calibration import Calibration, load_calibration
from weightkit.quantization.memory import MemoryPlan, plan_memory
from weightkit.quantization.plan import QuantizationPlan, plan_quantization
from weightkit.quantization.settings import Settings
from weightkit.quantization.state import State
from weightkit.quantization.token_arrays import unknown_id
from weightkit.quantization.trial import try_solver
from weightkit.ranks import World
from weightkit.ranks.ranks import Ranks
from weightkit.remote.address import title_of
from weightkit.units import counted, exact_bytes, human_bytes
from weightkit.writer import Summary, summarize
from weightkit.writer.journal import Progress
from weightkit.writer.target import require_space, space_needed

SNAPSHOT_LAYERS = 8
"""Activations go to the disk after so many layers, and a stopped run begins there."""


@dataclass(frozen=True)
class Calibrated:
    """What goes through the model: ``sequences`` of the calibration lie on this rank, as ``memory`` says."""

    data: Calibration
    memory: MemoryPlan
    sequences: range


@dataclass(frozen=True)
class Job:
    """What ``carry_out`` takes.

    Attributes:
        plan: what is made and written.
        calibrated: None for rounding to nearest.
        device, engine, ranks: where is computed, and with whom.
        snapshot_layers: activations go to the disk after so many layers; 0 for never.
        title: the model's name.
    """

    plan: QuantizationPlan
    calibrated: Calibrated | None
    device: torch.device
    engine: Engine
    ranks: Ranks
    snapshot_layers: int
    title: str

    @property
    def snapshot_bytes(self) -> int:
        """Of the activations of all ranks on the disk."""
        if self.calibrated is None:
            return 0
        itemsize = 2 if self.device.type == "cuda" else 4
        return self.calibrated.data.tokens.size * self.plan.arch.hidden_size * itemsize


def prepare(
    checkpoint: Checkpoint,
    target: Path,
    settings: Settings,
    *,
    calibration: Path | Calibration | None = None,
    samples: int = 512,
    seq_len: int = 4096,
    seed: int = 0,
    device: str = "auto",
    gpu_memory: int | None = None,
    host_memory: int | None = None,
    snapshot_layers: int = SNAPSHOT_LAYERS,
    title: str | None = None,
) -> Job:
    """Read the calibration, plan, and refuse what the machine has no room for, and a GPU that computes wrongly.
    Arguments as ``quantize``."""
    where = Ranks.device(device)
    ranks = Ranks.join(where)
    arch = architecture_of(checkpoint)
    tokens = None
    if settings.method == "gptq":
        tokens = _calibration(checkpoint, calibration, samples, seq_len, seed)
        limit = arch.index_topk
        if limit is not None and tokens.tokens.shape[1] > limit:
            raise UnsupportedError(
                "sparse attention, which weightkit does not compute; it is dense only up to index_topk tokens",
                where="--seq-len",
                expected=f"at most {limit}",
                found=tokens.tokens.shape[1],
            )
    digest = "none" if tokens is None else tokens.sha256
    plan = plan_quantization(checkpoint, target, settings, calibration=digest, version=weightkit.__version__)
    calibrated = None
    if tokens is not None:
        count, length = tokens.tokens.shape
        sequences = _share(count, length, ranks)
        if host_memory is None:
            host_memory = available_memory_bytes() // World.of_environment().local_size
        memory = plan_memory(
            plan,
            sequences=len(sequences),
            seq_len=length,
            device=where,
            gpu_memory=gpu_memory,
            host_memory=host_memory,
            ranks=ranks.size,
            all_sequences=count,
        )
        calibrated = Calibrated(tokens, memory, sequences)
    name = title or title_of(checkpoint.root.resolve())
    return Job(plan, calibrated, where, _tried_engine(where, plan), ranks, snapshot_layers, name)


def _tried_engine(device: torch.device, plan: QuantizationPlan) -> Engine:
    """The engine of the device; of a GPU once it has computed what the plan takes, on made-up contents, as the CPU
    does."""
    if device.type == "cpu":
        return open_engine("cpu")
    exact = [tensor for name, tensor in plan.exact.tensors.items() if name in plan.shapes]
    plain = [tensor for name, tensor in plan.plain.tensors.items() if name not in plan.shapes]
    engine = open_engine("cuda", [*exact, *plain])
    try_solver(plan.settings, device)
    torch.cuda.empty_cache()  # of the trial
    return engine


def _calibration(
    checkpoint: Checkpoint, calibration: Path | Calibration | None, samples: int, seq_len: int, seed: int
) -> Calibration:
    if isinstance(calibration, Calibration):
        return _of_this_model(calibration, architecture_of(checkpoint).vocab_size)
    if calibration is None:
        raise CalibrationError(
            "GPTQ needs text to calibrate with",
            where="--calibration",
            fix="Name a file of text, JSON lines or token ids, or with --model the model that this is, for the text of"
            " its manifest; or use --method rtn, which rounds without any.",
        )
    arch = architecture_of(checkpoint)
    tokenizer = None
    if calibration.suffix not in (".npy", ".safetensors"):
        tokenizer = Tokenizer.from_side_files(checkpoint.side_files, checkpoint.root)
    return load_calibration(
        calibration,
        tokenizer,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        vocab_size=arch.vocab_size,
        max_position_embeddings=arch.max_position_embeddings,
    )


def _of_this_model(calibration: Calibration, vocab_size: int) -> Calibration:
    unknown = calibration.tokens[(calibration.tokens < 0) | (calibration.tokens >= vocab_size)]
    if unknown.size:
        raise unknown_id(int(unknown[0]), vocab_size, calibration.source)
    return calibration


def _share(sequences: int, seq_len: int, ranks: Ranks) -> range:
    """This rank's sequences: whole batches, so that what goes through a layer at once does not depend on the ranks.

    Raises:
        SpaceError: fewer batches than ranks.
    """
    step = sequences_a_batch(seq_len)
    batches = -(-sequences // step)
    if batches < ranks.size:
        raise SpaceError(
            "fewer batches of calibration tokens than ranks",
            where="torchrun",
            expected=f"at most {batches} ranks",
            found=ranks.size,
            fix="Use more --samples, or fewer ranks.",
        )
    mine = ranks.share_of(batches)
    return range(mine.start * step, min(mine.stop * step, sequences))


@dataclass(frozen=True)
class Cost:
    """What a job will take. ``source_bytes``, of what ``write`` reads, are the weights that integers are made from;
    sizes are bytes, ``gpu_bytes`` and ``host_bytes`` of a rank."""

    write: Summary
    source_bytes: int
    ranks: int
    device: str
    samples: int = 0
    seq_len: int = 0
    activations_bytes: int = 0
    activations_on: str = ""
    gpu_bytes: int = 0
    host_bytes: int = 0
    snapshot_bytes: int = 0

    def to_json(self) -> dict[str, object]:
        """Plain values by field."""
        return asdict(self)

    def render(self) -> str:
        """Aligned lines for a terminal."""
        rows = {
            "quantized": f"{human_bytes(self.source_bytes)} of weights on {self.device}, {counted(self.ranks, 'rank')}"
        }
        if self.samples:
            rows["calibrated"] = f"{self.samples:,} x {self.seq_len:,} tokens, {self.samples * self.seq_len:,} in all"
            rows["hidden"] = f"{human_bytes(self.activations_bytes)} of activations a rank, {self.activations_on}"
            if self.gpu_bytes:
                rows["GPU"] = f"{human_bytes(self.gpu_bytes)} at most"
            rows["host"] = f"{human_bytes(self.host_bytes)} at most, beside the buffers above"
        if self.snapshot_bytes:
            rows["snapshot"] = f"{human_bytes(self.snapshot_bytes)} of disk while it runs, for a resume"
        return "\n".join([self.write.render(), *(f"{key:<10} {value}" for key, value in rows.items())])


def describe(job: Job, *, force: bool = False) -> Cost:
    """The cost of a job as things stand. Raises ``TargetError`` where it could not be carried out."""
    write = summarize(job.plan.write, jobs=1, force=force)
    ranks, device = job.ranks.size, job.engine.name
    source_bytes = job.plan.quantized_source_bytes
    write = replace(write, read_bytes=write.read_bytes + source_bytes)
    if job.calibrated is None:
        return Cost(write, source_bytes, ranks, device)
    memory, (samples, seq_len) = job.calibrated.memory, job.calibrated.data.tokens.shape
    return Cost(
        write,
        source_bytes,
        ranks,
        device,
        samples=samples,
        seq_len=seq_len,
        activations_bytes=memory.activations,
        activations_on="on the device" if memory.on_device else "in host memory",
        gpu_bytes=memory.working + memory.activations * memory.on_device if job.device.type == "cuda" else 0,
        host_bytes=memory.host,
        snapshot_bytes=2 * job.snapshot_bytes if job.snapshot_layers else 0,
    )


def require_disk(job: Job, files: Mapping[str, Progress], *, force: bool) -> None:
    """Raise ``SpaceError`` where the disk has no room for what is left to write, by the progress of ``files``, and for
    kept activations beside it."""
    plan = job.plan.write
    require_space(plan, files, force=force)
    if not job.snapshot_layers:
        return
    needed = space_needed(plan, files, force=force) + 2 * job.snapshot_bytes - State(plan.target).snapshot_bytes
    free = free_disk_bytes(plan.target)
    if needed > free:
        raise SpaceError(
            "not enough free space for the activations that are kept for a resume",
            where=plan.target,
            expected=exact_bytes(needed),
            found=exact_bytes(free),
            fix="Free some, or use --snapshot-layers 0: a stopped run then goes through finished layers again.",
        )
