"""FP8 block dequantization on a GPU: ``value = float32(E4M3) * scale_inv[row // 128, col // 128]``, rounded once.

The product is an F32 product (the definition's own arithmetic), rounded to nearest even to the output's dtype. This
module and ``fp8_dequant_cpu`` give the same bits:

- Subnormals are kept everywhere: in codes, scales, products and results. Overflow gives Inf. Zero keeps its sign.
- Every NaN (codes 0x7F and 0xFF, a NaN scale, Inf times zero) comes out as one pattern, ``0x7FFF`` in BF16 and F16 and
  ``0x7FFFFFFF`` in F32. It is what NVIDIA GPUs make of any NaN (PTX ISA, "canonical NaN"), so a plain device kernel
  agrees. CPUs differ among themselves, and torch on a CPU even between its vector loops and their tails.

The kernels read codes as bytes and decode E4M3 by integer arithmetic, so that GPUs without an FP8 type (A100, A800,
3090) run them.

E4M3 here is the finite kind (OCP 8-bit Floating Point Specification, 5.3): a sign, 4 bits of exponent with bias 7, 3
bits of mantissa, no Inf, and NaN where all bits below the sign are set.
"""

# Triton compiles functions that cannot carry annotations; everything else in this file does.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from weightkit.errors import DeviceError, PlanError, ScaleError
from weightkit.kernels.conversions import decode_e4m3, encode, interpreted

BLOCK = 128
"""Rows and columns that share a scale."""

NAN_BITS = {torch.bfloat16: 0x7FFF, torch.float16: 0x7FFF, torch.float32: 0x7FFFFFFF}
"""Output dtype -> the one NaN pattern written."""

_BITS_DTYPE = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_KIND = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class TileConfig:
    """What one program does.

    Attributes:
        rows: rows of a tile, a power of two up to 128, so that a tile lies in one row of scale blocks.
        col_blocks: scale blocks of 128 columns side by side in a tile, a power of two.
        num_warps: warps a program.
        wide_loads: load 16 codes a thread at once, then exchange them through shared memory; otherwise as many as make
            one 16-byte store (8, or 4 for F32), so that loads and stores share a layout.
        streaming: ask the caches to let go first of what passes through.
        hardware_rounding: let the device round and give NaN its pattern. Never so under the interpreter, which
            truncates F32 to BF16.
    """

    rows: int = 8
    col_blocks: int = 8
    num_warps: int = 8
    wide_loads: bool = False
    streaming: bool = True
    hardware_rounding: bool = True


DEFAULT_CONFIG = TileConfig()


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _dequant_tile(
    weight, scale, out, rows, cols, tile,
    KIND: tl.constexpr, HARDWARE: tl.constexpr,
    ROWS: tl.constexpr, COL_BLOCKS: tl.constexpr, VECTOR: tl.constexpr, STREAMING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Dequantize tile number ``tile`` (row-major) of one [rows, cols] matrix.

    The tile is [ROWS, COL_BLOCKS, BLOCK], so that its scales are [COL_BLOCKS]: one load a block, not one a column.
    """
    scale_cols = (cols + BLOCK - 1) // BLOCK
    col_tiles = (scale_cols + COL_BLOCKS - 1) // COL_BLOCKS
    row0 = (tile // col_tiles) * ROWS
    block0 = (tile % col_tiles) * COL_BLOCKS

    block = block0 + tl.arange(0, COL_BLOCKS)
    factor = tl.load(scale + (row0 // BLOCK) * scale_cols + block, mask=block < scale_cols, other=0.0)

    row = tl.arange(0, ROWS)[:, None, None]
    lane = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK), VECTOR), VECTOR)[None, None, :]
    col = block[None, :, None] * BLOCK + lane
    mask = (row0 + row < rows) & (col < cols)
    start = row0.to(tl.int64) * cols  # a stack, or one matrix, may pass 2**31 elements; a tile does not
    offset = row * cols + col

    code = tl.load(weight + start + offset, mask=mask, other=0, eviction_policy="evict_first" if STREAMING else "")
    value = decode_e4m3(code) * factor[None, :, None]
    bits = encode(value, KIND, HARDWARE)
    tl.store(out + start + offset, bits, mask=mask, cache_modifier=".cs" if STREAMING else "")


@triton.jit
def _dequant_stacked_kernel(
    weight_ptr, scale_ptr, out_ptr, rows, cols, tiles_per_matrix,
    KIND: tl.constexpr, HARDWARE: tl.constexpr,
    ROWS: tl.constexpr, COL_BLOCKS: tl.constexpr, VECTOR: tl.constexpr, STREAMING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """weight, out [E, rows, cols] uint8 and bits; scale [E, ceil(rows / BLOCK), ceil(cols / BLOCK)] F32; contiguous."""
    pid = tl.program_id(0)
    matrix = (pid // tiles_per_matrix).to(tl.int64)
    start = matrix * rows * cols
    scale_start = matrix * ((rows + BLOCK - 1) // BLOCK) * ((cols + BLOCK - 1) // BLOCK)
    _dequant_tile(
        weight_ptr + start, scale_ptr + scale_start, out_ptr + start, rows, cols, pid % tiles_per_matrix,
        KIND, HARDWARE, ROWS, COL_BLOCKS, VECTOR, STREAMING, BLOCK,
    )  # fmt: skip


@triton.jit
def _dequant_table_kernel(
    table_ptr, owner_ptr,
    KIND: tl.constexpr, HARDWARE: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COL_BLOCKS: tl.constexpr, VECTOR: tl.constexpr, STREAMING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """table [T, 6] int64: addresses of weight, scale, out; rows, cols, first tile. owner [tiles] int32: a tile's T."""
    pid = tl.program_id(0)
    record = table_ptr + tl.load(owner_ptr + pid) * 6
    weight = tl.load(record).to(tl.pointer_type(tl.uint8))
    scale = tl.load(record + 1).to(tl.pointer_type(tl.float32))
    out = tl.load(record + 2).to(tl.pointer_type(tl.int32 if KIND == "F32" else tl.int16))
    rows = tl.load(record + 3).to(tl.int32)
    cols = tl.load(record + 4).to(tl.int32)
    if ALIGNED:  # Triton learns this of arguments by itself, of loaded values it must be told, or it moves single codes
        weight = tl.multiple_of(weight, 16)
        out = tl.multiple_of(out, 16)
        cols = tl.multiple_of(cols, 16)
    tile = pid - tl.load(record + 5).to(tl.int32)
    _dequant_tile(weight, scale, out, rows, cols, tile, KIND, HARDWARE, ROWS, COL_BLOCKS, VECTOR, STREAMING, BLOCK)


# --- launchers --------------------------------------------------------------------------------------------------------


def dequant(
    weight: torch.Tensor,
    scale_inv: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
    *,
    out: torch.Tensor | None = None,
    config: TileConfig = DEFAULT_CONFIG,
) -> torch.Tensor:
    """Dequantize one matrix, or a stack of matrices of one shape, in one launch.

    Args:
        weight: [M, N] or [E, M, N], F8_E4M3 or uint8, contiguous, on a GPU (on a CPU under ``TRITON_INTERPRET=1``).
        scale_inv: [ceil(M / 128), ceil(N / 128)] or [E, ...], F32, contiguous, on the same device. A strip of a larger
            matrix's rows starts at a multiple of 128, and its scales are those rows of the matrix's.
        dtype: bfloat16, float16 or float32.
        out: where to write, of weight's shape and ``dtype``, contiguous; made when absent.
        config: shape of the tiles.

    Returns:
        ``out``, on the current stream.

    Raises:
        ScaleError: scales whose shape does not fit.
        PlanError: any other dtype, layout or device that cannot be.
        DeviceError: tensors on a CPU without the interpreter.
    """
    out = _checked(weight, scale_inv, dtype, out)
    if weight.numel() == 0:
        return out
    rows, cols = weight.shape[-2:]
    tiles = _tiles(rows, cols, config)
    codes, bits = weight.view(torch.uint8), out.view(_BITS_DTYPE[dtype])
    with _on_device(weight):
        _dequant_stacked_kernel[(weight.numel() // (rows * cols) * tiles,)](
            codes, scale_inv, bits, rows, cols, tiles, **_options(dtype, config)
        )
    return out


def dequant_many(
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    dtype: torch.dtype = torch.bfloat16,
    *,
    outs: Sequence[torch.Tensor] | None = None,
    config: TileConfig = DEFAULT_CONFIG,
) -> list[torch.Tensor]:
    """Dequantize matrices of any shapes in one launch: all tensors of a layer, say.

    A stack of equal matrices goes to :func:`dequant` instead, which needs no table of addresses.

    Args:
        weights, scales, dtype, config: as for :func:`dequant`, a matrix [M, N] each, on one device.
        outs: where to write; made when absent.

    Returns:
        The outputs, in order, on the current stream.

    Raises:
        As :func:`dequant`.
    """
    if len(weights) != len(scales) or (outs is not None and len(outs) != len(weights)):
        raise PlanError(
            "dequant_many needs a scale, and an output where outputs are given, for each weight",
            expected=f"{len(weights)} of each",
            found=f"{len(scales)} scales, {len(outs) if outs is not None else 'no'} outputs",
        )
    made = [
        _checked(weight, scale, dtype, None if outs is None else outs[i])
        for i, (weight, scale) in enumerate(zip(weights, scales, strict=True))
    ]
    devices = {str(weight.device) for weight in weights}
    if len(devices) > 1:
        raise PlanError("dequant_many works on one device a launch", found=", ".join(sorted(devices)))
    if any(weight.dim() != 2 for weight in weights):
        raise PlanError("dequant_many takes matrices [M, N]", fix="Give a stack of equal matrices to dequant.")
    work = [(w, s, o) for w, s, o in zip(weights, scales, made, strict=True) if w.numel()]
    if not work:
        return made

    tiles = np.array([_tiles(weight.shape[0], weight.shape[1], config) for weight, _, _ in work], dtype=np.int64)
    first = np.cumsum(tiles) - tiles
    addresses = [(w.data_ptr(), s.data_ptr(), o.data_ptr(), *w.shape) for w, s, o in work]
    records = np.column_stack([np.array(addresses, dtype=np.int64), first])
    device = work[0][0].device
    table = _to_device(records, device)
    owner = _to_device(np.repeat(np.arange(len(work), dtype=np.int32), tiles), device)
    aligned = all(_aligned(weight, out) for weight, _, out in work)
    with _on_device(work[0][0]):
        _dequant_table_kernel[(int(tiles.sum()),)](table, owner, ALIGNED=aligned, **_options(dtype, config))
    return made


def _tiles(rows: int, cols: int, config: TileConfig) -> int:
    return -(-rows // config.rows) * -(-cols // (BLOCK * config.col_blocks))


def _aligned(weight: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether every row starts on 16 bytes, so that threads may load and store vectors."""
    return weight.shape[-1] % 16 == 0 and weight.data_ptr() % 16 == 0 and out.data_ptr() % 16 == 0


def _to_device(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """Through pinned memory, or the host would wait for all that the stream still has to do."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _options(dtype: torch.dtype, config: TileConfig) -> dict[str, object]:
    return {
        "KIND": _KIND[dtype],
        "HARDWARE": config.hardware_rounding and not interpreted() and torch.version.hip is None,
        "ROWS": config.rows,
        "COL_BLOCKS": config.col_blocks,
        "VECTOR": 16 if config.wide_loads else 16 // dtype.itemsize,
        "STREAMING": config.streaming,
        "BLOCK": BLOCK,
        "num_warps": config.num_warps,
    }


def _on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _checked(
    weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None
) -> torch.Tensor:
    """Refuse what the kernels would misread; return the output tensor."""
    _check_operands(weight, scale_inv, dtype, BLOCK)
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if out.shape != weight.shape or out.dtype != dtype:
        raise PlanError(
            "output of a dequantization does not fit its weight",
            expected=f"{dtype} {list(weight.shape)}",
            found=f"{out.dtype} {list(out.shape)}",
        )
    if not (weight.is_contiguous() and scale_inv.is_contiguous() and out.is_contiguous()):
        raise PlanError("the dequantization kernel needs contiguous tensors", fix="Call .contiguous() first.")
    if not weight.device == scale_inv.device == out.device:
        raise PlanError(
            "weight, scale and output lie on different devices",
            found=f"{weight.device}, {scale_inv.device}, {out.device}",
        )
    if not weight.is_cuda and not interpreted():
        raise DeviceError(
            "the Triton kernel needs tensors on a GPU",
            found=weight.device,
            fix="Use weightkit.kernels.fp8_dequant_cpu for tensors on a CPU.",
        )
    return out


def _check_operands(weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype, block: int) -> None:
    if weight.dtype not in (torch.float8_e4m3fn, torch.uint8) or weight.dim() not in (2, 3):
        raise PlanError(
            "dequantization needs E4M3 codes, a matrix or a stack of matrices",
            expected="torch.float8_e4m3fn or torch.uint8, [M, N] or [E, M, N]",
            found=f"{weight.dtype} {list(weight.shape)}",
        )
    if dtype not in _KIND:
        raise PlanError("no such output of a dequantization", expected=", ".join(map(str, _KIND)), found=dtype)
    *stack, rows, cols = weight.shape
    expected = [*stack, -(-rows // block), -(-cols // block)]
    if scale_inv.dtype != torch.float32 or list(scale_inv.shape) != expected:
        raise ScaleError(
            f"scale does not fit a weight of shape {list(weight.shape)}",
            expected=f"torch.float32 {expected}",
            found=f"{scale_inv.dtype} {list(scale_inv.shape)}",
        )


# --- reference --------------------------------------------------------------------------------------------------------


def dequant_reference(
    weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype = torch.bfloat16, block: int = BLOCK
) -> torch.Tensor:
    """The definition, in plain torch: what every kernel must equal, bit for bit.

    Args:
        weight: [M, N] or [E, M, N], F8_E4M3 or uint8 (its codes), on any device whose torch can convert FP8.
        scale_inv: [..., ceil(M / block), ceil(N / block)], F32.
        dtype: bfloat16, float16 or float32.
        block: rows and columns that share a scale.

    Returns:
        weight's shape in ``dtype``. Takes 12 bytes an element on the way: not for large tensors.

    Raises:
        ScaleError, PlanError: operands that do not fit.
    """
    _check_operands(weight, scale_inv, dtype, block)
    rows, cols = weight.shape[-2:]
    factor = scale_inv.repeat_interleave(block, dim=-2)[..., :rows, :].repeat_interleave(block, dim=-1)[..., :cols]
    value = weight.view(torch.float8_e4m3fn).to(torch.float32) * factor
    bits = value.to(dtype).view(_BITS_DTYPE[dtype])
    return bits.masked_fill_(value.isnan(), NAN_BITS[dtype]).view(dtype)
