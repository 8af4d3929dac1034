"""GPTQ: weights to integers so that the products with what was seen in calibration change least.

For one linear map with weight W [N, K] and inputs X [T, K], GPTQ (Frantar et al., 2022, arXiv:2210.17323) rounds column
after column and lets the columns that are still to come make up for the error so far. With H = X^T X + damping and its
Cholesky factor H = C C^T that is, for the positions p = K-1, ..., 0 of some order of the columns,

    q[p] = round(w[p] + sum over j > p of C[j, p] / C[p, p] * (w[j] - q[j]))

The usual form goes the other way and works with the factor of H^-1, which costs an inversion more. The two are the same
rounding (H^-1 = C^-T C^-1, whose factor's rows are what the errors are spread by; Chen et al., 2025, arXiv:2507.18553,
derive it as Babai's nearest plane): here it takes one Cholesky factorization, and no triangular solve.

Matrices are transposed, [K, N], as the format stores them: a column of W is then contiguous, and so is what a kernel
reads at each step. Grids are symmetric: value = (code - 2^(bits-1)) * scale, scales rounded to F16 before any use.
"""

# Triton compiles functions that cannot carry annotations; everything else in this file does.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from weightkit.kernels.gemm_plan import on_device

BLOCK = 128
"""Columns that one launch rounds; their errors reach the columns before them in one product."""

SUPERBLOCK = 1024
"""Columns that are kept up to date block by block; those before them get all their errors in one larger product."""

SMALLEST_SCALE = 2.0**-24
"""The smallest positive F16."""

SEARCH_STEPS = 20
SEARCH_FLOOR = 0.6
"""A scale search tries so many fractions of the largest weight, from 1 down to this."""

LARGEST_TILE = 256
"""Columns of a group that the search keeps in registers: a kernel for more would take minutes to compile, and spill."""


@dataclass(frozen=True)
class Factor:
    """A factorized Hessian.

    Attributes:
        order: [K] I64: the column at each position; rounding begins at the last.
        ratios: [K, K] F32, below the diagonal C[j, p] / C[p, p]; the rest holds anything.
        damping: what was added to the diagonal, as a fraction of its mean.
        retries: factorizations that failed before, with less damping.
    """

    order: torch.Tensor
    ratios: torch.Tensor
    damping: float
    retries: int


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _round_columns_kernel(
    weight, target, scales, group_of, ratios, codes, errors,
    n, k, start, count,
    ZERO: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Round positions start + count - 1 down to start, for BLOCK_N outputs, whose targets stay in registers.

    What a step reads does not depend on the one before, so that each step asks for the next one's first.
    """
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = out < n
    place = tl.arange(0, BLOCK)
    tile_inside = (place < count)[:, None] & inside[None, :]
    tile = tl.load(target + (start + place)[:, None].to(tl.int64) * n + out[None, :], mask=tile_inside, other=0.0)

    position = start + count - 1
    scale = tl.load(scales + tl.load(group_of + position) * n + out, mask=inside, other=1.0)
    original = tl.load(weight + position.to(tl.int64) * n + out, mask=inside, other=0.0)
    ratio = tl.load(ratios + position.to(tl.int64) * k + start + place, mask=place < count - 1, other=0.0)
    for step in range(count):
        i = count - 1 - step
        position = start + i
        before = tl.maximum(position - 1, 0)
        next_scale = tl.load(scales + tl.load(group_of + before) * n + out, mask=inside, other=1.0)
        next_original = tl.load(weight + before.to(tl.int64) * n + out, mask=inside, other=0.0)
        next_ratio = tl.load(ratios + before.to(tl.int64) * k + start + place, mask=place < i - 1, other=0.0)

        wanted = tl.sum(tl.where(place[:, None] == i, tile, 0.0), axis=0)
        code = tl.floor(wanted / scale + (ZERO + 0.5))
        code = tl.minimum(tl.maximum(code, 0.0), TOP)
        error = original - (code - ZERO) * scale
        tl.store(codes + position.to(tl.int64) * n + out, code.to(tl.uint8), mask=inside)
        tl.store(errors + position.to(tl.int64) * n + out, error, mask=inside)
        tile += ratio[:, None] * error[None, :]

        scale, original, ratio = next_scale, next_original, next_ratio


@triton.jit
def _gram_kernel(
    rows, out, tokens, k,
    BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Add one tile of rows^T rows on or below the diagonal: program number -> (row, column) of the triangle."""
    number = tl.program_id(0)
    i = ((tl.sqrt(8.0 * number.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where(i * (i + 1) // 2 > number, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= number, i + 1, i)
    j = number - i * (i + 1) // 2
    left, right = i * BLOCK_K + tl.arange(0, BLOCK_K), j * BLOCK_K + tl.arange(0, BLOCK_K)
    left_inside, right_inside = left < k, right < k
    token = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    for first in range(0, tokens, BLOCK_T):
        at = (first + token).to(tl.int64) * k
        present = first + token < tokens
        a = tl.load(rows + at[:, None] + left[None, :], mask=present[:, None] & left_inside[None, :], other=0.0)
        b = tl.load(rows + at[:, None] + right[None, :], mask=present[:, None] & right_inside[None, :], other=0.0)
        total = tl.dot(tl.trans(a), b, total)
    place = out + left[:, None].to(tl.int64) * k + right[None, :]
    inside = left_inside[:, None] & right_inside[None, :]
    total += tl.load(place, mask=inside, other=0.0)
    tl.store(place, total, mask=inside)


@triton.jit
def _reorder_kernel(hessian, order, out, added, k, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """out[i, j] = H[order[i], order[j]] (+ added on the diagonal), of an H that is filled below the diagonal alone."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    row = tl.load(order + i, mask=i < k, other=0)[:, None]
    column = tl.load(order + j, mask=j < k, other=0)[None, :]
    inside = (i < k)[:, None] & (j < k)[None, :]
    low, high = tl.minimum(row, column), tl.maximum(row, column)
    value = tl.load(hessian + high * k + low, mask=inside, other=0.0)
    value += tl.where(i[:, None] == j[None, :], tl.load(added), 0.0)
    tl.store(out + i[:, None].to(tl.int64) * k + j[None, :], value, mask=inside)


@triton.jit
def _search_scales_kernel(
    weight, importance, scales, n, group_size, k,
    ZERO: tl.constexpr, TOP: tl.constexpr, STEPS: tl.constexpr, FLOOR: tl.constexpr, SMALLEST: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The scale of each group of BLOCK_N outputs that leaves the least error, columns weighed by ``importance``."""
    group = tl.program_id(1)
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    place = tl.arange(0, GROUP)
    column = group * group_size + place
    present = (place < group_size) & (column < k)
    inside = present[:, None] & (out < n)[None, :]
    tile = tl.load(weight + column[:, None].to(tl.int64) * n + out[None, :], mask=inside, other=0.0)
    counts = tl.load(importance + column, mask=present, other=0.0)[:, None]
    largest = tl.max(tl.abs(tile), axis=0)
    best_scale = tl.full((BLOCK_N,), float("inf"), tl.float32)
    best_loss = tl.full((BLOCK_N,), float("inf"), tl.float32)
    for step in range(STEPS):
        fraction = 1.0 - step * ((1.0 - FLOOR) / STEPS)
        scale = tl.where(largest > 0.0, largest * (fraction * 2.0 / TOP), 1.0)
        scale = tl.maximum(scale, SMALLEST).to(tl.float16).to(tl.float32)
        code = tl.minimum(tl.maximum(tl.floor(tile / scale[None, :] + (ZERO + 0.5)), 0.0), TOP)
        error = tile - (code - ZERO) * scale[None, :]
        loss = tl.sum(counts * error * error, axis=0)
        better = loss < best_loss
        best_loss = tl.where(better, loss, best_loss)
        best_scale = tl.where(better, scale, best_scale)
    tl.store(scales + group * n + out, best_scale, mask=out < n)


# --- launchers --------------------------------------------------------------------------------------------------------


def _kernels_run(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"


def add_gram(hessian: torch.Tensor, rows: torch.Tensor) -> None:
    """Add rows^T rows to the lower triangle of ``hessian`` [K, K] F32.

    ``rows`` [T, K]: in BF16 and F16 products are exact and summed in F32, on the tensor cores; F32 in F32.
    """
    if _kernels_run(rows) and rows.dtype != torch.float32:
        tokens, k = rows.shape
        tiles = triton.cdiv(k, 128)
        with on_device(rows):
            _gram_kernel[(tiles * (tiles + 1) // 2,)](
                rows, hessian, tokens, k, BLOCK_K=128, BLOCK_T=64, num_warps=4, num_stages=4
            )
        return
    wide = rows.float()
    hessian.addmm_(wide.T, wide)


def factorize(
    hessian: torch.Tensor, *, act_order: bool, damping: float, attempts: int = 6, growth: float = 10.0
) -> Factor:
    """Order, dampen and factorize ``hessian`` [K, K] F32, of which the lower triangle is read.

    Args:
        act_order: round the columns with the largest inputs first; else in their own order.
        damping: added to the diagonal, as a fraction of its mean.
        attempts: factorizations tried, each with ``growth`` times the damping of the last.

    Raises:
        FloatingPointError: inputs that are not finite.
        ArithmeticError: no factorization that succeeded, whatever the damping.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise FloatingPointError("the inputs hold NaN or Inf, or their squares do not fit F32")
    if act_order:
        order = torch.argsort(diagonal, stable=True)
    else:
        order = torch.arange(len(diagonal) - 1, -1, -1, device=hessian.device)
    mean = diagonal.mean()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    for attempt in range(attempts):
        factor, failed = torch.linalg.cholesky_ex(reorder(hessian, order, damping * mean))
        if not int(failed):
            # cuSOLVER fills it column by column; a position's ratios are read together
            return Factor(order, (factor / factor.diagonal()).contiguous(), damping, attempt)
        if attempt + 1 < attempts:
            damping = max(damping, 1e-4) * growth
    raise ArithmeticError(f"the Hessian has no Cholesky factor, with damping up to {damping:g} of its mean diagonal")


def reorder(hessian: torch.Tensor, order: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """Rows and columns in ``order``, with ``added`` on the diagonal; of ``hessian`` the lower triangle is read."""
    if not _kernels_run(hessian):
        whole = hessian.tril() + hessian.tril(-1).T
        ordered = whole[order][:, order]
        ordered.diagonal().add_(added)
        return ordered
    k = len(hessian)
    out = torch.empty_like(hessian)
    with on_device(hessian):
        _reorder_kernel[(k, triton.cdiv(k, 1024))](hessian, order, out, added, k, BLOCK_I=1, BLOCK_J=1024)
    return out


def solve(weight: torch.Tensor, scales: torch.Tensor, factor: Factor, *, group_size: int, bits: int) -> torch.Tensor:
    """GPTQ's codes.

    Args:
        weight: [K, N] F32, the transposed weight.
        scales: [groups, N] F32, of the groups of ``group_size`` columns in their own order.
        factor: of the inputs' Hessian.

    Returns: codes [K, N] U8, columns in their own order.
    """
    k = len(weight)
    weight = weight[factor.order]
    group_of = (factor.order // group_size).to(torch.int32)
    target, errors = weight.clone(), torch.empty_like(weight)
    codes = torch.empty_like(weight, dtype=torch.uint8)
    ratios = factor.ratios
    for high in range(k, 0, -SUPERBLOCK):
        low = max(0, high - SUPERBLOCK)
        for end in range(high, low, -BLOCK):
            start = max(low, end - BLOCK)
            round_columns(weight, target, scales, group_of, ratios, codes, errors, start, end, bits)
            if start > low:
                target[low:start].addmm_(ratios[start:end, low:start].T, errors[start:end])
        if low:
            target[:low].addmm_(ratios[low:high, :low].T, errors[low:high])
    ordered = torch.empty_like(codes)
    ordered[factor.order] = codes
    return ordered


def round_columns(
    weight: torch.Tensor, target: torch.Tensor, scales: torch.Tensor, group_of: torch.Tensor, ratios: torch.Tensor,
    codes: torch.Tensor, errors: torch.Tensor, start: int, end: int, bits: int,
) -> None:  # fmt: skip
    """Round positions end-1 down to start; see ``_round_columns_kernel``."""
    k, n = weight.shape
    zero, top = 1 << (bits - 1), (1 << bits) - 1
    if _kernels_run(weight):
        block_n = 16
        with on_device(weight):
            _round_columns_kernel[(triton.cdiv(n, block_n),)](
                weight, target, scales, group_of, ratios, codes, errors, n, k, start, end - start,
                ZERO=zero, TOP=top, BLOCK=BLOCK, BLOCK_N=block_n, num_warps=1,
            )  # fmt: skip
        return
    for position in range(end - 1, start - 1, -1):
        scale = scales[group_of[position]]
        code = torch.floor(target[position] / scale + (zero + 0.5)).clamp_(0, top)
        errors[position] = weight[position] - (code - zero) * scale
        codes[position] = code.to(torch.uint8)
        target[start:position].addr_(ratios[position, start:position], errors[position])


def largest_scales(weight: torch.Tensor, *, group_size: int, bits: int) -> torch.Tensor:
    """[groups, N] F32, as F16 holds them: the grid of 2^bits values just spans each group's largest magnitude.

    ``weight`` is [K, N] F32. A group of zeros has the scale 1.
    """
    largest = _grouped(weight, group_size).abs().amax(dim=1)
    scales = largest * (2.0 / ((1 << bits) - 1))
    scales = scales.clamp_(min=SMALLEST_SCALE).half().float()
    return torch.where(largest > 0, scales, torch.ones_like(scales))


def _grouped(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """[groups, group_size, N], a short last group filled with zeros."""
    k, n = weight.shape
    short = -k % group_size
    if short:
        weight = torch.cat((weight, weight.new_zeros(short, n)))
    return weight.view(-1, group_size, n)


def search_scales(weight: torch.Tensor, importance: torch.Tensor, *, group_size: int, bits: int) -> torch.Tensor:
    """Scales [groups, N] F32 with the least sum of ``importance`` [K] times squared rounding error, of
    ``SEARCH_STEPS`` fractions of ``largest_scales``; Inf where no error is finite: of NaN, of what F16 cannot span."""
    k, n = weight.shape
    zero, top = 1 << (bits - 1), (1 << bits) - 1
    if _kernels_run(weight) and group_size <= LARGEST_TILE:
        groups, block_n = triton.cdiv(k, group_size), 32
        scales = weight.new_empty(groups, n)
        with on_device(weight):
            _search_scales_kernel[(triton.cdiv(n, block_n), groups)](
                weight, importance, scales, n, group_size, k,
                ZERO=zero, TOP=top, STEPS=SEARCH_STEPS, FLOOR=SEARCH_FLOOR, SMALLEST=SMALLEST_SCALE,
                GROUP=triton.next_power_of_2(group_size), BLOCK_N=block_n, num_warps=4,
            )  # fmt: skip
        return scales
    grouped = _grouped(weight, group_size)
    counts = _grouped(importance[:, None], group_size)
    largest = grouped.abs().amax(dim=1)
    best_scale = best_loss = torch.full_like(largest, float("inf"))
    for step in range(SEARCH_STEPS):
        fraction = 1.0 - step * ((1.0 - SEARCH_FLOOR) / SEARCH_STEPS)
        scale = torch.where(largest > 0, largest * (fraction * 2.0 / top), torch.ones_like(largest))
        scale = scale.clamp_(min=SMALLEST_SCALE).half().float()
        code = torch.floor(grouped / scale[:, None] + (zero + 0.5)).clamp_(0, top)
        loss = (counts * (grouped - (code - zero) * scale[:, None]).square()).sum(dim=1)
        better = loss < best_loss
        best_scale, best_loss = torch.where(better, scale, best_scale), torch.where(better, loss, best_loss)
    return best_scale


def round_to_nearest(weight: torch.Tensor, scales: torch.Tensor, *, group_size: int, bits: int) -> torch.Tensor:
    """Codes [K, N] U8 by rounding alone. See ``solve`` for the arguments."""
    zero, top = 1 << (bits - 1), (1 << bits) - 1
    each = scales.repeat_interleave(group_size, dim=0)[: len(weight)]
    return torch.floor(weight / each + (zero + 0.5)).clamp_(0, top).to(torch.uint8)


def values(codes: torch.Tensor, scales: torch.Tensor, *, group_size: int, bits: int) -> torch.Tensor:
    """[K, N] F32: (code - zero) * scale, exactly."""
    each = scales.repeat_interleave(group_size, dim=0)[: len(codes)]
    return (codes.float() - (1 << (bits - 1))) * each


# --- reference --------------------------------------------------------------------------------------------------------


def solve_reference(
    weight: torch.Tensor, scales: torch.Tensor, hessian: torch.Tensor, order: torch.Tensor, added: float,
    *, group_size: int, bits: int,
) -> torch.Tensor:  # fmt: skip
    """The same codes [K, N] by the textbook: F64, the factor of the inverse Hessian, one column after the other.

    ``order`` lists the columns as they are rounded, first to last (``Factor.order`` reversed).
    """
    k = len(weight)
    zero, top = 1 << (bits - 1), (1 << bits) - 1
    damped = hessian.double()[order][:, order] + added * torch.eye(k, dtype=torch.float64, device=hessian.device)
    spread = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    target, codes = weight.double()[order], torch.empty_like(weight, dtype=torch.uint8)
    for i, column in enumerate(order.tolist()):
        scale = scales[column // group_size].double()
        code = torch.floor(target[i] / scale + (zero + 0.5)).clamp_(0, top)
        codes[column] = code.to(torch.uint8)
        error = (target[i] - (code - zero) * scale) / spread[i, i]
        target[i:] -= spread[i, i:, None] * error
    return codes
