"""Products with block-scaled FP8 weights as they are stored.

``fp8_linear(x, codes, scale)`` is ``F.linear(x, w)``, where ``w`` is what ``cast --to bf16`` makes of the weight: each
``float32(E4M3) * scale[row // 128, column // 128]``, rounded once to nearest even to BF16, made in registers and never
in memory. The order of the sum over K alone is our own, in F32; with the same operands, config and device it is the
same in every run (no atomics). Codes are decoded by integer arithmetic, on any GPU, or by one instruction where there
is one (sm_89 and later), to the same bits. From ``DEQUANT_TOKENS`` tokens on the weight is dequantized to memory first.
"""

# Triton compiles functions that cannot carry annotations; everything else in this file does.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn.functional import linear

from weightkit.errors import PlanError, ScaleError
from weightkit.kernels import fp8_dequant
from weightkit.kernels.conversions import decode_e4m3, encode, interpreted, nearest_bf16
from weightkit.kernels.gemm_plan import (
    BITS_DTYPE,
    DEQUANT_TOKENS,
    KINDS,
    TileConfig,
    aligned,
    check_jobs,
    check_place,
    check_rows,
    config_of_jobs,
    job_table,
    on_device,
    split_of,
    stages_of,
)
from weightkit.kernels.partial_sums import sum_parts

BLOCK = 128
"""Rows and columns of a weight that share a scale."""

FP8_CAPABILITY = (8, 9)
"""The first GPUs that have E4M3 among their conversions."""


def choose_config(tokens: int) -> TileConfig:
    """The config for tiles of up to ``tokens`` tokens."""
    if tokens <= 32:
        return TileConfig(max(16, triton.next_power_of_2(tokens)), columns=64, depth=128, num_stages=4)
    if tokens <= 64:
        return TileConfig(64, columns=64, depth=128, num_stages=4, weights_left=True)
    return TileConfig(128, columns=128, depth=64, num_warps=8, num_stages=3, weights_left=True)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "total_rows", "steps", "scale_columns"])
def _matrix_kernel(
    x, codes, scales, out, table, rows, total_rows, steps, N, K, scale_columns,
    TABLE: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr,
    KIND: tl.constexpr, OUT_KIND: tl.constexpr, HARDWARE: tl.constexpr, NATIVE: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
    LEFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [., K], codes [N, K] uint8, scales [., scale_columns] -> out [splits, total_rows, N].

    Programs are (tile, split); without a table neighbours differ in tokens alone, so that they find the codes in L2.
    With one, a tile of tokens is a job: addresses of codes and scales, first row of x, first row of the output, rows. A
    tile lies in one row of scales, a step in one column.

    Tensor cores take weights from the registers that they are made in, on either side where a tile has few tokens, and
    from 64 on (Hopper's) on the left alone.

    steps: what a split takes, along K; STEPS, the same for the interpreter, some of which loop over no other number.
    NATIVE: the device converts E4M3. WHOLE: K is just what the splits take.
    """
    column_tiles = (N + COLUMNS - 1) // COLUMNS
    token_tiles = (rows + TOKENS - 1) // TOKENS
    split = tl.program_id(1)
    if TABLE:
        record = table + (tl.program_id(0) // column_tiles) * 5
        column_tile = tl.program_id(0) % column_tiles
        codes = tl.load(record).to(tl.pointer_type(tl.uint8))
        scales = tl.load(record + 1).to(tl.pointer_type(tl.float32))
        if ALIGNED:  # Triton learns this of arguments by itself, of loaded values it must be told
            codes = tl.multiple_of(codes, 16)
            scales = tl.multiple_of(scales, 16)
        first_x, first_out, count = tl.load(record + 2), tl.load(record + 3), tl.load(record + 4).to(tl.int32)
    else:
        column_tile = tl.program_id(0) // token_tiles
        token_tile = tl.program_id(0) % token_tiles
        first_x = token_tile.to(tl.int64) * TOKENS
        first_out = first_x
        count = rows - token_tile * TOKENS

    flat_n = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    if LEFT:  # outputs down, tokens across
        n = flat_n[:, None]
        token = tl.arange(0, TOKENS)[None, :]
        k = tl.arange(0, DEPTH)[None, :]
        k_of_x = tl.arange(0, DEPTH)[:, None]
        total = tl.full((COLUMNS, TOKENS), 0.0, tl.float32)
    else:
        n = flat_n[None, :]
        token = tl.arange(0, TOKENS)[:, None]
        k = tl.arange(0, DEPTH)[:, None]
        k_of_x = tl.arange(0, DEPTH)[None, :]
        total = tl.full((TOKENS, COLUMNS), 0.0, tl.float32)
    inputs = x + (first_x + token) * K + k_of_x
    weights = codes + n.to(tl.int64) * K + k
    factors = scales + (flat_n // BLOCK) * scale_columns  # flat as it is loaded best
    known = n < N
    present = token < count

    for step in tl.range(steps if STEPS == 0 else STEPS, num_stages=STAGES):
        first = (split * steps + step) * DEPTH
        if WHOLE:
            code = tl.load(weights + first, mask=known, other=0)
            values = tl.load(inputs + first, mask=present, other=0)
            factor = tl.load(factors + first // BLOCK, mask=flat_n < N, other=0.0)
        else:
            code = tl.load(weights + first, mask=known & (k < K - first), other=0)
            values = tl.load(inputs + first, mask=present & (k_of_x < K - first), other=0)
            factor = tl.load(factors + first // BLOCK, mask=(flat_n < N) & (first < K), other=0.0)
        factor = factor[:, None] if LEFT else factor[None, :]
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32) if NATIVE else decode_e4m3(code)
        if not HARDWARE:
            values = values.to(tl.float32)
        weight = nearest_bf16(value * factor, KIND, HARDWARE)
        if LEFT:
            total = tl.dot(weight, values, total, input_precision="ieee")
        else:
            total = tl.dot(values, weight, total, input_precision="ieee")

    at = out + (split.to(tl.int64) * total_rows + first_out + token) * N + n
    tl.store(at, encode(total, OUT_KIND, HARDWARE), mask=present & known)


# --- launchers --------------------------------------------------------------------------------------------------------


def fp8_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    *,
    config: TileConfig | None = None,
) -> torch.Tensor:
    """``F.linear(x, w)`` with a block-scaled FP8 weight.

    Args:
        x: [..., K], BF16, F16 or F32. Weights are rounded to BF16 and then taken in x's dtype.
        codes: [N, K], F8_E4M3 or uint8.
        scale: F32 [ceil(N / 128), ceil(K / 128)], ``weight_scale_inv``.
        config: shape of the tiles, which then serve for any number of tokens. By default ``choose_config`` finds one,
            and from ``DEQUANT_TOKENS`` tokens on the weight is dequantized to memory first, 2 * N * K bytes.

    Returns:
        [..., N] in x's dtype, on the current stream. On a CPU without Triton's interpreter: the reference's.

    Raises:
        ScaleError: a scale that does not fit.
        PlanError: any other dtype, shape, layout or device that cannot be.
    """
    flat = _checked(x, [codes], [scale], config)
    if not flat.is_cuda and not interpreted():
        found = fp8_linear_reference(flat, codes, scale)
    elif config is None and len(flat) >= DEQUANT_TOKENS and flat.is_cuda:
        found = linear(flat, fp8_dequant.dequant(codes, scale, torch.bfloat16).to(x.dtype))
    else:
        found = _launch(flat, [codes], [scale], None, None, config)
    return found.view(*x.shape[:-1], len(codes))


def fp8_experts(
    x: torch.Tensor,
    codes: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    counts: Sequence[int],
    *,
    starts: Sequence[int] | None = None,
    config: TileConfig | None = None,
) -> torch.Tensor:
    """Products with several weights of one shape, each with some of x's rows, in one launch (or two).

    Experts' gate and up projections are one such list: the gates, the ups, and each expert's start twice.

    Args:
        x: [rows, K], the tokens sorted by expert.
        codes, scales: of each expert, as for :func:`fp8_linear`.
        counts: rows of each, on the host; may be 0.
        starts: the first row of each; by default they follow each other.
        config: as for :func:`fp8_linear`.

    Returns:
        [sum(counts), N]: the experts' outputs one after the other, in the order of the list.

    Raises:
        As :func:`fp8_linear`.
    """
    if not codes:
        raise PlanError("a product with no weights has no outputs", fix="Leave experts without tokens to the caller.")
    flat = _checked(x, codes, scales, config)
    first = check_jobs(len(flat), len(codes), len(scales), starts, counts)
    if sum(counts) == 0:
        return x.new_empty((0, len(codes[0])))
    on_cpu = not flat.is_cuda and not interpreted()
    if not on_cpu and (config is not None or max(counts) < DEQUANT_TOKENS):
        return _launch(flat, codes, scales, first, counts, config)
    parts = [
        fp8_linear(flat[start : start + count], code, scale)
        for code, scale, start, count in zip(codes, scales, first, counts, strict=True)
        if count
    ]
    return torch.cat(parts)


def experts_config(counts: Sequence[int], shape: tuple[int, int], device: torch.device) -> TileConfig:
    """The config that :func:`fp8_experts` takes for all these jobs by itself, to be given to launches of some of them.

    Each job's bits are then the same however the list is cut into launches.

    Args:
        counts: rows of each job; the largest is at least 1.
        shape: N and K of each weight.
        device: where they lie.
    """
    config = choose_config(max(counts))
    outputs, inputs = shape
    return config_of_jobs(config, outputs, triton.cdiv(inputs, config.depth), counts, device)


def _launch(
    x: torch.Tensor,
    codes: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    starts: Sequence[int] | None,
    counts: Sequence[int] | None,
    config: TileConfig | None,
) -> torch.Tensor:
    """One weight with all of x [rows, K], or the jobs of a table where there are ``starts`` and ``counts``."""
    n, inputs = codes[0].shape
    rows = len(x) if counts is None else sum(counts)
    out = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    if out.numel() == 0 or inputs == 0:
        return out.zero_()
    config = config or choose_config(len(x) if counts is None else max(counts))
    table: torch.Tensor | None = None
    if counts is not None and starts is not None:
        table = job_table(codes, scales, starts, counts, config.tokens)
    token_tiles = triton.cdiv(rows, config.tokens) if table is None else len(table)
    tiles = triton.cdiv(n, config.columns) * token_tiles
    split = split_of(config, tiles, triton.cdiv(inputs, config.depth), x.device)
    parts = out if split.parts == 1 else torch.empty((split.parts, rows, n), dtype=torch.float32, device=x.device)
    step_bytes = config.depth * (config.tokens * x.element_size() + config.columns)
    # tensor cores take no F32: then weights go by way of shared memory
    beside_bytes = config.depth * config.columns * 4 if x.dtype == torch.float32 else 0
    stages = stages_of(config, step_bytes, x.device, beside_bytes)
    with on_device(x):
        _matrix_kernel[(tiles, split.parts)](
            x, codes[0].view(torch.uint8), scales[0], parts.view(BITS_DTYPE[parts.dtype]),
            scales[0] if table is None else table, rows, rows, split.steps, n, inputs, scales[0].shape[1],
            TABLE=table is not None, ALIGNED=table is not None and inputs % 16 == 0 and aligned(codes, scales),
            WHOLE=inputs == split.parts * split.steps * config.depth,
            OUT_KIND=KINDS[parts.dtype], STEPS=split.steps if interpreted() else 0, STAGES=stages,
            num_warps=config.num_warps, num_stages=stages,
            **_options(KINDS[x.dtype], _converts_fp8(x.device), config),
        )  # fmt: skip
        if split.parts > 1:
            sum_parts(parts, out)
    return out


def _options(kind: str, converts_fp8: bool, config: TileConfig) -> dict[str, Any]:
    hardware = not interpreted() and torch.version.hip is None
    return {
        "KIND": kind,
        "HARDWARE": hardware,
        "NATIVE": hardware and converts_fp8,
        "LEFT": config.weights_left,
        "TOKENS": config.tokens,
        "COLUMNS": config.columns,
        "DEPTH": config.depth,
        "BLOCK": BLOCK,
    }


def _converts_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def _checked(
    x: torch.Tensor,
    codes: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    config: TileConfig | None,
) -> torch.Tensor:
    """Refuse what the kernels would misread; return x as contiguous rows."""
    n, inputs = codes[0].shape if codes[0].dim() == 2 else (0, 0)
    for tensor in codes:
        if tensor.dtype not in (torch.float8_e4m3fn, torch.uint8) or tensor.shape != (n, inputs):
            raise PlanError(
                "an FP8 product needs E4M3 codes, matrices of one shape",
                expected=f"torch.float8_e4m3fn or torch.uint8, [N, K]{f' = [{n}, {inputs}]' if inputs else ''}",
                found=f"{tensor.dtype} {list(tensor.shape)}",
            )
    blocks = (-(-n // BLOCK), -(-inputs // BLOCK))
    for tensor in scales:
        if tensor.dtype != torch.float32 or tensor.shape != blocks:
            raise ScaleError(
                f"scale does not fit a weight of shape {[n, inputs]}",
                expected=f"torch.float32 {list(blocks)}",
                found=f"{tensor.dtype} {list(tensor.shape)}",
            )
    if config and (config.columns > BLOCK or config.depth > BLOCK):
        raise PlanError(
            "a tile of an FP8 product lies in one row of scales, and a step in one column",
            expected=f"columns and depth up to {BLOCK}",
            found=f"columns {config.columns}, depth {config.depth}",
        )
    check_rows(x, inputs)
    check_place([x, *codes, *scales])
    return x.reshape(-1, inputs).contiguous()


# --- reference --------------------------------------------------------------------------------------------------------


def fp8_linear_reference(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The definition in plain torch, with sums in F32. Arguments as for :func:`fp8_linear`.

    Returns:
        [..., N] in x's dtype. Takes 16 bytes a weight on the way: not for large ones.
    """
    weight = fp8_dequant.dequant_reference(codes, scale, torch.bfloat16).to(x.dtype)
    return linear(x.float(), weight.float()).to(x.dtype)
