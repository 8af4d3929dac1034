"""Kernels of products that are held against plain torch when they first compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from weightkit.checkpoint.tensors import FP8_BLOCK
from weightkit.compute.bounds import beyond_roundings
from weightkit.compute.trial import LEAVE_OUT
from weightkit.errors import DeviceError
from weightkit.model.products import Operands, Products

if TYPE_CHECKING:
    from weightkit.kernels.gemm_plan import TileConfig

EDGE_ROWS = 8
"""Of the rows of a product so many are looked at, from the first on and to the last."""

SMALLEST_TILE, LARGEST_TILE = 16, 128
"""Tokens of a tile: kernels of their own serve numbers of rows between powers of two from here to there."""


class CheckedProducts(Products):
    """``Products``, of which the first of each kind is computed again, in part, by plain torch on the CPU.

    A GPU that multiplies wrongly, or a compiler that translates wrongly for it, would give plausible words. Kernels are
    compiled for the shape, the number of rows and what shares a launch, so that each such kind is looked at when it is
    first used, where it has to be compiled anyway: some 30 ms each of one core, for 7168 inputs. Methods raise
    ``DeviceError`` where a number is further off than roundings explain.
    """

    def __init__(self, fp8: ModuleType, int4: ModuleType) -> None:
        super().__init__(fp8, int4)
        self._seen: set[tuple[object, ...]] = set()

    def linear(self, x: torch.Tensor, weight: Operands) -> torch.Tensor:
        """See ``Products.linear``."""
        found = super().linear(x, weight)
        inputs = weight.form.shape[1]
        rows = x.numel() // inputs
        kind = (weight.form, weight.groups, _tile(rows))
        if kind not in self._seen and rows:
            from weightkit.kernels.gemm_plan import DEQUANT_TOKENS

            if rows < DEQUANT_TOKENS:  # else it is a matrix library's
                self._seen.add(kind)
                _require(found.reshape(rows, -1), x.reshape(rows, inputs), weight)
        return found

    def experts(
        self,
        x: torch.Tensor,
        weights: Sequence[Operands],
        counts: Sequence[int],
        starts: Sequence[int],
        config: TileConfig,
    ) -> torch.Tensor:
        """See ``Products.experts``."""
        found = super().experts(x, weights, counts, starts, config)
        kind = (weights[0].form, weights[0].groups, config.tokens, config.splits > 1, "experts")
        if kind not in self._seen and len(found):
            self._seen.add(kind)
            parts = zip(found.split(list(counts)), starts, weights, strict=True)
            jobs = [(part, x[start : start + len(part)], weight) for part, start, weight in parts if len(part)]
            for job in {0, len(jobs) - 1}:
                _require(*jobs[job])
        return found


def _tile(rows: int) -> int:
    return (min(max(rows, SMALLEST_TILE), LARGEST_TILE) - 1).bit_length()


def _require(found: torch.Tensor, x: torch.Tensor, weight: Operands) -> None:
    """Raise ``DeviceError`` where rows of ``found`` [T, N] are not the products of ``x`` [T, K] with the ``weight``."""
    edges = list(dict.fromkeys([*range(len(x))[:EDGE_ROWS], *range(len(x))[-EDGE_ROWS:]]))
    rows, results = x[edges].cpu(), found[edges].cpu()
    for outputs in _edges(weight.form.shape[0]):
        part = results[:, outputs]
        wrong = int(beyond_roundings(part, rows, _dense(weight, outputs)).sum())
        if wrong:
            bits = "FP8" if weight.form.bits is None else f"int{weight.form.bits}"
            raise DeviceError(
                "the GPU multiplies otherwise than plain torch",
                where=found.device,
                found=f"{wrong:,} of {part.numel():,} results of {len(x):,} rows with {bits} {list(weight.form.shape)}"
                " are off by more than roundings",
                fix=LEAVE_OUT,
            )


def _edges(outputs: int) -> Iterator[slice]:
    """The first block of outputs and the last."""
    for first in sorted({0, (outputs - 1) // FP8_BLOCK * FP8_BLOCK}):
        yield slice(first, min(first + FP8_BLOCK, outputs))


def _dense(weight: Operands, outputs: slice) -> torch.Tensor:
    """BF16 [outputs, K] on the CPU, of outputs within one row of FP8's scales."""
    from weightkit.kernels import fp8_dequant, gptq_format

    if weight.groups is None or weight.form.bits is None:
        codes, block = weight.codes[outputs].cpu(), outputs.start // FP8_BLOCK
        return fp8_dequant.dequant_reference(codes, weight.scales[block : block + 1].cpu(), torch.bfloat16)
    bits, (zero, size), inputs = weight.form.bits, (weight.groups.zero, weight.groups.size), weight.form.shape[1]
    words, scales = weight.codes[:, outputs].cpu(), weight.scales[:, outputs].cpu()
    qzeros = gptq_format.pack_zeros(len(scales), scales.shape[1], bits, zero, zero_offset=0)
    g_idx = torch.arange(inputs, dtype=torch.int32) // (inputs if size == -1 else size)
    return gptq_format.dequant_reference(words, qzeros, scales, g_idx, bits, 0, torch.bfloat16)
