"""How much memory weights may take, and which of them keep it."""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from weightkit.machine import available_memory_bytes

FREE_SHARE = 0.8
"""The share of free memory that weights may take; the rest is for the cache, activations and everybody else."""

ALIGNMENT = 256
"""Regions begin at multiples of so many bytes, as kernels and copies like it."""

_PASSING = -1  # stands for a layer: weights that every token needs, for which there was no room to stay


def free_memory_bytes(device: torch.device) -> int:
    """Memory that could be allocated now: on a GPU what the driver reports, else the machine's and the container's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory_bytes()


def empty_caches() -> None:
    """Give back what torch keeps of freed memory, a GPU's and the pinned of the host: nobody else may have it, and who
    asks for what is free is not told of it."""
    torch.cuda.empty_cache()
    empty_host = getattr(torch.accelerator, "empty_host_cache", None)  # the name that torch 2.11 has not got yet
    if (empty_host := empty_host or getattr(torch._C, "_host_emptyCache", None)) is not None:
        empty_host()


@dataclass(frozen=True, slots=True)
class Region:
    """A part of an arena: ``size`` bytes from ``start`` in its chunk, both multiples of ``ALIGNMENT``."""

    chunk: int
    start: int
    size: int


class Arena:
    """Memory of a fixed size that is handed out in regions, so that a budget is held to the byte.

    Args:
        size_bytes: most that it ever takes.
        allocate: makes a flat U8 tensor of so many bytes.
        chunk_bytes: what is allocated at once, when it is needed first; no region is larger, and what is left of the
            budget for no whole chunk is not used. None: all of it.
    """

    def __init__(
        self, size_bytes: int, allocate: Callable[[int], torch.Tensor], chunk_bytes: int | None = None
    ) -> None:
        self.size_bytes = size_bytes
        self.allocated_bytes = 0
        self.used_bytes = 0
        self._allocate = allocate
        self._chunk_bytes = chunk_bytes or size_bytes
        self._chunks: list[torch.Tensor] = []
        self._free: list[list[tuple[int, int]]] = []  # of each chunk: start and size, ascending, no two neighbours
        self._room: list[int] = []  # of each chunk: no smaller than its largest free part

    def take(self, count: int) -> Region | None:
        """A region of at least ``count`` bytes; None where no free part is as large."""
        size = aligned(count)
        for chunk in range(len(self._chunks)):
            if self._room[chunk] >= size and (region := self._take_from(chunk, size)) is not None:
                return region
        return self._take_from(len(self._chunks) - 1, size) if self._grow(size) else None

    def give(self, region: Region) -> None:
        """Give a region back."""
        free = self._free[region.chunk]
        insort(free, (region.start, region.size))
        place = free.index((region.start, region.size))
        for left in (place, place - 1):  # joined with what follows, then with what comes before
            if 0 <= left < len(free) - 1 and sum(free[left]) == free[left + 1][0]:
                free[left : left + 2] = [(free[left][0], free[left][1] + free[left + 1][1])]
        self._room[region.chunk] = max(size for _, size in free)
        self.used_bytes -= region.size

    def view(self, region: Region, count: int) -> torch.Tensor:
        """The first ``count`` bytes of a region, U8."""
        return self._chunks[region.chunk][region.start : region.start + count]

    def release(self) -> None:
        """Give all memory back, whatever lies in it. Nothing can be taken afterwards.

        At once, not when somebody collects what refers to itself: the next checkpoint may want the memory.
        """
        self.size_bytes = self.allocated_bytes = self.used_bytes = 0
        self._chunks.clear()
        self._free.clear()
        self._room.clear()

    def _take_from(self, chunk: int, size: int) -> Region | None:
        free = self._free[chunk]
        for place, (start, room) in enumerate(free):
            if room >= size:
                free[place : place + 1] = [(start + size, room - size)] if room > size else []
                self.used_bytes += size
                return Region(chunk, start, size)
        self._room[chunk] = max((room for _, room in free), default=0)
        return None

    def _grow(self, size: int) -> bool:
        """Add a chunk in which ``size`` bytes fit, if the budget has room for one."""
        count = self._chunk_bytes // ALIGNMENT * ALIGNMENT
        if size > count or self.allocated_bytes + count > self.size_bytes:
            return False
        self._chunks.append(self._allocate(count))
        self._free.append([(0, count)])
        self._room.append(count)
        self.allocated_bytes += count
        return True


class Shelf:
    """What lies in one memory, and what leaves it first.

    Each token needs all but the routed experts, in the same order, and there eviction by last use would drop each
    weight just before its next use. So those weights stay once they are in, and experts share the rest. For the same
    reason experts leave from the layer that holds most, the one not used for longest first: by last use alone, experts
    of early layers would leave for those of late ones, to be missed at the start of the next token.

    Args:
        arena: the memory.
        always_bytes: most for weights that stay. Further ones come and go as experts do.
    """

    def __init__(self, arena: Arena, always_bytes: int) -> None:
        self.arena = arena
        self._always_bytes = always_bytes
        self._regions: dict[str, Region] = {}
        self._layers: dict[int, OrderedDict[str, None]] = {}
        self._layer_of: dict[str, int] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._regions

    def __iter__(self) -> Iterator[str]:
        return iter(self._regions)

    def add(self, key: str, region: Region, layer: int | None) -> None:
        """Put a weight there. ``layer``: that of a routed expert; None for a weight that every token needs."""
        self._regions[key] = region
        if layer is None and region.size <= self._always_bytes:
            self._always_bytes -= region.size
            return
        layer = _PASSING if layer is None else layer
        self._layers.setdefault(layer, OrderedDict())[key] = None
        self._layer_of[key] = layer

    def use(self, key: str) -> None:
        """It is used now, if it is here."""
        layer = self._layer_of.get(key)
        if layer is not None:
            self._layers[layer].move_to_end(key)

    def layer_of(self, key: str) -> int | None:
        """The ``layer`` that it was added with."""
        layer = self._layer_of.get(key)
        return None if layer == _PASSING else layer

    def region(self, key: str) -> Region:
        """Where it lies."""
        return self._regions[key]

    def remove(self, key: str) -> None:
        """Take it away and give its memory back."""
        region = self._regions.pop(key)
        self.arena.give(region)
        layer = self._layer_of.pop(key, None)
        if layer is None:
            self._always_bytes += region.size
        else:
            del self._layers[layer][key]

    def first_to_leave(self, may_leave: Callable[[str], bool]) -> str | None:
        """The weight that should leave next; None where none may."""
        for layer in sorted(self._layers, key=lambda layer: -len(self._layers[layer])):
            for key in self._layers[layer]:
                if may_leave(key):
                    return key
        return None


def aligned(count: int) -> int:
    """Bytes of the region that ``count`` bytes take."""
    return max(ALIGNMENT, -(-count // ALIGNMENT) * ALIGNMENT)
