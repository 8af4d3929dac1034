"""What the cores reach: memory copies, SHA-256, FP8 dequantization."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from weightkit.measure.pace import best_pace
from weightkit.sha256 import sha256

#: More than the caches hold of one thread, and a piece as large as the writer's strips.
COPY_BYTES = 64 << 20
HASH_BYTES = 4 << 20
#: Rows and columns of a strip of a weight of DeepSeek-V3.
STRIP = (1024, 7168)
BLOCK = 128

Step = Callable[[], int]


def copy_rate(threads: int, seconds: float) -> float:
    """Bytes a second that ``threads`` threads copy from memory to memory."""
    return best_pace([_copying() for _ in range(threads)], seconds)


def sha256_rate(threads: int, seconds: float) -> float:
    """Bytes a second that ``threads`` threads hash."""
    return best_pace([_hashing() for _ in range(threads)], seconds)


def dequant_rate(threads: int, seconds: float) -> float:
    """FP8 bytes a second that ``threads`` threads make BF16, with the writer's own kernel. Compiles it first."""
    return best_pace([_dequantizing() for _ in range(threads)], seconds)


def _copying() -> Step:
    source, out = np.ones(COPY_BYTES, np.uint8), np.zeros(COPY_BYTES, np.uint8)

    def step() -> int:
        np.copyto(out, source)
        return COPY_BYTES

    return step


def _hashing() -> Step:
    data, digest = np.ones(HASH_BYTES, np.uint8).data, sha256()

    def step() -> int:
        digest.update(data)
        return HASH_BYTES

    return step


def _dequantizing() -> Step:
    from weightkit.kernels.fp8_dequant_cpu import dequant_cpu

    rows, cols = STRIP
    weight = (np.arange(rows * cols, dtype=np.uint32) * 2654435761 >> 24).astype(np.uint8).reshape(STRIP)
    scale = np.full((-(-rows // BLOCK), -(-cols // BLOCK)), 0.01, np.float32)
    out = np.empty(STRIP, np.uint16)

    def step() -> int:
        dequant_cpu(weight, scale, out, dtype="BF16")
        return weight.size

    return step
