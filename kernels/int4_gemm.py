"""Products with int4 and int8 GPTQ weights as they are stored: codes are unpacked in registers, never in memory.

``int4_linear(x, ...)`` is ``F.linear(x, w)``, where ``w`` is what ``cast --to bf16`` makes of the weight: each
``(code - zero) * float32(scale)``, rounded once to nearest even to BF16. The order of the sum over K alone is our own,
in F32; with the same operands, config and device it is the same in every run (no atomics).

A word of ``qweight`` holds the codes of neighbouring inputs, eight of 4 bits. A product with a strip of words is
therefore eight products, one for each place in the word, with every eighth input; codes stay in the thread that loaded
them. ``x`` is put into that order first, a copy of T * K numbers. Few outputs do not fill a GPU, so that K is split
among programs where there are few tokens; a second launch sums their parts, in F32 and always in the same order. From
``DEQUANT_TOKENS`` on the weight is dequantized to memory once, and BF16 does the rest.

The format is that of ``gptq_format``, where groups ascend (``g_idx[k] = k // group_size``: no activation order) and
zeros are one number throughout (``2**(bits - 1)``: symmetric):

- ``qweight`` I32 [K * bits / 32, N]: code j of word [r, n] is that of input ``r * 32 / bits + j``.
- ``scales`` F16 [ceil(K / group_size), N].
"""

# Triton compiles functions that cannot carry annotations; everything else in this file does.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch.nn.functional import linear, pad

from weightkit.errors import PlanError, ScaleError
from weightkit.kernels import gptq_format
from weightkit.kernels.conversions import encode, interpreted, nearest_bf16
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

_ONE_GROUP_SHIFT = 31  # word rows shifted by this are 0: group_size -1


def choose_config(tokens: int) -> TileConfig:
    """The config for tiles of up to ``tokens`` tokens."""
    if tokens <= 32:
        return TileConfig(max(16, triton.next_power_of_2(tokens)), columns=64, depth=16, num_stages=4)
    if tokens <= 64:
        return TileConfig(64, columns=64, depth=16, num_stages=4, weights_left=True)
    return TileConfig(128, columns=128, depth=16, num_warps=8, num_stages=3, weights_left=True)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _weight(
    words, scale, J: tl.constexpr,
    BITS: tl.constexpr, ZERO: tl.constexpr, KIND: tl.constexpr, HARDWARE: tl.constexpr,
):  # fmt: skip
    """Code J of each word -> its weight.

    A code put into the mantissa of 2**23, at the place it has in the word, makes it larger by that number. Less 2**23
    and the zero, that is the difference times a power of two, exactly; the scale takes the power back. Three operations
    a code, where the conversion of an integer alone runs at a quarter of their rate.
    """
    PLACE: tl.constexpr = BITS * J % 16  # a mantissa has 23 bits: upper halves come down first
    held = words >> (BITS * J - PLACE)
    number = (held & (((1 << BITS) - 1) << PLACE)) | 0x4B000000
    difference = number.to(tl.float32, bitcast=True) - (8388608.0 + ZERO * (1 << PLACE))
    return nearest_bf16(difference * (scale * (1.0 / (1 << PLACE))), KIND, HARDWARE)


@triton.jit(do_not_specialize=["rows", "total_rows", "steps", "group_shift"])
def _matrix_kernel(
    x, qweight, scales, out, table, rows, total_rows, steps, N, words, width, group_shift,
    TABLE: tl.constexpr, ALIGNED: tl.constexpr, ONE_GROUP: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr,
    KIND: tl.constexpr, OUT_KIND: tl.constexpr, HARDWARE: tl.constexpr, UNPACK: tl.constexpr, LEFT: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x [., width] as by ``_arranged``, qweight [words, N], scales [groups, N] -> out [splits, total_rows, N].

    Programs are (tile, split); without a table neighbours differ in tokens alone, so that they find the words in L2.
    With one, a tile of tokens is a job: addresses of qweight and scales, first row of x, first row of the output, rows.

    Tensor cores take weights from the registers that they are made in, on either side where a tile has few tokens, and
    from 64 on (Hopper's) on the left alone.

    steps: what a split takes, along K; STEPS, the same for the interpreter, some of which loop over no other number.
    UNPACK: the assembly of ``_unpack_assembly`` for all codes of a word at once, or nothing: ``_weight`` for each.
    """
    PER_WORD: tl.constexpr = 32 // BITS
    column_tiles = (N + COLUMNS - 1) // COLUMNS
    token_tiles = (rows + TOKENS - 1) // TOKENS
    split = tl.program_id(1)
    if TABLE:
        record = table + (tl.program_id(0) // column_tiles) * 5
        column_tile = tl.program_id(0) % column_tiles
        qweight = tl.load(record).to(tl.pointer_type(tl.int32))
        scales = tl.load(record + 1).to(tl.pointer_type(tl.float16))
        if ALIGNED:  # Triton learns this of arguments by itself, of loaded values it must be told
            qweight = tl.multiple_of(qweight, 16)
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
        row = tl.arange(0, DEPTH)[None, :]
        row_of_x = tl.arange(0, DEPTH)[:, None]
        total = tl.full((COLUMNS, TOKENS), 0.0, tl.float32)
    else:
        n = flat_n[None, :]
        token = tl.arange(0, TOKENS)[:, None]
        row = tl.arange(0, DEPTH)[:, None]
        row_of_x = tl.arange(0, DEPTH)[None, :]
        total = tl.full((TOKENS, COLUMNS), 0.0, tl.float32)
    start = split * (steps * DEPTH)
    inputs = x + (first_x + token) * width + start * PER_WORD + row_of_x
    present = token < count

    for step in tl.range(steps if STEPS == 0 else STEPS, num_stages=STAGES):
        first = start + step * DEPTH  # past the words' end, x is filled up with zeros
        r = first + row
        inside = (r < words) & (n < N)
        held = tl.load(qweight + r.to(tl.int64) * N + n, mask=inside, other=0)
        if ONE_GROUP:  # loaded flat: Triton 3.6 and 3.7 move weights through memory where a scale has two dimensions
            known = (flat_n < N) & (first < words)
            flat = tl.load(scales + (first >> group_shift) * N + flat_n, mask=known, other=0.0)
            scale = (flat[:, None] if LEFT else flat[None, :]).to(tl.float32)
        else:
            scale = tl.load(scales + (r >> group_shift) * N + n, mask=inside, other=0.0).to(tl.float32)
        if UNPACK != "":
            high = scale.to(tl.bfloat16)
            low = scale - high.to(tl.float32)
            low = tl.where(low == low, low, 0.0).to(tl.bfloat16)  # Inf - Inf
            weights = tl.inline_asm_elementwise(
                UNPACK, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r", [held, high, low],
                dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
                       tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
                is_pure=True, pack=2,
            )  # fmt: skip
        for j in tl.static_range(PER_WORD):
            values = tl.load(inputs + (step * PER_WORD + j) * DEPTH, mask=present, other=0.0)
            if not HARDWARE:
                values = values.to(tl.float32)
            weight = weights[j] if UNPACK != "" else _weight(held, scale, j, BITS, ZERO, KIND, HARDWARE)
            if LEFT:
                total = tl.dot(weight, values, total, input_precision="ieee")
            else:
                total = tl.dot(values, weight, total, input_precision="ieee")

    place = out + (split.to(tl.int64) * total_rows + first_out + token) * N + n
    tl.store(place, encode(total, OUT_KIND, HARDWARE), mask=present & (n < N))


@lru_cache(maxsize=16)
def _unpack_assembly(zero: int) -> str:
    """PTX: two words of eight codes and their scales, in two parts -> eight pairs of BF16 weights.

    A code in the mantissa of BF16 128 makes it 128 + code: less 128 + zero that is the difference d, exactly. A scale s
    of F16 has 11 bits. ``high`` is s rounded to BF16, 8 bits, and ``low`` the rest, at most 3; d has 4 or, below 0, 4
    and a sign. So d * low is exact in BF16, and the fused d * high + d * low is d * s rounded once, to nearest even:
    what F32 and a conversion give, for two weights at a time.
    """
    lines = [
        "{",
        ".reg .b32 first, second, part, shifted, code, d, rest, one, less, mask, place, none;",
        "mov.b32 one, 0x3F803F80;",
        f"mov.b32 less, {0x10001 * (0xC300 + zero):#x};",  # -(128 + zero), twice
        "mov.b32 mask, 0x000F000F;",
        "mov.b32 place, 0x43004300;",  # 128
        "mov.b32 none, 0x80008000;",  # -0: added to a product, it leaves even the sign of a zero
        "prmt.b32 first, $8, $9, 0x5410;",  # the lower halves of both words: places 0 to 3
        "prmt.b32 second, $8, $9, 0x7632;",
    ]
    for j in range(8):
        half = ("first", "second")[j // 4]
        lines += [
            f"shr.b32 shifted, {half}, {4 * (j % 4)};",
            "lop3.b32 code, shifted, mask, place, 0xEA;",  # (shifted & mask) | place
            "fma.rn.bf16x2 d, code, one, less;",
            "fma.rn.bf16x2 rest, d, $11, none;",
            f"fma.rn.bf16x2 ${j}, d, $10, rest;",
        ]
    return "\n".join([*lines, "}"])


# --- launchers --------------------------------------------------------------------------------------------------------


def int4_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    *,
    group_size: int,
    bits: int = 4,
    zero: int | None = None,
    config: TileConfig | None = None,
) -> torch.Tensor:
    """``F.linear(x, w)`` with the BF16 weight that the codes stand for.

    Args:
        x: [..., K], BF16, F16 or F32. Weights are rounded to BF16 and then taken in x's dtype.
        qweight: I32 [K * bits / 32, N].
        scales: F16 [ceil(K / group_size), N].
        group_size: inputs that share a scale: a power of two, at least ``32 / bits``; or -1: all.
        bits: 4 or 8.
        zero: the code that stands for 0; ``2**(bits - 1)`` by default.
        config: shape of the tiles, which then serve for any number of tokens. By default ``choose_config`` finds one,
            and from ``DEQUANT_TOKENS`` tokens on the weight is dequantized to memory first, 2 * N * K bytes.

    Returns:
        [..., N] in x's dtype, on the current stream. On a CPU without Triton's interpreter: the reference's.

    Raises:
        ScaleError: weights and scales that do not fit each other.
        PlanError: any other dtype, shape, layout or device that cannot be.
    """
    flat = _checked(x, [qweight], [scales], group_size, bits, zero)
    zero = _zero_of(bits, zero)
    if not flat.is_cuda and not interpreted():
        found = int4_linear_reference(flat, qweight, scales, group_size=group_size, bits=bits, zero=zero)
    elif config is None and len(flat) >= DEQUANT_TOKENS and scales.shape[1] % (32 // bits) == 0:
        found = linear(flat, _dequantized(qweight, scales, group_size, bits, zero).to(x.dtype))
    else:
        found = _launch(flat, [qweight], [scales], None, None, group_size, bits, zero, config)
    return found.view(*x.shape[:-1], scales.shape[1])


def int4_experts(
    x: torch.Tensor,
    qweights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    counts: Sequence[int],
    *,
    starts: Sequence[int] | None = None,
    group_size: int,
    bits: int = 4,
    zero: int | None = None,
    config: TileConfig | None = None,
) -> torch.Tensor:
    """Products with several weights of one shape, each with some of x's rows, in one launch (or two).

    Experts' gate and up projections are one such list: the gates, the ups, and each expert's start twice.

    Args:
        x: [rows, K], the tokens sorted by expert.
        qweights, scales: of each expert, as for :func:`int4_linear`.
        counts: rows of each, on the host; may be 0.
        starts: the first row of each; by default they follow each other.
        group_size, bits, zero, config: as for :func:`int4_linear`.

    Returns:
        [sum(counts), N]: the experts' outputs one after the other, in the order of the list.

    Raises:
        As :func:`int4_linear`.
    """
    if not qweights:
        raise PlanError("a product with no weights has no outputs", fix="Leave experts without tokens to the caller.")
    flat = _checked(x, qweights, scales, group_size, bits, zero)
    first = check_jobs(len(flat), len(qweights), len(scales), starts, counts)
    zero = _zero_of(bits, zero)
    n = scales[0].shape[1]
    if sum(counts) == 0:
        return x.new_empty((0, n))
    on_cpu = not flat.is_cuda and not interpreted()
    if not on_cpu and (config is not None or max(counts) < DEQUANT_TOKENS):
        return _launch(flat, qweights, scales, first, counts, group_size, bits, zero, config)
    parts = [
        int4_linear(flat[start : start + count], qweight, scale, group_size=group_size, bits=bits, zero=zero)
        for qweight, scale, start, count in zip(qweights, scales, first, counts, strict=True)
        if count
    ]
    return torch.cat(parts)


def experts_config(counts: Sequence[int], shape: tuple[int, int], device: torch.device, *, bits: int = 4) -> TileConfig:
    """The config that :func:`int4_experts` takes for all these jobs by itself, to be given to launches of some of them.

    Each job's bits are then the same however the list is cut into launches.

    Args:
        counts: rows of each job; the largest is at least 1.
        shape: N and K of each weight.
        device: where they lie.
        bits: as for :func:`int4_linear`.
    """
    config = choose_config(max(counts))
    outputs, inputs = shape
    return config_of_jobs(config, outputs, triton.cdiv(inputs * bits // 32, config.depth), counts, device)


def _launch(
    x: torch.Tensor,
    qweights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    starts: Sequence[int] | None,
    counts: Sequence[int] | None,
    group_size: int,
    bits: int,
    zero: int,
    config: TileConfig | None,
) -> torch.Tensor:
    """One weight with all of x [rows, K], or the jobs of a table where there are ``starts`` and ``counts``."""
    words, n = qweights[0].shape
    rows = len(x) if counts is None else sum(counts)
    out = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    if out.numel() == 0 or words == 0:
        return out.zero_()
    config = config or choose_config(len(x) if counts is None else max(counts))
    table: torch.Tensor | None = None
    if counts is not None and starts is not None:
        table = job_table(qweights, scales, starts, counts, config.tokens)
    token_tiles = triton.cdiv(rows, config.tokens) if table is None else len(table)
    tiles = triton.cdiv(n, config.columns) * token_tiles
    split = split_of(config, tiles, triton.cdiv(words, config.depth), x.device)
    parts = out if split.parts == 1 else torch.empty((split.parts, rows, n), dtype=torch.float32, device=x.device)
    per_word = 32 // bits
    step_bytes = config.depth * (config.tokens * per_word * x.element_size() + config.columns * 4)
    stages = stages_of(config, step_bytes, x.device)
    arranged = _arranged(x, config.depth, split.parts * split.steps, bits)
    with on_device(x):
        _matrix_kernel[(tiles, split.parts)](
            arranged, qweights[0], scales[0], parts.view(BITS_DTYPE[parts.dtype]),
            qweights[0] if table is None else table, rows, rows, split.steps, n, words, arranged.shape[1],
            _group_shift(group_size, bits),
            TABLE=table is not None, ALIGNED=table is not None and aligned(qweights, scales),
            OUT_KIND=KINDS[parts.dtype], STEPS=split.steps if interpreted() else 0, STAGES=stages,
            num_warps=config.num_warps, num_stages=stages,
            **_options(KINDS[x.dtype], group_size, bits, zero, config),
        )  # fmt: skip
        if split.parts > 1:
            sum_parts(parts, out)
    return out


def _options(kind: str, group_size: int, bits: int, zero: int, config: TileConfig) -> dict[str, Any]:
    hardware = not interpreted() and torch.version.hip is None
    strip = config.depth * 32 // bits
    return {
        "ONE_GROUP": group_size == -1 or group_size % strip == 0,
        "BITS": bits,
        "ZERO": zero,
        "KIND": kind,
        "HARDWARE": hardware,
        "UNPACK": _unpack_assembly(zero) if hardware and bits == 4 and kind == "BF16" else "",
        "LEFT": config.weights_left,
        "TOKENS": config.tokens,
        "COLUMNS": config.columns,
        "DEPTH": config.depth,
    }


def _arranged(x: torch.Tensor, depth: int, steps: int, bits: int) -> torch.Tensor:
    """[rows, steps * depth * 32 / bits], filled up with zeros: of each step the inputs of place 0, then of place 1."""
    per_word = 32 // bits
    short = steps * depth * per_word - x.shape[1]
    whole = pad(x, (0, short)) if short else x
    return whole.view(len(x), steps, depth, per_word).transpose(2, 3).contiguous().view(len(x), -1)


def _dequantized(qweight: torch.Tensor, scales: torch.Tensor, group_size: int, bits: int, zero: int) -> torch.Tensor:
    """BF16 [N, K], by ``gptq_format``, whose tensors of zeros and groups are made for it."""
    groups, n = scales.shape
    inputs = qweight.shape[0] * 32 // bits
    zeros = gptq_format.pack_zeros(groups, n, bits, zero, zero_offset=0, device=scales.device)
    group_of = torch.arange(inputs, dtype=torch.int32, device=scales.device)
    group_of = group_of // group_size if group_size != -1 else torch.zeros_like(group_of)
    return gptq_format.dequant(qweight, zeros, scales, group_of, bits, 0, torch.bfloat16)


def _group_shift(group_size: int, bits: int) -> int:
    """Shifts a row of words to its group."""
    return _ONE_GROUP_SHIFT if group_size == -1 else (group_size * bits // 32).bit_length() - 1


def _zero_of(bits: int, zero: int | None) -> int:
    return 1 << (bits - 1) if zero is None else zero


def _checked(
    x: torch.Tensor,
    qweights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    group_size: int,
    bits: int,
    zero: int | None,
) -> torch.Tensor:
    """Refuse what the kernels would misread; return x as contiguous rows."""
    if bits not in (4, 8):
        raise PlanError("no such width of GPTQ codes", expected="4 or 8 bits", found=bits)
    if not 0 <= _zero_of(bits, zero) < 1 << bits:
        raise PlanError("no such code to stand for 0", expected=f"0 to {(1 << bits) - 1}", found=zero)
    per_word = 32 // bits
    if group_size != -1 and (group_size < per_word or group_size & (group_size - 1)):
        raise PlanError(
            "groups that the kernel does not know", expected=f"-1 or a power of two from {per_word}", found=group_size
        )
    words, n = qweights[0].shape if qweights[0].dim() == 2 else (0, 0)
    inputs = words * per_word
    groups = 1 if group_size == -1 else max(1, -(-inputs // group_size))
    for tensors, kind, shape, name in (
        (qweights, torch.int32, (words, n), "qweight"),
        (scales, torch.float16, (groups, n), "scales"),
    ):
        for tensor in tensors:
            if tensor.dtype != kind or tensor.shape != shape:
                raise ScaleError(
                    f"{name} does not fit a GPTQ weight [{n}, {inputs}] of {bits} bits, groups of {group_size}",
                    expected=f"{kind} {list(shape)}",
                    found=f"{tensor.dtype} {list(tensor.shape)}",
                )
    check_rows(x, inputs)
    check_place([x, *qweights, *scales])
    return x.reshape(-1, inputs).contiguous()


# --- reference --------------------------------------------------------------------------------------------------------


def int4_linear_reference(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    *,
    group_size: int,
    bits: int = 4,
    zero: int | None = None,
) -> torch.Tensor:
    """The definition in plain torch: the BF16 weight, in x's dtype, and a sum in F32. Arguments as :func:`int4_linear`.

    Returns:
        [..., N] in x's dtype. Takes some 30 bytes a weight on the way: not for large ones.
    """
    _checked(x, [qweight], [scales], group_size, bits, zero)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=qweight.device)
    codes = ((qweight[:, None, :] >> shifts[None, :, None]) & ((1 << bits) - 1)).flatten(0, 1)
    inputs = len(codes)
    each = scales.float().repeat_interleave(inputs if group_size == -1 else group_size, dim=0)[:inputs]
    weight = ((codes - _zero_of(bits, zero)).float() * each).to(torch.bfloat16).to(x.dtype)
    return linear(x.float(), weight.float().t()).to(x.dtype)
