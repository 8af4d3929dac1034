"""Evaluate a lazy tensor, or a strip of rows of it, to the bytes of the dense tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from weightkit.checkpoint.dtypes import itemsize
from weightkit.checkpoint.reading import Bytes, Reader
from weightkit.checkpoint.tensors import (
    FP8_BLOCK,
    BlockQuantized,
    Cast,
    Concat,
    Dequantized,
    GroupDequantized,
    LazyTensor,
    Narrow,
    is_plain,
    narrow,
    size_bytes,
    stored_parts,
)
from weightkit.compute.engines import Engine, Here, PackedWeight, Started
from weightkit.compute.scales import KeptScales
from weightkit.kernels.gptq_format_cpu import require_groups

#: A strip's rows are a multiple of this, so that strips of block-scaled weights stay block-scaled.
STRIP_ROWS = FP8_BLOCK
#: Strips of a GPTQ weight are no smaller where it is larger. It is stored transposed: rows of it are columns of a file,
#: and each strip reads, of every row of the file, a piece. An expert of DeepSeek-V3 (28 MiB in BF16) is one strip.
GROUP_STRIP_BYTES = 32 << 20


def strips(tensor: LazyTensor, max_bytes: int) -> Iterator[LazyTensor]:
    """The tensor cut along dimension 0 into strips of at most ``strip_bytes``, but at least 128 rows each."""
    max_bytes = strip_bytes(tensor, max_bytes)
    if isinstance(tensor, BlockQuantized) and tensor.scales:
        yield from _scale_strips(tensor, max_bytes)
        return
    if not tensor.shape or size_bytes(tensor) <= max_bytes:
        yield tensor
        return
    rows = tensor.shape[0]
    row_bytes = max(1, size_bytes(tensor) // rows)
    step = max(1, max_bytes // row_bytes // STRIP_ROWS) * STRIP_ROWS
    for start in range(0, rows, step):
        yield narrow(tensor, 0, start, min(step, rows - start))


def _scale_strips(tensor: BlockQuantized, max_bytes: int) -> Iterator[LazyTensor]:
    """Scales are few, and each needs a block of the source: strips as those of the codes."""
    row = 0
    for codes in strips(replace(tensor, scales=False), max_bytes):
        count = -(-codes.shape[0] // FP8_BLOCK)
        yield narrow(tensor, 0, row, count)
        row += count


def strip_bytes(tensor: LazyTensor, max_bytes: int) -> int:
    """``max_bytes``, or more for what costs too much to read in smaller strips."""
    return max(max_bytes, GROUP_STRIP_BYTES) if _has_groups(tensor) else max_bytes


def _has_groups(tensor: LazyTensor) -> bool:
    match tensor:
        case GroupDequantized():
            return True
        case Narrow(source=source) | Cast(source=source):
            return _has_groups(source)
        case Concat(parts=parts):
            return any(map(_has_groups, parts))
    return False


def evaluate(tensor: LazyTensor, reader: Reader, engine: Engine) -> Bytes:
    """The bytes of the dense tensor, row-major, as a flat uint8 array.

    The array may be a buffer of the engine's that the same thread's next call overwrites: use it or copy it first.
    """
    match tensor:
        case Dequantized(weight, scale, dtype):
            raw = reader.read(weight, engine.buffer("weight", size_bytes(weight)))
            scales = reader.read(scale).view(np.float32).reshape(scale.shape)
            return engine.dequantize(raw.reshape(weight.shape), scales, dtype)
        case GroupDequantized():
            return engine.dequantize_groups(read_packed(tensor, reader, engine), tensor.dtype)
        case Cast(source, dtype):
            return engine.cast(evaluate(source, reader, engine), source.dtype, dtype)
        case BlockQuantized(source, scales, power_of_two):
            values, (rows, columns) = evaluate(source, reader, engine), source.shape
            codes, found = engine.quantize_blocks(values, (rows, columns), source.dtype, power_of_two)
            return found.reshape(-1).view(np.uint8) if scales else codes
        case Narrow(source, dim, start, length) if not is_plain(source):
            whole = _elements(evaluate(source, reader, engine), source)
            index = (slice(None),) * dim + (slice(start, start + length),)
            return np.ascontiguousarray(whole[index]).reshape(-1).view(np.uint8)
        case Concat(parts, dim) if not is_plain(tensor):
            arrays = [_elements(evaluate(part, reader, engine).copy(), part) for part in parts]
            return np.concatenate(arrays, axis=dim).reshape(-1).view(np.uint8)
        case _:
            return reader.read(tensor, engine.buffer("plain", size_bytes(tensor)))


def start(tensor: LazyTensor, reader: Reader, engine: Engine, kept: KeptScales | None = None) -> Started:
    """Read what the tensor is made from, and begin to compute its bytes; those of ``evaluate``.

    What a device computes is waited for by whoever asks for the bytes; the rest is done when this returns. Scales that
    come with codes are put into ``kept``, and those that are asked for are taken from there if they are there.
    """
    match tensor:
        case Dequantized(weight, scale, dtype):
            raw = reader.read(weight, engine.buffer("weight", size_bytes(weight)))
            scales = reader.read(scale, engine.buffer("scale", size_bytes(scale))).view(np.float32)
            return engine.start_dequantize(raw.reshape(weight.shape), scales.reshape(scale.shape), dtype)
        case GroupDequantized():
            return engine.start_dequantize_groups(read_packed(tensor, reader, engine), tensor.dtype)
        case BlockQuantized():
            return _start_quantized(tensor, reader, engine, kept or KeptScales())
    return Here(evaluate(tensor, reader, engine))


def _start_quantized(tensor: BlockQuantized, reader: Reader, engine: Engine, kept: KeptScales) -> Started:
    source, (rows, columns) = tensor.source, tensor.source.shape
    if tensor.scales and (found := kept.take(tensor)) is not None:
        return found
    values = evaluate(source, reader, engine)
    if is_plain(source):
        codes, scales = engine.start_quantize_blocks(values, (rows, columns), source.dtype, tensor.power_of_two)
    else:  # the values may lie in the engine's memory for results, which a later call overwrites
        made, factors = engine.quantize_blocks(values, (rows, columns), source.dtype, tensor.power_of_two)
        codes, scales = Here(made), Here(factors.reshape(-1).view(np.uint8))
    if tensor.scales:
        return scales
    kept.keep(tensor, scales)
    return codes


def read_packed(tensor: GroupDequantized, reader: Reader, engine: Engine) -> PackedWeight:
    """The four stored tensors of a GPTQ weight, in scratch buffers of the engine's.

    Raises ``ScaleError`` where ``g_idx`` names a group that has no scale: kernels would read what is not theirs.
    """

    def read(part: LazyTensor, purpose: str) -> Bytes:
        return reader.read(part, engine.buffer(purpose, size_bytes(part)))

    g_idx = read(tensor.g_idx, "g_idx").view(np.int32)
    g_idx -= np.int32(tensor.first_group)
    require_groups(g_idx, tensor.scales.shape[0], where=next(stored_parts(tensor.g_idx)).path)
    return PackedWeight(
        read(tensor.qweight, "qweight").view(np.int32).reshape(tensor.qweight.shape),
        read(tensor.qzeros, "qzeros").view(np.int32).reshape(tensor.qzeros.shape),
        read(tensor.scales, "scales").view(np.float16).reshape(tensor.scales.shape),
        g_idx,
        tensor.bits,
        tensor.zero_offset,
    )


def _elements(raw: Bytes, tensor: LazyTensor) -> npt.NDArray[np.unsignedinteger[Any]]:
    return raw.view(f"u{itemsize(tensor.dtype)}").reshape(tensor.shape)
