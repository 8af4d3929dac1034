"""What keeps a checkpoint's weights. ``Resident``: all of them dequantized; as they are stored, see ``streamed``."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch.nn.functional import linear

from weightkit.checkpoint import LazyTensor
from weightkit.compute import strips
from weightkit.family import expert_of
from weightkit.model.loading import Loader
from weightkit.model.memory import empty_caches
from weightkit.model.packed import Packed
from weightkit.model.products import Products
from weightkit.model.weights import Product

UNIT_BYTES = 256 << 20
"""A weight that takes more, in the dtype that the config names, is kept and multiplied with in strips of rows: the head
of DeepSeek-V3 is 1.9 GB in BF16. Strips follow from shapes alone, so that the bits do not depend on memory."""


@dataclass
class CacheUse:
    """Where the weights of routed experts were found when they were asked for, and the time that was waited for reads.

    Attributes:
        device_hits: in the memory of the device that computes.
        host_hits: in the cache in host memory.
        misses: neither; they were read from files.
        waited_s: seconds in which nothing was computed, because a weight was not there yet.
    """

    device_hits: int = 0
    host_hits: int = 0
    misses: int = 0
    waited_s: float = 0.0

    def since(self, earlier: CacheUse) -> CacheUse:
        """What was added after ``earlier``, an older copy."""
        return CacheUse(
            self.device_hits - earlier.device_hits,
            self.host_hits - earlier.host_hits,
            self.misses - earlier.misses,
            self.waited_s - earlier.waited_s,
        )

    def copy(self) -> CacheUse:
        """As it is now."""
        return replace(self)


class Store(Protocol):
    """Keeps weights, for the computing thread alone. What is not described is as in ``Weights``, ``Groups`` and
    ``Holds``."""

    use: CacheUse

    def get(self, name: str) -> torch.Tensor: ...

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor: ...

    def held_product(self, name: str) -> Product | None: ...

    def takes_groups(self, names: Sequence[str]) -> bool: ...

    def grouped(
        self, names: Sequence[str], x: torch.Tensor, counts: Sequence[int], starts: Sequence[int]
    ) -> torch.Tensor: ...

    def kept(self, name: str) -> torch.Tensor | None:
        """The whole weight in the compute dtype, if it is kept so."""
        ...

    def prefetch(self, names: Sequence[str]) -> None: ...

    def upcoming(self, names: Sequence[str]) -> None:
        """These will be asked for after what ``prefetch`` names: read them when there is nothing else to read."""
        ...

    @property
    def device_bytes(self) -> int:
        """Bytes of weights kept on the device."""
        ...

    @property
    def host_bytes(self) -> int:
        """Bytes of weights kept in host memory beside it."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Source:
    """What a store reads from.

    Attributes:
        lazy: a weight by its published name, dequantized to the config's dtype; raises ``MissingTensorError``.
        dtype_of: the compute dtype of a weight.
        loader: reads and dequantizes.
        products: what multiplies with weights as they are stored; None where they are dequantized.
    """

    lazy: Callable[[str], LazyTensor]
    dtype_of: Callable[[str], torch.dtype]
    loader: Loader
    products: Products | None = None


def packed_units(lazy: LazyTensor) -> list[Packed]:
    """What ``Streamed`` reads, keeps and evicts as one of a weight: all of it, or each strip of its rows."""
    return [Packed(part) for part in strips(lazy, UNIT_BYTES)]


class Resident:
    """All weights dequantized on the device, each read when it is asked for first. There must be room for all."""

    def __init__(self, source: Source, jobs: int) -> None:
        self.use = CacheUse()
        self._source = source
        self._jobs = jobs
        self._pool = ThreadPoolExecutor(jobs, thread_name_prefix="weights")
        self._kept: dict[str, torch.Tensor] = {}
        self._ahead: dict[str, Future[torch.Tensor]] = {}
        self._wanted: deque[str] = deque()
        self._later: deque[str] = deque()

    def get(self, name: str) -> torch.Tensor:
        tensor = self._kept.get(name)
        routed = expert_of(name) is not None
        if tensor is None:
            self.use.misses += routed
            ahead = self._ahead.pop(name, None)
            self._read_ahead()
            started = time.perf_counter()
            tensor = self._kept[name] = self._load(name) if ahead is None else ahead.result()
            self.use.waited_s += time.perf_counter() - started
        else:
            self.use.device_hits += routed
        return tensor

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight = self.get(name)
        rows = [strip.shape[0] for strip in strips(self._source.lazy(name), UNIT_BYTES)]
        products = [linear(x, part) for part in weight.split(rows)]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

    def held_product(self, name: str) -> Product | None:
        return None

    def takes_groups(self, names: Sequence[str]) -> bool:
        return False

    def grouped(
        self, names: Sequence[str], x: torch.Tensor, counts: Sequence[int], starts: Sequence[int]
    ) -> torch.Tensor:
        rows = zip(names, counts, starts, strict=True)
        return torch.cat([self.linear(name, x[start : start + count]) for name, count, start in rows])

    def kept(self, name: str) -> torch.Tensor | None:
        return self._kept.get(name)

    def prefetch(self, names: Sequence[str]) -> None:
        self._wanted = deque(name for name in names if name not in self._kept)
        self._read_ahead()

    def upcoming(self, names: Sequence[str]) -> None:
        self._later = deque(name for name in names if name not in self._kept)
        self._read_ahead()

    @property
    def device_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._kept.values())

    @property
    def host_bytes(self) -> int:
        return 0

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for held in (self._kept, self._ahead):
            held.clear()
        if self._source.loader.device.type == "cuda":
            with suppress(RuntimeError):  # of a device that has failed, as was said already
                empty_caches()

    def _read_ahead(self) -> None:
        while len(self._ahead) < self._jobs and (queue := self._wanted or self._later):
            name = queue.popleft()
            if name not in self._ahead and name not in self._kept:
                self._ahead[name] = self._pool.submit(self._load, name)

    def _load(self, name: str) -> torch.Tensor:
        """Read a weight whole. Runs in any thread."""
        return self._source.loader.load(self._source.lazy(name), self._source.dtype_of(name))
