"""Evaluate a lazy tensor, or a strip of rows of it, to the bytes of the dense tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from weightkit.checkpoint.dtypes import itemsize
from weightkit.checkpoint.reading import Bytes, Reader
from weightkit.checkpoint.tensors import (
    FP8_BLOCK,
    Cast,
    Concat,
    Dequantized,
    LazyTensor,
    Narrow,
    is_plain,
    narrow,
    size_bytes,
)
from weightkit.compute.engines import Engine

#: A strip's rows are a multiple of this, so that strips of block-scaled weights stay block-scaled.
STRIP_ROWS = FP8_BLOCK


def strips(tensor: LazyTensor, max_bytes: int) -> Iterator[LazyTensor]:
    """The tensor cut along dimension 0 into strips of about ``max_bytes``, at least 128 rows each."""
    if not tensor.shape or size_bytes(tensor) <= max_bytes:
        yield tensor
        return
    rows = tensor.shape[0]
    row_bytes = max(1, size_bytes(tensor) // rows)
    step = max(1, max_bytes // row_bytes // STRIP_ROWS) * STRIP_ROWS
    for start in range(0, rows, step):
        yield narrow(tensor, 0, start, min(step, rows - start))


def evaluate(tensor: LazyTensor, reader: Reader, engine: Engine) -> Bytes:
    """The bytes of the dense tensor, row-major, as a flat uint8 array.

    The array may be a buffer of the engine's that the same thread's next call overwrites: use it or copy it first.
    """
    match tensor:
        case Dequantized(weight, scale, dtype):
            raw = reader.read(weight, engine.buffer("weight", size_bytes(weight)))
            scales = reader.read(scale).view(np.float32).reshape(scale.shape)
            return engine.dequantize(raw.reshape(weight.shape), scales, dtype)
        case Cast(source, dtype):
            return engine.cast(evaluate(source, reader, engine), source.dtype, dtype)
        case Narrow(source, dim, start, length) if not is_plain(source):
            whole = _elements(evaluate(source, reader, engine), source)
            index = (slice(None),) * dim + (slice(start, start + length),)
            return np.ascontiguousarray(whole[index]).reshape(-1).view(np.uint8)
        case Concat(parts, dim) if not is_plain(tensor):
            arrays = [_elements(evaluate(part, reader, engine).copy(), part) for part in parts]
            return np.concatenate(arrays, axis=dim).reshape(-1).view(np.uint8)
        case _:
            return reader.read(tensor, engine.buffer("plain", size_bytes(tensor)))


def _elements(raw: Bytes, tensor: LazyTensor) -> npt.NDArray[np.unsignedinteger[Any]]:
    return raw.view(f"u{itemsize(tensor.dtype)}").reshape(tensor.shape)
