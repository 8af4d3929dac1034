"""What ``int4_gemm`` and ``fp8_gemm`` share on the host: shapes of tiles, parts of a sum, a launch's list of jobs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import torch
import triton

from weightkit.errors import PlanError

KINDS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
"""Dtypes of activations, and so of results."""

BITS_DTYPE = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}

DEQUANT_TOKENS = 1024
"""From so many tokens on a weight is dequantized to memory first: the product costs many times as much."""

PROGRAMS_A_PROCESSOR = 4
"""Programs of a small tile that a multiprocessor holds at a time, and so the number that a launch aims at; of a tile of
many tokens, fewer, whose parts of a sum are also larger."""

STEPS_A_PROGRAM = 4
"""A program that takes fewer steps than this along K spends its time on filling its pipeline."""

MOST_SPLITS = 64
_INTERPRETED_PROCESSORS = 4


@dataclass(frozen=True)
class TileConfig:
    """What one program does. Another config takes sums in another order, and so gives other last bits.

    Attributes:
        tokens: tokens of a tile, a power of two, at least 16 for the tensor cores.
        columns: outputs of a tile, a power of two; 64 or more keep Hopper's tensor cores busy. FP8: up to 128.
        depth: what a step takes along K, a power of two from 16: rows of words (int4), or inputs (FP8: up to 128).
        splits: programs that share K; 0: as many as fill the device.
        num_warps: warps a program.
        num_stages: steps whose loads are under way at a time, where so many fit the device.
        weights_left: weights are the left operand of a tile's product; Hopper's larger instructions want it so.
    """

    tokens: int = 16
    columns: int = 64
    depth: int = 32
    splits: int = 0
    num_warps: int = 4
    num_stages: int = 4
    weights_left: bool = False


@dataclass(frozen=True)
class Split:
    """K cut into ``parts`` of ``steps`` steps each; the last may have fewer, none has none."""

    parts: int
    steps: int


def split_of(config: TileConfig, tiles: int, steps: int, device: torch.device) -> Split:
    """How to share ``steps`` along K where ``tiles`` programs work side by side anyhow."""
    wanted = config.splits
    if not wanted:
        programs = max(1, min(PROGRAMS_A_PROCESSOR, 128 // config.tokens)) * _processors(device)
        wanted = min(programs // max(tiles, 1), steps // STEPS_A_PROGRAM)
    each = triton.cdiv(steps, max(1, min(wanted, MOST_SPLITS, steps)))
    return Split(triton.cdiv(steps, each), each)


def config_of_jobs(
    config: TileConfig, outputs: int, steps: int, counts: Sequence[int], device: torch.device
) -> TileConfig:
    """``config`` with the splits that one launch of all these jobs takes.

    A launch chooses its splits by all of its jobs. With this config a job's bits are the same whichever of the others
    share its launch.

    Args:
        outputs: N of each weight.
        steps: that ``config`` takes along K.
        counts: rows of each job.
    """
    tiles = triton.cdiv(outputs, config.columns) * sum(triton.cdiv(count, config.tokens) for count in counts)
    return replace(config, splits=split_of(config, tiles, steps, device).parts)


def stages_of(config: TileConfig, step_bytes: int, device: torch.device, beside_bytes: int = 0) -> int:
    """``config.num_stages``, or as many as fit the device's shared memory where a step takes ``step_bytes`` of it, and
    all of them together ``beside_bytes`` more."""
    return max(1, min(config.num_stages, (_shared_bytes(device) - beside_bytes) // max(step_bytes, 1)))


@lru_cache(maxsize=16)
def _shared_bytes(device: torch.device) -> int:
    """What a program may have: 227 KiB on Hopper, 163 on an A100, 99 on the smaller GPUs of both families."""
    if device.type != "cuda":
        return 1 << 30
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 99 << 10))


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """The device that kernels over ``tensor`` are launched on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def check_rows(x: torch.Tensor, inputs: int) -> None:
    """Refuse activations that are not [..., ``inputs``] of a dtype that the kernels take."""
    if x.dtype not in KINDS or x.dim() < 1 or x.shape[-1] != inputs:
        raise PlanError(
            "activations that do not fit the weight",
            expected=f"{', '.join(map(str, KINDS))}, [..., {inputs}]",
            found=f"{x.dtype} {list(x.shape)}",
        )


def check_place(operands: Sequence[torch.Tensor]) -> None:
    """Refuse weights that are not contiguous, and operands on more than one device. The first is x, of any strides."""
    if not all(tensor.is_contiguous() for tensor in operands[1:]):
        raise PlanError("the kernel needs contiguous weights and scales", fix="Call .contiguous() first.")
    if any(tensor.device != operands[0].device for tensor in operands[1:]):
        devices = sorted({str(tensor.device) for tensor in operands})
        raise PlanError("operands of a product lie on different devices", found=", ".join(devices))


def check_jobs(rows: int, weights: int, scales: int, starts: Sequence[int] | None, counts: Sequence[int]) -> list[int]:
    """The first row of each job: ``starts``, or one job's rows after the other's. Refuse what does not fit."""
    first = list(starts) if starts is not None else [0, *accumulate(counts)][:-1]
    if not weights == scales == len(first) == len(counts):
        raise PlanError(
            "experts need a scale, a start and a count for each weight",
            expected=f"{weights} of each",
            found=f"{scales} scales, {len(first)} starts, {len(counts)} counts",
        )
    for number, (start, count) in enumerate(zip(first, counts, strict=True)):
        if start < 0 or count < 0 or start + count > rows:
            raise PlanError(
                f"expert {number} of the list is given rows that there are not",
                expected=f"rows within 0 to {rows}",
                found=f"{count} from {start}",
            )
    return first


def job_table(
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    starts: Sequence[int],
    counts: Sequence[int],
    tokens: int,
) -> torch.Tensor:
    """I64 [jobs, 5] on the weights' device: addresses of weight and scales, first row of x, first row of the output,
    rows (at most ``tokens``). Outputs follow each other in the order of the list."""
    records = []
    for weight, scale, start, first, count in zip(
        weights, scales, starts, accumulate(counts, initial=0), counts, strict=False
    ):
        records += [
            (weight.data_ptr(), scale.data_ptr(), start + row, first + row, min(tokens, count - row))
            for row in range(0, count, tokens)
        ]
    table = torch.tensor(records, dtype=torch.int64)
    device = weights[0].device
    # Through pinned memory, or the host would wait for all that the stream still has to do.
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def aligned(weights: Sequence[torch.Tensor], scales: Sequence[torch.Tensor]) -> bool:
    """Whether all start on 16 bytes, so that threads may load vectors."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in (*weights, *scales))
