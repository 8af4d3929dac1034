"""GPTQ tensors in one safetensors file, for programs that share nothing but this module, torch and safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

LEAVES = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Case:
    """The four tensors of a GPTQ weight, and what its checkpoint's config says of them.

    Attributes:
        qweight: int32 [K * bits / 32, N].
        qzeros: int32 [groups, N * bits / 32].
        scales: float16 [groups, N].
        g_idx: int32 [K].
        group_size: -1 for one group of all of K.
        zero_offset: 1 where ``checkpoint_format`` is ``gptq``, 0 for ``gptq_v2``.
    """

    name: str
    bits: int
    group_size: int
    zero_offset: int
    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor

    @property
    def ordered(self) -> bool:
        """Whether groups are of neighbours: no activation order."""
        return bool((self.g_idx.diff() >= 0).all())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The four by their leaf names."""
        return {leaf: getattr(self, leaf) for leaf in LEAVES}


def write_cases(path: Path, cases: Iterable[Case]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    about: dict[str, list[int]] = {}
    for case in cases:
        about[case.name] = [case.bits, case.group_size, case.zero_offset]
        tensors |= {f"{case.name}/{leaf}": tensor.contiguous() for leaf, tensor in case.tensors().items()}
    save_file(tensors, path, metadata={"cases": json.dumps(about)})


def read_cases(path: Path) -> list[Case]:
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["cases"])
        return [
            Case(name, *numbers, *(file.get_tensor(f"{name}/{leaf}") for leaf in LEAVES))
            for name, numbers in about.items()
        ]
