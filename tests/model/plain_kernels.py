"""Kernels of products in plain torch, for tests on a CPU of whoever uses the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from weightkit.kernels import fp8_gemm, int4_gemm
from weightkit.kernels.gemm_plan import TileConfig


class PlainKernels(ModuleType):
    """Products in plain torch, quick ones. Their bits depend on ``splits`` far more than those of the real kernels:
    K is cut into so many parts, each rounded to BF16; and a launch chooses ``splits`` by all that it has to do.

    Attributes:
        launches: weights of each launch of experts.
        rows: of each product with one weight.
    """

    def __init__(self) -> None:
        super().__init__("plain_kernels")
        self.launches: list[int] = []
        self.rows: list[int] = []

    def fp8_linear(self, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        self.rows.append(x.numel() // x.shape[-1])
        return split_product(x, fp8_weight(codes, scale), len(x) % 3 + 1)

    def int4_linear(self, x: torch.Tensor, qweight: torch.Tensor, scales: torch.Tensor, **form: int) -> torch.Tensor:
        self.rows.append(x.numel() // x.shape[-1])
        return split_product(x, int4_weight(qweight, scales, **form), len(x) % 3 + 1)

    def experts_config(self, counts: Sequence[int], *_: object, **__: object) -> TileConfig:
        return TileConfig(splits=1 + sum(counts) % 5)

    def fp8_experts(self, x: torch.Tensor, *operands: Any, **options: Any) -> torch.Tensor:
        return self._experts(fp8_weight, x, *operands, **options)

    def int4_experts(self, x: torch.Tensor, *operands: Any, **options: Any) -> torch.Tensor:
        return self._experts(int4_weight, x, *operands, **options)

    def _experts(
        self,
        weight: Any,
        x: torch.Tensor,
        codes: Any,
        scales: Any,
        counts: Any,
        *,
        starts: Any,
        config: Any,
        **form: Any,
    ) -> torch.Tensor:
        self.launches.append(len(codes))
        splits = (config or self.experts_config(counts)).splits
        return torch.cat(
            [
                split_product(x[start : start + count], weight(code, scale, **form), splits)
                for code, scale, count, start in zip(codes, scales, counts, starts, strict=True)
            ]
        )


def fp8_weight(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return fp8_gemm.fp8_dequant.dequant_reference(codes, scale, torch.bfloat16)


def int4_weight(qweight: torch.Tensor, scales: torch.Tensor, *, bits: int, **form: int) -> torch.Tensor:
    unit = torch.eye(len(qweight) * 32 // bits, dtype=torch.bfloat16)
    return int4_gemm.int4_linear_reference(unit, qweight, scales, bits=bits, **form).T


def split_product(x: torch.Tensor, weight: torch.Tensor, splits: int) -> torch.Tensor:
    rows, matrix = x.double().tensor_split(splits, -1), weight.double().tensor_split(splits, -1)
    return sum((a @ b.T).bfloat16().double() for a, b in zip(rows, matrix, strict=True)).to(x.dtype)  # type: ignore
