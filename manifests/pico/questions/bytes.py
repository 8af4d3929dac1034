"""The category ``bytes``: how many bytes so many values of a dtype take, and bytes as bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

from weightkit.manifests.pico.questions.core import Draft, Kind, both, phrased, product_key

#: Bytes of one value of a dtype, by the name safetensors gives it.
DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
}
_DTYPES = tuple(DTYPE_BYTES)


def _draw_values_to_bytes(rng: Random) -> Draft:
    count, dtype = rng.randrange(1, 100), rng.choice(_DTYPES)
    size = DTYPE_BYTES[dtype]
    return Draft(product_key(count, size), {"n": count, "dtype": dtype}, both(count * size))


def _draw_bytes_to_values(rng: Random) -> Draft:
    count, dtype = rng.randrange(1, 100), rng.choice(_DTYPES)
    size = DTYPE_BYTES[dtype]
    return Draft(product_key(count, size), {"n": count * size, "dtype": dtype}, both(count))


def _draw_bytes_to_bits(rng: Random) -> Draft:
    count = rng.randrange(1, 100)
    return Draft(product_key(count, 8), {"n": count}, both(count * 8))


def _draw_bits_to_bytes(rng: Random) -> Draft:
    count = rng.randrange(1, 100)
    return Draft(product_key(count, 8), {"n": count * 8}, both(count))


def _draw_larger_dtype(rng: Random) -> Draft:
    while True:
        a, b = rng.choice(_DTYPES), rng.choice(_DTYPES)
        if DTYPE_BYTES[a] != DTYPE_BYTES[b]:
            break
    larger = a if DTYPE_BYTES[a] > DTYPE_BYTES[b] else b
    return Draft(f"dtypes {min(a, b)} {max(a, b)}", {"a": a, "b": b}, both(larger))


def _draw_dtype_width(rng: Random) -> Draft:
    dtype = rng.choice(_DTYPES)
    return Draft(None, {"dtype": dtype}, both(DTYPE_BYTES[dtype] * 8))


_VALUES_TO_BYTES = phrased(
    en="""
        How many bytes do {n} {dtype} values take?
        Size in bytes of {n} {dtype} values?
        A tensor has {n} {dtype} values. How many bytes is that?
    """,
    zh="""
        {n} 个 {dtype} 值占多少字节？
        {n} 个 {dtype} 的大小是多少字节？
        张量有 {n} 个 {dtype} 值，共多少字节？
    """,
)
_BYTES_TO_VALUES = phrased(
    en="""
        How many {dtype} values fit in {n} bytes?
        {n} bytes hold how many {dtype} values?
    """,
    zh="""
        {n} 字节能放多少个 {dtype} 值？
        多少个 {dtype} 值占 {n} 字节？
    """,
)
_BYTES_TO_BITS = phrased(
    en="""
        How many bits are {n} bytes?
        {n} bytes in bits?
    """,
    zh="""
        {n} 字节是多少位？
        {n} 字节等于多少位？
    """,
)
_BITS_TO_BYTES = phrased(
    en="""
        How many bytes are {n} bits?
        {n} bits in bytes?
    """,
    zh="""
        {n} 位是多少字节？
        {n} 位等于多少字节？
    """,
)
_LARGER_DTYPE = phrased(
    en="""
        Which is larger, {a} or {b}?
        Which takes more bytes, {a} or {b}?
    """,
    zh="""
        {a} 和 {b} 哪个更大？
        {a} 和 {b} 哪个占更多字节？
    """,
)
_DTYPE_WIDTH = phrased(
    en="""
        How many bits does {dtype} have?
        How many bits is one {dtype} value?
        How many bits does a {dtype} value take?
        What is the width of {dtype} in bits?
        Width of {dtype} in bits?
        How many bits are in {dtype}?
    """,
    zh="""
        {dtype} 有多少位？
        {dtype} 是多少位？
        {dtype} 值有多少位？
        一个 {dtype} 值占多少位？
        一个 {dtype} 是多少位？
        {dtype} 的位数是多少？
    """,
)

KINDS: Sequence[Kind] = (
    Kind("values to bytes", 6, _draw_values_to_bytes, _VALUES_TO_BYTES),
    Kind("bytes to values", 4, _draw_bytes_to_values, _BYTES_TO_VALUES),
    Kind("bytes to bits", 2, _draw_bytes_to_bits, _BYTES_TO_BITS),
    Kind("bits to bytes", 2, _draw_bits_to_bytes, _BITS_TO_BYTES),
    Kind("larger dtype", 1, _draw_larger_dtype, _LARGER_DTYPE),
    Kind("dtype width", 1, _draw_dtype_width, _DTYPE_WIDTH, closed=True),
)
