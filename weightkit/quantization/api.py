"""Quantize in one call, for notebooks."""

from __future__ import annotations

from pathlib import Path

from weightkit.checkpoint import Checkpoint
from weightkit.layouts import open_checkpoint
from weightkit.quantization.calibration import Calibration
from weightkit.quantization.job import SNAPSHOT_LAYERS, prepare
from weightkit.quantization.report import QuantizationReport
from weightkit.quantization.run import carry_out
from weightkit.quantization.settings import Settings


def quantize(
    source: str | Path | Checkpoint,
    target: str | Path,
    settings: Settings | None = None,
    *,
    calibration: str | Path | Calibration | None = None,
    samples: int = 512,
    seq_len: int = 4096,
    seed: int = 0,
    device: str = "auto",
    gpu_memory: int | None = None,
    host_memory: int | None = None,
    snapshot_layers: int = SNAPSHOT_LAYERS,
    progress: bool = True,
    force: bool = False,
) -> QuantizationReport | None:
    """Quantize a checkpoint's experts, or all its linear maps, to integers in the AutoGPTQ format.

    Args:
        source: FP8 or BF16, opened or a path.
        target: a folder; made where it is not there. A stopped quantization into it is continued.
        settings: bits, groups, scope, method; the defaults are int4 in groups of 128, experts only, by GPTQ.
        calibration: a file of text, JSON lines or token ids (see ``load_calibration``); needed for GPTQ.
        samples, seq_len, seed: how many sequences of how many tokens are drawn from it, and how.
        device: ``auto``, ``cuda`` or ``cpu``.
        gpu_memory, host_memory: most that may be used, in bytes; None for what is free.
        snapshot_layers: activations go to the disk after so many layers; 0 for never.
        progress: show a bar.
        force: replace what an earlier run left in the target.

    Returns: the report, which lies in the target too: that of the run that completed it, None where it is gone. Under
        torchrun only on the first rank.

    Raises: as ``prepare`` and ``carry_out``.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    job = prepare(
        checkpoint,
        Path(target),
        settings or Settings(),
        calibration=Path(calibration) if isinstance(calibration, str) else calibration,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        device=device,
        gpu_memory=gpu_memory,
        host_memory=host_memory,
        snapshot_layers=snapshot_layers,
    )
    outcome = carry_out(job, progress=progress, force=force)
    return None if outcome is None else outcome.report
