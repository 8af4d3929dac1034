"""GPTQ weights and what they stand for, in plain numpy, from the format's definition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from plain_reference import NAN_BITS, round_to

I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]


def packed_rows(rows: npt.NDArray[np.integer], bits: int) -> I32:
    """[..., R, N] -> [..., R * bits / 32, N]: one shift and one sum a code."""
    count = 32 // bits
    *stack, height, width = rows.shape
    words = np.zeros((*stack, height // count, width), np.uint64)
    for place in range(count):
        words += rows[..., place::count, :].astype(np.uint64) << np.uint64(bits * place)
    return words.astype(np.uint32).view(np.int32)


@dataclass(frozen=True)
class Packed:
    """Codes [N, K], stored zeros [groups, N], F16 scales [groups, N], g_idx [K]."""

    codes: U8
    zeros: U8
    scales: npt.NDArray[np.float16]
    g_idx: I32
    bits: int

    @property
    def arrays(self) -> tuple[I32, I32, npt.NDArray[np.float16], I32]:
        """qweight, qzeros, scales, g_idx, as they are stored."""
        qweight = packed_rows(self.codes.T, self.bits)
        qzeros = np.ascontiguousarray(packed_rows(self.zeros.T, self.bits).T)
        return qweight, qzeros, self.scales, self.g_idx

    def dequantized(self, zero_offset: int, dtype: str) -> npt.NDArray[np.unsignedinteger]:
        """The bits of the values [N, K]; NaN where ``g_idx`` names no group."""
        inside = (self.g_idx >= 0) & (self.g_idx < len(self.scales))
        group = np.where(inside, self.g_idx, 0)
        zeros = (self.zeros.astype(np.int64) + zero_offset) % (1 << self.bits)
        difference = self.codes.T.astype(np.int64) - zeros[group]
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            values = difference.astype(np.float32) * self.scales.astype(np.float32)[group]
        values[~inside] = np.nan
        values = np.ascontiguousarray(values.T)
        bits = round_to(values, dtype)
        return np.where(np.isnan(values), np.array(NAN_BITS[dtype], bits.dtype), bits)


def group_order(k: int, groups: int, order: str) -> I32:
    """``g_idx``: ``ascending`` runs, ``one`` group, ``random`` as activation order leaves it, or runs whose ends are no
    multiple of anything (``ragged``)."""
    rng = np.random.default_rng(k)
    if order == "one":
        return np.zeros(k, np.int32)
    if order == "random":
        return rng.integers(0, groups, k, dtype=np.int32)
    if order == "ragged":
        return np.sort(rng.integers(0, groups, k, dtype=np.int32))
    return (np.arange(k) * groups // k).astype(np.int32)


def random_packed(n: int, k: int, bits: int, order: str, groups: int = 4) -> Packed:
    """Random codes and zeros, scales of the size and both signs that checkpoints could have."""
    rng = np.random.default_rng([n, k, bits])
    groups = 1 if order == "one" else groups
    return Packed(
        rng.integers(0, 1 << bits, (n, k), dtype=np.uint8),
        rng.integers(0, 1 << bits, (groups, n), dtype=np.uint8),
        (rng.normal(size=(groups, n)) * 2e-3).astype(np.float16),
        group_order(k, groups, order),
        bits,
    )


SCALE_BITS = [
    0x3C00,  # 1
    0xBC00,  # -1
    0x3C01,  # products that lie half way between two BF16, on either side of an even one
    0x3C05,
    0x3FFF,
    0x2E66,  # 0.1
    0x9234,
    0x0001,  # the smallest subnormal
    0x03FF,  # the largest
    0x8001,
    0x0400,  # the smallest normal
    0x7BFF,  # the largest: F16 overflows
    0xFBFF,
    0x5FFF,
    0x0000,
    0x8000,
    0x7C00,  # Inf
    0xFC00,
    0x7E00,  # NaN
    0xFFFF,
    0x7C01,  # signalling
]


def every_code_and_zero(bits: int) -> Packed:
    """[2**bits, 2**bits * S]: output n stores the zero n, group s the scale s; every code under each."""
    count = 1 << bits
    scales = np.array(SCALE_BITS, np.uint16).view(np.float16)
    codes = np.tile(np.arange(count, dtype=np.uint8), (count, len(scales)))
    zeros = np.tile(np.arange(count, dtype=np.uint8), (len(scales), 1))
    g_idx = np.repeat(np.arange(len(scales), dtype=np.int32), count)
    return Packed(codes, zeros, np.repeat(scales[:, None], count, axis=1), g_idx, bits)
