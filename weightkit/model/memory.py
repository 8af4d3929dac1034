"""How much memory weights may take, and which of them keep it."""

from __future__ import annotations

from collections import OrderedDict

import torch

from weightkit.family import expert_of
from weightkit.machine import available_memory_bytes

FREE_SHARE = 0.8
"""The share of free memory that weights may take; the rest is for the cache, activations and everybody else."""


def free_memory_bytes(device: torch.device) -> int:
    """Memory that could be allocated now: on a GPU what the driver reports, else the machine's and the container's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory_bytes()


class Kept:
    """Weights in memory within a budget.

    Each token needs all but the routed experts, in the same order, and there eviction by last use would drop each
    weight just before its next use. So those weights stay once they are in; experts share the rest by last use.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._always: dict[str, torch.Tensor] = {}
        self._always_bytes = 0
        self._experts: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._experts_bytes = 0

    @property
    def size_bytes(self) -> int:
        """What the kept weights take."""
        return self._always_bytes + self._experts_bytes

    def __contains__(self, name: str) -> bool:
        return name in self._always or name in self._experts

    def get(self, name: str) -> torch.Tensor | None:
        """The weight, if it is kept."""
        if name in self._experts:
            self._experts.move_to_end(name)
            return self._experts[name]
        return self._always.get(name)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Keep the weight if the budget allows, in place of the experts that were not used for longest."""
        room = self._budget_bytes - self._always_bytes - tensor.nbytes
        if room < 0:
            return
        while self._experts_bytes > room:
            _, evicted = self._experts.popitem(last=False)
            self._experts_bytes -= evicted.nbytes
        if expert_of(name) is None:
            self._always[name] = tensor
            self._always_bytes += tensor.nbytes
        else:
            self._experts[name] = tensor
            self._experts_bytes += tensor.nbytes
