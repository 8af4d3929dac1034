"""Products with FP8 and GPTQ weights as they are stored, by kernels, on devices that have them.

Whether a weight is multiplied so is a matter of the weight, the device and the compute dtype, never of how much memory
there is: a product's bits do not depend on where the weight was found, nor on which others were there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from weightkit.checkpoint import Dequantized, GroupDequantized, LazyTensor
from weightkit.checkpoint.tensors import FP8_BLOCK, GROUP_BITS

if TYPE_CHECKING:
    from weightkit.kernels.gemm_plan import TileConfig

LEAST_CAPABILITY = (8, 0)
"""The first GPUs whose tensor cores multiply BF16."""

MOST_CONFIGS = 1024
"""Configs that are remembered: a sequence's new tokens have one for each form."""


@dataclass(frozen=True)
class Form:
    """What a stored weight looks like to the kernels, as far as it is known before it is read.

    Attributes:
        shape: N and K, outputs and inputs.
        bits: of a GPTQ code; None for FP8.
    """

    shape: tuple[int, int]
    bits: int | None = None

    @classmethod
    def of(cls, lazy: LazyTensor) -> Form | None:
        """That of a weight that is read in its own parts; None for one that the kernels do not take."""
        if lazy.dtype != "BF16" or len(lazy.shape) != 2:
            return None  # the kernels round each weight to BF16
        n, k = lazy.shape
        match lazy:
            case Dequantized(weight, scale):
                blocks = (-(-n // FP8_BLOCK), -(-k // FP8_BLOCK))
                fits = (weight.dtype, scale.dtype, scale.shape) == ("F8_E4M3", "F32", blocks)
                return cls((n, k)) if fits else None
            case GroupDequantized(bits=bits):
                return cls((n, k), bits) if bits in GROUP_BITS and lazy.scales.dtype == "F16" else None
        return None


@dataclass(frozen=True)
class Groups:
    """What the kernels need to know of a GPTQ weight's values.

    Attributes:
        size: inputs that share a scale; -1: all.
        zero: the code that stands for 0, everywhere.
    """

    size: int
    zero: int


@dataclass(frozen=True)
class Operands:
    """A weight on the device as the kernels take it.

    Attributes:
        form: its form.
        codes: U8 [N, K], or I32 [K * bits / 32, N].
        scales: F32 [ceil(N / 128), ceil(K / 128)], or F16 [groups, N].
        groups: of a GPTQ weight.
    """

    form: Form
    codes: torch.Tensor
    scales: torch.Tensor
    groups: Groups | None = None


def groups_of(qzeros: npt.NDArray[np.int32], g_idx: npt.NDArray[np.int32], lazy: GroupDequantized) -> Groups | None:
    """The groups of a weight whose zeros are one number and whose groups ascend; None of any other.

    Args:
        qzeros: [groups * N * bits / 32], as stored.
        g_idx: [K], from 0 on, all of them groups that there are.
        lazy: says the rest.
    """
    words, count, inputs = qzeros.view(np.uint32), lazy.scales.shape[0], len(g_idx)
    if not len(words) or not inputs:
        return None
    stored = int(words[0]) & ((1 << lazy.bits) - 1)
    if not (words == sum(stored << place for place in range(0, 32, lazy.bits))).all():
        return None
    zero = (stored + lazy.zero_offset) % (1 << lazy.bits)
    if count == 1:
        return Groups(-1, zero)
    size = int(np.argmax(g_idx != 0))
    if size < lazy.codes_per_word or size & (size - 1) or -(-inputs // size) != count:
        return None
    return Groups(size, zero) if (g_idx == np.arange(inputs, dtype=np.int32) // size).all() else None


class Products:
    """The kernels.

    Args:
        fp8, int4: the modules ``weightkit.kernels.fp8_gemm`` and ``int4_gemm``.
    """

    def __init__(self, fp8: ModuleType, int4: ModuleType) -> None:
        self._fp8 = fp8
        self._int4 = int4
        self._configs: dict[tuple[Form, tuple[int, ...], torch.device], TileConfig] = {}

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Products | None:
        """Those of a device that computes in ``dtype``; None where weights are dequantized instead."""
        if device.type != "cuda" or torch.version.hip is not None or dtype != torch.bfloat16:
            return None
        if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
            return None
        from weightkit.kernels import fp8_gemm, int4_gemm

        return cls(fp8_gemm, int4_gemm)

    def linear(self, x: torch.Tensor, weight: Operands) -> torch.Tensor:
        """``x`` [..., K] times the transpose of a weight: [..., N], in ``x``'s dtype."""
        codes, scales, groups = weight.codes, weight.scales, weight.groups
        if groups is None:
            found: torch.Tensor = self._fp8.fp8_linear(x, codes, scales)
        else:
            found = self._int4.int4_linear(
                x, codes, scales, group_size=groups.size, bits=weight.form.bits, zero=groups.zero
            )
        return found

    def config(self, form: Form, counts: Sequence[int], device: torch.device) -> TileConfig:
        """For ``experts``: the tiles of one launch with so many rows of each of its weights, which share a form."""
        key = (form, tuple(counts), device)
        found = self._configs.get(key)
        if found is None:
            if len(self._configs) >= MOST_CONFIGS:
                self._configs.clear()
            found = self._configs[key] = self._choose(form, counts, device)
        return found

    def _choose(self, form: Form, counts: Sequence[int], device: torch.device) -> TileConfig:
        if form.bits is None:
            found: TileConfig = self._fp8.experts_config(counts, form.shape, device)
        else:
            found = self._int4.experts_config(counts, form.shape, device, bits=form.bits)
        return found

    def experts(
        self,
        x: torch.Tensor,
        weights: Sequence[Operands],
        counts: Sequence[int],
        starts: Sequence[int],
        config: TileConfig,
    ) -> torch.Tensor:
        """Products of ``counts`` rows of ``x`` [rows, K] from ``starts`` on with each of some weights of one form.

        Returns:
            [sum(counts), N]: one after the other. With one ``config`` they do not depend on which are launched
            together.
        """
        found, first = [], 0
        for groups, same in groupby(weights, key=lambda weight: weight.groups):
            part = list(same)
            jobs = slice(first, first := first + len(part))
            codes, scales = [weight.codes for weight in part], [weight.scales for weight in part]
            if groups is None:
                product = self._fp8.fp8_experts(x, codes, scales, counts[jobs], starts=starts[jobs], config=config)
            else:
                product = self._int4.int4_experts(
                    x, codes, scales, counts[jobs], starts=starts[jobs], config=config,
                    group_size=groups.size, bits=part[0].form.bits, zero=groups.zero,
                )  # fmt: skip
            found.append(product)
        return found[0] if len(found) == 1 else torch.cat(found)
