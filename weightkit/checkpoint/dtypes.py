"""The dtypes of the safetensors format, spelled as it spells them."""

from __future__ import annotations

from math import prod

from weightkit.errors import UnsupportedError

#: Bits an element. Source: the safetensors format, version 0.8.
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
}

#: What ``--to`` accepts, in the spelling of the command line and of ``torch_dtype``.
FLOAT_DTYPES: dict[str, str] = {"bf16": "BF16", "f16": "F16", "f32": "F32"}
TORCH_NAMES: dict[str, str] = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def itemsize(dtype: str) -> int:
    """Bytes an element of ``dtype``. Raises ``UnsupportedError`` for dtypes narrower than a byte."""
    bits = DTYPE_BITS[dtype]
    if bits % 8:
        raise UnsupportedError(f"{dtype} elements are narrower than a byte and cannot be addressed one by one")
    return bits // 8


def size_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a dense tensor."""
    return prod(shape) * DTYPE_BITS[dtype] // 8


def row_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a row of ``shape``. Raises ``UnsupportedError`` for rows that end within a byte."""
    if prod(shape) * DTYPE_BITS[dtype] % 8:
        raise UnsupportedError(f"{dtype} elements are narrower than a byte, and rows of {list(shape)} end within one")
    return size_bytes(dtype, shape)
