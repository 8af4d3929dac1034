"""A quantized weight as the format stores it, on the device where it is computed with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from weightkit.kernels import gptq_format

PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""The tensors of a linear map, in the order of the file."""


@dataclass(frozen=True)
class Packed:
    """The four tensors of one linear map [N, K], AutoGPTQ v1, symmetric.

    Attributes:
        qweight: I32 [K * bits / 32, N].
        scales: F16 [groups, N].
        qzeros: I32 [groups, N * bits / 32].
        g_idx: I32 [K].
        bits: 4 or 8.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    qzeros: torch.Tensor
    g_idx: torch.Tensor
    bits: int

    @classmethod
    def of(cls, codes: torch.Tensor, scales: torch.Tensor, *, group_size: int, bits: int) -> Packed:
        """From codes [K, N] U8 and scales [groups, N] F32."""
        return cls.join(gptq_format.pack(codes.T, bits), scales.half(), len(codes), group_size, bits)

    @classmethod
    def join(cls, qweight: torch.Tensor, scales: torch.Tensor, columns: int, group_size: int, bits: int) -> Packed:
        """With the two that follow from the settings."""
        groups, n = scales.shape
        qzeros = gptq_format.pack_zeros(groups, n, bits, device=scales.device)
        return cls(qweight, scales, qzeros, _group_of(columns, group_size, scales.device), bits)

    def stored(self, module: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors by their names in the file."""
        for part in PARTS:
            yield f"{module}.{part}", getattr(self, part)

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """[N, K]: what ``cast --to bf16`` makes of it, in ``dtype``."""
        bf16 = gptq_format.dequant(self.qweight, self.qzeros, self.scales, self.g_idx, self.bits, 1, torch.bfloat16)
        return bf16.to(dtype)


def flat(parts: Sequence[Packed]) -> torch.Tensor:
    """What settings do not tell of ``parts``, end to end: U8."""
    return torch.cat([tensor.view(-1).view(torch.uint8) for part in parts for tensor in (part.qweight, part.scales)])


def unflat(
    content: torch.Tensor, shapes: Sequence[tuple[int, int]], group_sizes: Sequence[int], bits: int
) -> list[Packed]:
    """The inverse of ``flat``, of weights of these shapes [N, K]."""
    found, at = [], 0
    for (n, k), group_size in zip(shapes, group_sizes, strict=True):
        words, groups = k * bits // 32, -(-k // group_size)
        qweight = content[at : at + 4 * words * n].view(torch.int32).view(words, n)
        at += 4 * words * n
        scales = content[at : at + 2 * groups * n].view(torch.float16).view(groups, n)
        at += 2 * groups * n
        found.append(Packed.join(qweight, scales, k, group_size, bits))
    return found


def flat_bytes(shapes: Sequence[tuple[int, int]], group_sizes: Sequence[int], bits: int) -> int:
    """The size of ``flat``'s result."""
    sizes = zip(shapes, group_sizes, strict=True)
    return sum(k * bits // 8 * n + 2 * -(-k // group_size) * n for (n, k), group_size in sizes)


@lru_cache(maxsize=16)
def _group_of(columns: int, group_size: int, device: torch.device) -> torch.Tensor:
    return (torch.arange(columns, device=device) // group_size).to(torch.int32)
