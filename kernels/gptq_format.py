"""The tensors of a GPTQ weight of 4 or 8 bits: packing, unpacking, and dequantization on a GPU.

A weight is [N, K] = [out, in]. GPTQ stores its transpose, as AutoGPTQ wrote it first:

- ``qweight`` I32 [K * bits / 32, N]: code j of word [r, n] is that of input ``r * 32 / bits + j``, the first in the
  lowest bits. ``qzeros`` I32 [groups, N * bits / 32] packs zeros the same way along N.
- ``scales`` F16 [groups, N]; ``g_idx`` I32 [K] gives the group of each input. Without activation order it rises from
  group to group; with it (``desc_act``) it is in any order.
- A zero is the stored one plus ``zero_offset``, modulo ``2**bits``: 1 where ``checkpoint_format`` is ``gptq``, 0 for
  ``gptq_v2``.

``value = (code - zero) * float32(scale)``, rounded once to nearest even. A difference has 9 bits and a scale 11, so
that the F32 product is exact. Zero takes the scale's sign. A scale that is NaN, Inf times zero, or a ``g_idx`` outside
the groups gives the one NaN of ``fp8_dequant``: ``0x7FFF`` in BF16 and F16, ``0x7FFFFFFF`` in F32.
"""

# Triton compiles functions that cannot carry annotations; everything else in this file does.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from weightkit.errors import PlanError, ScaleError
from weightkit.kernels.conversions import encode, interpreted

NAN_BITS = {torch.bfloat16: 0x7FFF, torch.float16: 0x7FFF, torch.float32: 0x7FFFFFFF}
"""Output dtype -> the one NaN pattern written."""

_BITS_DTYPE = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_KIND = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class TileConfig:
    """What one program does. Compiled for sm_90, four words a thread take 32 to 40 registers.

    Attributes:
        columns: columns of ``qweight``, which are rows of the output, a power of two; adjacent in what is read.
        words: rows of ``qweight`` at most, a power of two; adjacent in what is written, 8 codes of 4 bits a word. Fewer
            are taken where a group has fewer, as a tile of several groups is slow.
        num_warps: warps a program.
        streaming: ask the caches to let go first of what passes through.
        hardware_rounding: let the device round and give NaN its pattern. Never so under the interpreter, which
            truncates F32 to BF16.
    """

    columns: int = 32
    words: int = 16
    num_warps: int = 8
    streaming: bool = True
    hardware_rounding: bool = True


DEFAULT_CONFIG = TileConfig()


# --- packing ----------------------------------------------------------------------------------------------------------


def pack(codes: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Codes as ``qweight`` stores them.

    Args:
        codes: uint8 [..., N, K], each below ``2**bits``, on any device; K a multiple of ``32 / bits``.
        bits: 4 or 8.

    Returns:
        int32 [..., K * bits / 32, N], contiguous. Upper bits of a code that is too large are lost.

    Raises:
        PlanError: another dtype, number of bits or shape.
    """
    per_word = _codes_per_word(bits)
    if codes.dtype != torch.uint8 or codes.dim() < 2 or codes.shape[-1] % per_word:
        raise PlanError(
            "codes that cannot be packed",
            expected=f"torch.uint8 [..., N, K], K a multiple of {per_word}",
            found=f"{codes.dtype} {list(codes.shape)}",
        )
    return _words(codes, bits).transpose(-1, -2).contiguous()


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [..., K] -> int32 [..., K * bits / 32], the first of neighbours in the lowest bits.

    Eight codes of 4 bits are one number of 64 bits (machines are little-endian), whose halves of bytes move together.
    """
    held = codes.contiguous()
    if held.storage_offset() % 8:
        held = held.clone()
    if bits == 8:
        return held.view(torch.int32)
    spread = held.view(torch.int64) & 0x0F0F0F0F0F0F0F0F
    spread = (spread | spread >> 4) & 0x00FF00FF00FF00FF
    spread = (spread | spread >> 8) & 0x0000FFFF0000FFFF
    return (spread | spread >> 16).view(torch.int32)[..., ::2]


def unpack(qweight: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """The codes of ``qweight``: the inverse of :func:`pack`.

    Args:
        qweight: int32 [..., K * bits / 32, N], on any device.
        bits: 4 or 8.

    Returns:
        uint8 [..., N, K], contiguous.

    Raises:
        PlanError: another dtype, number of bits or shape.
    """
    _codes_per_word(bits)
    if qweight.dtype != torch.int32 or qweight.dim() < 2:
        raise PlanError(
            "words that cannot be unpacked",
            expected="torch.int32 [..., K * bits / 32, N]",
            found=f"{qweight.dtype} {list(qweight.shape)}",
        )
    return _codes(qweight.transpose(-1, -2).contiguous(), bits)


def _codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [..., W] -> uint8 [..., W * 32 / bits]: the inverse of :func:`_words`."""
    if bits == 8:
        return words.view(torch.uint8)
    spread = words.to(torch.int64) & 0xFFFFFFFF
    spread = (spread | spread << 16) & 0x0000FFFF0000FFFF
    spread = (spread | spread << 8) & 0x00FF00FF00FF00FF
    spread = (spread | spread << 4) & 0x0F0F0F0F0F0F0F0F
    return spread.view(torch.uint8)


def pack_zeros(
    groups: int,
    n: int,
    bits: int = 4,
    zero: int | None = None,
    *,
    zero_offset: int = 1,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """``qzeros`` of a weight that has one zero throughout, as symmetric quantization does.

    Args:
        groups, n: rows of ``scales``, and outputs, a multiple of ``32 / bits``.
        bits: 4 or 8.
        zero: the code that stands for 0; the middle, ``2**(bits - 1)``, by default.
        zero_offset: what is stored is ``zero`` less this: 1 in ``checkpoint_format`` ``gptq``, 0 in ``gptq_v2``.
        device: where the result lies.

    Returns:
        int32 [groups, n * bits / 32]: ``0x77777777`` throughout for 4 bits, symmetric, ``gptq``.

    Raises:
        PlanError: another number of bits, n or zero.
    """
    per_word = _codes_per_word(bits)
    zero = 1 << (bits - 1) if zero is None else zero
    if n % per_word or not 0 <= zero < 1 << bits:
        raise PlanError(
            "zeros that cannot be packed",
            expected=f"outputs in multiples of {per_word}, a zero below {1 << bits}",
            found=f"{n} outputs, zero {zero}",
        )
    stored = (zero - zero_offset) % (1 << bits)
    word = sum(stored << bits * j for j in range(per_word))
    return torch.full((groups, n // per_word), word - (1 << 32 if word >> 31 else 0), dtype=torch.int32, device=device)


def _codes_per_word(bits: int) -> int:
    if bits not in (4, 8):
        raise PlanError("no such width of GPTQ codes", expected="4 or 8 bits", found=bits)
    return 32 // bits


# --- kernel -----------------------------------------------------------------------------------------------------------


@triton.jit
def _either(left, right):
    """For ``tl.reduce``: its ready-made sums and maxima are not interpreted where this file alone is."""
    return left | right


@triton.jit
def _difference(code, zero):
    """``float32(code - zero)`` of small integers: a code put into the mantissa of 2**23, which converts no integer."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - (zero | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def _zero_of(word, column, BITS: tl.constexpr, OFFSET: tl.constexpr):
    return ((word >> (column % (32 // BITS) * BITS)) + OFFSET) & ((1 << BITS) - 1)


@triton.jit
def _dequant_kernel(
    qweight_ptr, qzeros_ptr, scales_ptr, g_idx_ptr, out_ptr, N, K, groups,
    BITS: tl.constexpr, OFFSET: tl.constexpr, KIND: tl.constexpr, HARDWARE: tl.constexpr,
    COLUMNS: tl.constexpr, WORDS: tl.constexpr, STREAMING: tl.constexpr,
):  # fmt: skip
    """qweight [K / PER_WORD, N], qzeros [groups, N / PER_WORD], scales [groups, N], g_idx [K] -> out bits [N, K].

    Words are read along N and written along K: they are transposed while packed, eight codes at once. A tile of one
    group, as all are but for activation order, loads a scale and a zero a column, before it is known to be one;
    tiles of several load one of each a code.
    """
    PER_WORD: tl.constexpr = 32 // BITS
    LARGEST: tl.constexpr = (1 << BITS) - 1
    SLICE: tl.constexpr = COLUMNS if COLUMNS < 8 else 8
    word_rows = K // PER_WORD
    word_tiles = (word_rows + WORDS - 1) // WORDS
    pid = tl.program_id(0)
    n0 = (pid // word_tiles) * COLUMNS
    r0 = (pid % word_tiles) * WORDS

    across = tl.arange(0, COLUMNS)
    down = tl.arange(0, WORDS)
    j = tl.arange(0, PER_WORD)
    n_left = N - n0
    r_left = word_rows - r0
    words_start = qweight_ptr + r0.to(tl.int64) * N + n0  # a matrix may pass 2**31 elements; a tile does not
    out_start = out_ptr + n0.to(tl.int64) * K + r0 * PER_WORD
    within = down[:, None] * PER_WORD + j[None, :]
    words = tl.load(
        words_start + down[:, None] * N + across[None, :],
        mask=(down[:, None] < r_left) & (across[None, :] < n_left),
        other=0,
        eviction_policy="evict_first" if STREAMING else "",
    )
    one = tl.load(g_idx_ptr + r0 * PER_WORD)
    group = tl.load(g_idx_ptr + r0 * PER_WORD + within, mask=down[:, None] < r_left, other=one)
    known = (across < n_left) & (one >= 0) & (one < groups)
    row = one.to(tl.int64)
    scale = tl.load(scales_ptr + row * N + n0 + across, mask=known, other=float("nan")).to(tl.float32)
    zero = tl.load(qzeros_ptr + row * (N // PER_WORD) + (n0 + across) // PER_WORD, mask=known, other=0)
    if tl.reduce(group ^ one, None, _either) == 0:
        column = across[:, None, None]
        code = (tl.trans(words)[:, :, None] >> (j * BITS)[None, None, :]) & LARGEST
        zero = _zero_of(zero, n0 + across, BITS, OFFSET)
        bits = encode(_difference(code, zero[:, None, None]) * scale[:, None, None], KIND, HARDWARE)
        inside = (column < n_left) & (down[None, :, None] < r_left)
        out = out_start + column * K + within[None, :, :]
        tl.store(out, bits, mask=inside, cache_modifier=".cs" if STREAMING else "")
    else:
        # A slice of columns at a time: all at once would take the registers that the other branch's speed rests on.
        each = group[None, :, :].to(tl.int64)
        for first in range(0, COLUMNS, SLICE):
            place = first + tl.arange(0, SLICE)[:, None, None]
            wide = (place < n_left) & (down[None, :, None] < r_left)
            there = wide & (each >= 0) & (each < groups)
            factor = tl.load(scales_ptr + each * N + n0 + place, mask=there, other=float("nan")).to(tl.float32)
            stored = tl.load(qzeros_ptr + each * (N // PER_WORD) + (n0 + place) // PER_WORD, mask=there, other=0)
            word = tl.load(words_start + down[None, :, None] * N + place, mask=wide, other=0)
            code = (word >> (j * BITS)[None, None, :]) & LARGEST
            value = _difference(code, _zero_of(stored, n0 + place, BITS, OFFSET)) * factor
            tl.store(out_start + place * K + within[None, :, :], encode(value, KIND, HARDWARE), mask=wide)


# --- launcher ---------------------------------------------------------------------------------------------------------


def dequant(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int = 4,
    zero_offset: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    *,
    out: torch.Tensor | None = None,
    config: TileConfig = DEFAULT_CONFIG,
) -> torch.Tensor:
    """Dequantize one weight: by the Triton kernel on a GPU, by :func:`dequant_reference` on a CPU, to the same bits.

    Args:
        qweight: int32 [K * bits / 32, N].
        qzeros: int32 [groups, N * bits / 32].
        scales: float16 [groups, N].
        g_idx: int32 [K], each from 0 to groups - 1, in any order.
        bits: 4 or 8.
        zero_offset: 1 for ``checkpoint_format`` ``gptq``, 0 for ``gptq_v2``.
        dtype: bfloat16, float16 or float32.
        out: where to write, [N, K] of ``dtype``, contiguous, on the same device; made when absent.
        config: shape of the tiles.

    Returns:
        ``out``, on the current stream.

    Raises:
        ScaleError: tensors whose shapes or dtypes do not fit each other.
        PlanError: any other dtype, layout or device that cannot be.
    """
    _check_operands(qweight, qzeros, scales, g_idx, bits, zero_offset, dtype)
    n, k = scales.shape[1], g_idx.shape[0]
    if out is None:
        out = torch.empty((n, k), dtype=dtype, device=qweight.device)
    _check_layout((qweight, qzeros, scales, g_idx), out, (n, k), dtype)
    if out.numel() == 0:
        return out
    if not out.is_cuda and not interpreted():
        return out.copy_(dequant_reference(qweight, qzeros, scales, g_idx, bits, zero_offset, dtype))
    words = _words_a_tile(qweight.shape[0], scales.shape[0], config)
    tiles = triton.cdiv(n, config.columns) * triton.cdiv(qweight.shape[0], words)
    with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
        _dequant_kernel[(tiles,)](
            qweight, qzeros, scales, g_idx, out.view(_BITS_DTYPE[dtype]), n, k, scales.shape[0],
            BITS=bits, OFFSET=zero_offset, KIND=_KIND[dtype],
            HARDWARE=config.hardware_rounding and not interpreted() and torch.version.hip is None,
            COLUMNS=config.columns, WORDS=words, STREAMING=config.streaming, num_warps=config.num_warps,
        )  # fmt: skip
    return out


def _words_a_tile(word_rows: int, groups: int, config: TileConfig) -> int:
    """The largest power of two that is no more than the config's and, on average, a group's."""
    a_group = max(1, word_rows // groups)
    return min(config.words, 1 << (a_group.bit_length() - 1))


def _check_operands(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
    zero_offset: int,
    dtype: torch.dtype,
) -> None:
    per_word = _codes_per_word(bits)
    if zero_offset not in (0, 1):
        raise PlanError("no such offset of GPTQ zeros", expected="0 or 1", found=zero_offset)
    if dtype not in _KIND:
        raise PlanError("no such output of a dequantization", expected=", ".join(map(str, _KIND)), found=dtype)
    words, n = qweight.shape if qweight.dim() == 2 else (0, 0)
    groups = max(1, scales.shape[0] if scales.dim() else 0)
    operands = {
        "qweight": (qweight, torch.int32, [words, n // per_word * per_word]),
        "scales": (scales, torch.float16, [groups, n]),
        "qzeros": (qzeros, torch.int32, [groups, n // per_word]),
        "g_idx": (g_idx, torch.int32, [words * per_word]),
    }
    for name, (tensor, kind, shape) in operands.items():
        if tensor.dtype != kind or list(tensor.shape) != shape:
            raise ScaleError(
                f"{name} does not fit a GPTQ weight [{n}, {words * per_word}] of {bits} bits",
                expected=f"{kind} {shape}",
                found=f"{tensor.dtype} {list(tensor.shape)}",
            )


def _check_layout(
    operands: tuple[torch.Tensor, ...], out: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    if tuple(out.shape) != shape or out.dtype != dtype:
        raise PlanError(
            "output of a dequantization does not fit its weight",
            expected=f"{dtype} {list(shape)}",
            found=f"{out.dtype} {list(out.shape)}",
        )
    if not all(tensor.is_contiguous() for tensor in (*operands, out)):
        raise PlanError("the dequantization kernel needs contiguous tensors", fix="Call .contiguous() first.")
    devices = {str(tensor.device) for tensor in (*operands, out)}
    if len(devices) > 1:
        raise PlanError("parts of a GPTQ weight and the output lie on different devices", found=", ".join(devices))


# --- reference --------------------------------------------------------------------------------------------------------


def dequant_reference(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int = 4,
    zero_offset: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """The definition, in plain torch: what the kernels must equal, bit for bit. Arguments as for :func:`dequant`.

    Returns:
        [N, K] in ``dtype``, on the operands' device. Takes some 30 bytes an element on the way: not for large tensors.

    Raises:
        ScaleError, PlanError: operands that do not fit.
    """
    _check_operands(qweight, qzeros, scales, g_idx, bits, zero_offset, dtype)
    groups, n = scales.shape
    k, largest = g_idx.shape[0], (1 << bits) - 1
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=qweight.device)
    codes = ((qweight[:, None, :] >> shifts[None, :, None]) & largest).reshape(k, n)
    stored = ((qzeros[:, :, None] >> shifts[None, None, :]) & largest).reshape(groups, n)
    zeros = (stored + zero_offset) & largest
    inside = (g_idx >= 0) & (g_idx < groups)
    group = torch.where(inside, g_idx, 0).long()
    factor = scales.float()[group].masked_fill(~inside[:, None], torch.nan)
    value = ((codes - zeros[group]).float() * factor).t().contiguous()
    bits_out = value.to(dtype).view(_BITS_DTYPE[dtype])
    return bits_out.masked_fill_(value.isnan(), NAN_BITS[dtype]).view(dtype)
