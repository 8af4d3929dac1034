"""Operands that reach every corner of E4M3 dequantization, and a comparison that says where bits first differ."""

from __future__ import annotations

import struct

import numpy as np
import numpy.typing as npt
import torch

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}


def f32(bits: int) -> float:
    """The F32 with these bits."""
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value


SCALE_BITS = [
    0x3F800000,  # 1
    0xBF800000,  # -1
    0x3F808000,  # 1 + 2**-8: the product with 1 lies half way between two BF16, the lower one even
    0x3F818000,  # 1 + 3 * 2**-8: half way, the upper one even
    0x3F801000,  # 1 + 2**-11: the same for F16
    0x3F803000,
    0x3F807FFF,  # just below half way
    0x3F808001,  # just above
    0x3D23D70A,  # 0.04
    0xB951B717,  # -0.0002
    0x38C30000,  # products around F16's smallest normal numbers
    0x33800000,  # 2**-24, F16's smallest number
    0x33000001,  # products around half of it
    0x31000000,
    0x43124000,  # 448 * 146.25 = 65520, where F16 overflows
    0x43123FFF,
    0x42FE0000,
    0x7F7FFFFF,  # the largest F32
    0x7B000000,  # 2**119
    0x7E000000,
    0x00800000,  # 2**-126, the smallest normal F32
    0x00000001,  # 2**-149, the smallest
    0x80000001,
    0x00000003,
    0x007FFFFF,
    0x00008000,  # products half way between BF16 subnormals
    0x00018000,
    0x807F8000,
    0x00000000,
    0x80000000,
    0x7F800000,  # Inf
    0xFF800000,
    0x7FC00000,  # NaN
    0xFFC00000,
    0x7F800001,  # signalling
    0xFFFFFFFF,
]
SPECIAL_SCALES: npt.NDArray[np.float32] = np.array(SCALE_BITS, dtype=np.uint32).view(np.float32)


def every_code_with(scales: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """weight [2, 128 * S], scale [1, S]: all 256 codes under each scale."""
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    return np.tile(codes, (1, len(scales))), scales.reshape(1, -1)


def random_scales(count: int, seed: int) -> npt.NDArray[np.float32]:
    """Any bits at all: a third of them subnormal, Inf, NaN or so large or small that products are."""
    return np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32).view(np.float32)


def random_operands(rows: int, cols: int, seed: int = 0) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Codes of every kind, NaN included, with scales of the size that checkpoints have, of both signs."""
    random = np.random.default_rng([seed, rows, cols])
    blocks = (-(-rows // 128), -(-cols // 128))
    scale = random.normal(size=blocks).astype(np.float32) * np.float32(2e-4)
    return random.integers(0, 256, (rows, cols), dtype=np.uint8), scale


def bits_of(values: torch.Tensor) -> npt.NDArray[np.uint16 | np.uint32]:
    """The bits of BF16, F16 or F32 values, on the host."""
    signed, unsigned = (torch.int32, np.uint32) if values.dtype == torch.float32 else (torch.int16, np.uint16)
    return values.cpu().contiguous().view(signed).numpy().view(unsigned)


def assert_same_bits(found: npt.NDArray[np.generic], expected: npt.NDArray[np.generic], dtype: str) -> None:
    """Fail with the first coordinate where two arrays of bits differ, both bits and both values."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype == BITS[dtype]
    differing = np.argwhere(found != expected)
    if len(differing) == 0:
        return
    where = tuple(int(i) for i in differing[0])
    digits = 2 + 2 * found.itemsize
    texts = [f"{int(array[where]):#0{digits}x} ({_value(int(array[where]), dtype)})" for array in (found, expected)]
    raise AssertionError(
        f"{len(differing)} of {found.size} {dtype} values differ, first at {list(where)}: "
        f"found {texts[0]}, expected {texts[1]}"
    )


def _value(bits: int, dtype: str) -> float:
    if dtype == "F16":
        half: float = struct.unpack("<e", struct.pack("<H", bits))[0]
        return half
    return f32(bits << 16 if dtype == "BF16" else bits)
