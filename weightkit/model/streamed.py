"""Weights as they are stored, as many of them as two memories hold; the rest is read again when it is needed."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from weightkit.errors import MissingTensorError
from weightkit.family import expert_of, layer_of
from weightkit.model.memory import Arena, Region, Shelf, empty_caches
from weightkit.model.packed import Packed
from weightkit.model.products import Form, Operands
from weightkit.model.stores import CacheUse, Source, packed_units
from weightkit.model.weights import Product

if TYPE_CHECKING:
    from weightkit.kernels.gemm_plan import TileConfig

HOST_CHUNK_BYTES = 512 << 20
"""Host memory is pinned so much at a time, when it is needed: pinning hundreds of GB would take minutes. A power of
two, as torch rounds pinned memory up to one."""


@dataclass(frozen=True)
class _Unit:
    """A weight, or a strip of its rows: what is read, kept and evicted as one."""

    key: str
    packed: Packed
    layer: int | None  # of a routed expert

    @property
    def size_bytes(self) -> int:
        return self.packed.size_bytes


@dataclass
class _Entry:
    """A unit on the device, or on its way there."""

    packed: Packed
    buffer: torch.Tensor
    arrival: Future[None]
    from_host: bool
    asked_for: bool = False
    is_there: bool = False

    @cached_property
    def operands(self) -> Operands | None:
        """What the kernels take, once it is there; kept, as views of a few bytes cost the host more than a launch."""
        return self.packed.operands(self.buffer)


class Streamed:
    """Weights as they are stored, within two budgets: on the device, and in host memory beside it; the rest on disk.

    Where the budgets have room for all, each is read once and nothing leaves.

    A unit is read into host memory (pinned, for a GPU), copied to the device, and stays in both while there is room.
    What leaves the device goes back to host memory unless it is there still; host memory gives up first what the device
    has too. Weights that every token needs come before experts (see ``Shelf``), but leave room for reading ahead.

    All bookkeeping is the computing thread's; readers only fill memory that was set aside for them. On a GPU all copies
    go through one queue: what is copied out of a region comes before what is copied into it next, and a copy into a
    region waits for what was to be computed when the region was given up.

    Args:
        source: what is read.
        device_bytes: most on the device, weights on their way there included.
        host_bytes: most beside it. On a CPU 0: then readers write where the weight stays.
        largest_bytes: of a routed expert's unit, for what is read ahead.
        jobs: units read at once.
    """

    def __init__(self, source: Source, *, device_bytes: int, host_bytes: int, largest_bytes: int, jobs: int) -> None:
        self.use = CacheUse()
        self._source = source
        self._loader = source.loader
        self._where = source.loader.device
        self._on_gpu = self._where.type == "cuda"
        self._window = 2 * jobs
        ahead = self._window * largest_bytes
        self._device = _shelf(Arena(device_bytes, self._allocate_device), ahead)
        chunk = min(HOST_CHUNK_BYTES, 1 << max(0, host_bytes.bit_length() - 1))
        self._host = _shelf(Arena(host_bytes, self._allocate_host, chunk), ahead) if host_bytes else None
        self._pool = ThreadPoolExecutor(jobs, thread_name_prefix="weights")
        self._queue = torch.cuda.Stream(self._where) if self._on_gpu else None
        self._units_of: dict[str, list[_Unit]] = {}
        self._entries: dict[str, _Entry] = {}
        self._both: OrderedDict[str, None] = OrderedDict()  # on the device and in host memory
        self._filling: dict[str, Future[None]] = {}  # host memory that a reader works on
        self._leaving: dict[str, torch.cuda.Event] = {}  # host memory that a copy from the device fills
        self._wanted: deque[_Unit] = deque()
        self._later: deque[_Unit] = deque()
        self._needed: set[str] = set()  # announced and not asked for yet
        self._ahead: set[str] = set()  # of these, what readers were sent for
        self._in_use: set[str] = set()

    # --- what the model asks for --------------------------------------------------------------------------------------

    def get(self, name: str) -> torch.Tensor:
        dtype = self._source.dtype_of(name)
        parts = [unit.packed.own(self._hold(unit).buffer, dtype, self._loader) for unit in self._units(name)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        products = [self._multiply(self._hold(unit), x) for unit in self._units(name)]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

    def held_product(self, name: str) -> Product | None:
        """Of a weight that the kernels have a form for. It does not keep others from the device: the weight leaves its
        place there as any other does."""
        units = self._units(name)
        if self._source.products is None or all(unit.packed.form is None for unit in units):
            return None
        dtype = self._source.dtype_of(name)
        parts = [self._held_part(unit, dtype) for unit in units]
        return parts[0] if len(parts) == 1 else lambda x: torch.cat([part(x) for part in parts], dim=-1)

    def takes_groups(self, names: Sequence[str]) -> bool:
        """Whether the kernels have a form for all, each of which is one unit."""
        if self._source.products is None:
            return False
        return all(len(units) == 1 and units[0].packed.form is not None for units in map(self._units, names))

    def grouped(
        self, names: Sequence[str], x: torch.Tensor, counts: Sequence[int], starts: Sequence[int]
    ) -> torch.Tensor:
        """As many at a time as the device has room for. A weight that the kernels turn out not to take is dequantized.

        Bits do not depend on how many that are: tiles are chosen once, by the counts of all weights of a form.
        """
        units = [unit for name in names for unit in self._units(name)]
        configs = self._configs([unit.packed.form for unit in units], counts)
        found: list[torch.Tensor] = []
        first = 0
        while first < len(units):
            entries = self._hold_some(units[first:])
            jobs = slice(first, first + len(entries))
            found += self._multiply_all(entries, x, counts[jobs], starts[jobs], configs)
            first = jobs.stop
            entries.clear()  # what had no room among the others is freed before the next is fetched
        return found[0] if len(found) == 1 else torch.cat(found)

    def kept(self, name: str) -> torch.Tensor | None:
        return None

    def prefetch(self, names: Sequence[str]) -> None:
        self._wanted = deque(self._existing(names))
        self._announce()

    def upcoming(self, names: Sequence[str]) -> None:
        self._later = deque(self._existing(names))
        self._announce()

    @property
    def device_bytes(self) -> int:
        return self._device.arena.used_bytes

    @property
    def host_bytes(self) -> int:
        return 0 if self._host is None else self._host.arena.used_bytes

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        if self._queue is not None:
            with suppress(RuntimeError):  # of a device that has failed, as was said already
                self._queue.synchronize()  # copies to host memory that is about to be freed
        for held in (self._entries, self._filling, self._leaving):  # a read that failed holds what it was to fill
            held.clear()
        for shelf in (self._device, self._host):
            if shelf is not None:
                shelf.arena.release()
        if self._on_gpu:
            with suppress(RuntimeError):
                empty_caches()

    # --- products -----------------------------------------------------------------------------------------------------

    def _multiply(self, entry: _Entry, x: torch.Tensor) -> torch.Tensor:
        """By the kernels where they take the weight, whatever else is in memory."""
        products = self._source.products
        operands = None if products is None else entry.operands
        if products is None or operands is None:
            return entry.packed.linear(entry.buffer, x, self._loader)
        return products.linear(x, operands)

    def _held_part(self, unit: _Unit, dtype: torch.dtype) -> Product:
        """``_multiply`` with this unit, in memory of its own."""
        entry = self._hold(unit)
        if entry.operands is None:
            weight = unit.packed.own(entry.buffer, dtype, self._loader)
            return lambda x: linear(x, weight)
        has_place = unit.key in self._entries  # which something else may have after the next call
        own = replace(entry, buffer=entry.buffer.clone()) if has_place else entry
        return lambda x: self._multiply(own, x)

    def _configs(self, forms: Sequence[Form | None], counts: Sequence[int]) -> dict[Form, TileConfig]:
        """The tiles for the weights of each form, by the counts of all of them."""
        products = self._source.products
        if products is None:
            return {}
        rows: dict[Form, list[int]] = {}
        for form, count in zip(forms, counts, strict=True):
            if form is not None:
                rows.setdefault(form, []).append(count)
        return {form: products.config(form, counts, self._where) for form, counts in rows.items()}

    def _multiply_all(
        self,
        entries: Sequence[_Entry],
        x: torch.Tensor,
        counts: Sequence[int],
        starts: Sequence[int],
        configs: Mapping[Form, TileConfig],
    ) -> Iterator[torch.Tensor]:
        """The products of these weights, neighbours of one form in one launch."""
        products, first = self._source.products, 0
        for form, same in groupby(entries, key=lambda entry: entry.operands and entry.operands.form):
            part = list(same)
            jobs = slice(first, first := first + len(part))
            operands = [entry.operands for entry in part if entry.operands is not None]
            if products is None or form is None:
                for entry, count, start in zip(part, counts[jobs], starts[jobs], strict=True):
                    yield entry.packed.linear(entry.buffer, x[start : start + count], self._loader)
            else:
                yield products.experts(x, operands, counts[jobs], starts[jobs], configs[form])

    # --- units --------------------------------------------------------------------------------------------------------

    def _units(self, name: str) -> list[_Unit]:
        found = self._units_of.get(name)
        if found is None:
            layer = layer_of(name) if expert_of(name) is not None else None
            parts = packed_units(self._source.lazy(name))
            keys = [name] if len(parts) == 1 else [f"{name}[{number}]" for number in range(len(parts))]
            found = [_Unit(key, part, layer) for key, part in zip(keys, parts, strict=True)]
            self._units_of[name] = found
        return found

    def _existing(self, names: Sequence[str]) -> Iterator[_Unit]:
        """The units of ``names``. What is missing is said when it is asked for."""
        for name in names:
            try:
                yield from self._units(name)
            except MissingTensorError:
                continue

    # --- the device ---------------------------------------------------------------------------------------------------

    def _hold(self, unit: _Unit) -> _Entry:
        """The unit on the device, where it stays as it is until the next call."""
        self._in_use.clear()
        entry = self._take(unit)
        self._await(unit, entry)
        return entry

    def _hold_some(self, units: Sequence[_Unit]) -> list[_Entry]:
        """The first of ``units`` and those after it for which there is room beside it, on the device until the next
        call."""
        self._in_use.clear()
        if all(entry is not None and entry.is_there for entry in map(self._entries.get, (u.key for u in units))):
            return self._take_what_is_there(units)
        entries = [self._take(units[0])]
        for unit in units[1:]:
            if unit.key not in self._entries and not self._start_early(unit):
                break
            entries.append(self._take(unit))
        for unit, entry in zip(units, entries, strict=False):
            self._await(unit, entry)
        return entries

    def _take(self, unit: _Unit) -> _Entry:
        """The unit on its way to the device or there, and not to leave it."""
        key = unit.key
        self._needed.discard(key)
        self._ahead.discard(key)
        entry = self._entries.get(key) or self._start_now(unit)
        self._in_use.add(key)
        self._read_ahead()
        self._count(unit, entry)
        return entry

    def _take_what_is_there(self, units: Sequence[_Unit]) -> list[_Entry]:
        """``_hold_some`` where nothing is waited for. A new token's experts wait for the host here: it is brief."""
        keys = [unit.key for unit in units]
        entries = [self._entries[key] for key in keys]
        self._in_use.update(keys)
        self._needed.difference_update(keys)
        self._ahead.difference_update(keys)
        self._read_ahead()
        for unit, entry in zip(units, entries, strict=True):
            self._count(unit, entry)
            self._used(unit.key)
        return entries

    def _await(self, unit: _Unit, entry: _Entry) -> None:
        """Wait until a unit is there. Raises what kept it from being read."""
        if not entry.is_there:
            started = time.perf_counter()
            wait([entry.arrival])
            self.use.waited_s += time.perf_counter() - started
            if entry.arrival.exception() is not None:
                self._in_use.clear()
                self._forget(unit.key)
            entry.arrival.result()
            entry.is_there = True
        self._used(unit.key)

    def _used(self, key: str) -> None:
        """Note in both memories that a unit is used now."""
        self._device.use(key)
        if self._host is not None:
            self._host.use(key)

    def _count(self, unit: _Unit, entry: _Entry) -> None:
        if unit.layer is not None:
            if entry.asked_for:
                self.use.device_hits += 1
            elif entry.from_host:
                self.use.host_hits += 1
            else:
                self.use.misses += 1
        entry.asked_for = True

    def _announce(self) -> None:
        self._needed = {unit.key for units in (self._wanted, self._later) for unit in units}
        self._ahead &= self._needed
        self._read_ahead()

    def _read_ahead(self) -> None:
        while len(self._ahead) < self._window and (queue := self._wanted or self._later):
            unit = queue[0]
            if unit.key in self._needed and unit.key not in self._entries:
                if not self._start_early(unit):
                    return
                self._ahead.add(unit.key)
            queue.popleft()

    def _start_early(self, unit: _Unit) -> bool:
        """Send for a unit, if there is room for it without giving up what is announced."""
        region = self._room(unit, lambda key: key not in self._needed and self._may_leave(key))
        if region is None:
            return False
        if self._host is not None and unit.key not in self._host:
            if not self._place_on_host(unit.key, unit.size_bytes, unit.layer, patiently=False):
                self._device.arena.give(region)
                return False
            self._start(unit, region, from_host=False)
        else:
            self._start(unit, region, from_host=self._host is not None)
        return True

    def _start_now(self, unit: _Unit) -> _Entry:
        """Send for a unit in place of any other, or to memory of its own, which is given back after its use."""
        region = self._room(unit, self._may_leave)
        from_host = self._host is not None and unit.key in self._host
        if self._host is not None and not from_host:
            self._place_on_host(unit.key, unit.size_bytes, unit.layer, patiently=True)
        return self._start(unit, region, from_host=from_host)

    def _start(self, unit: _Unit, region: Region | None, *, from_host: bool) -> _Entry:
        key, count = unit.key, unit.size_bytes
        staged = None
        if self._host is not None and key in self._host:
            staged = self._host.arena.view(self._host.region(key), count)
        buffer = self._allocate_device(count) if region is None else self._device.arena.view(region, count)
        given_up = torch.cuda.current_stream(self._where).record_event() if self._on_gpu else None
        arrival = self._pool.submit(self._bring, unit.packed, buffer, staged, from_host, given_up)
        entry = _Entry(unit.packed, buffer, arrival, from_host)
        if staged is not None:
            self._filling[key] = arrival
        if region is not None:
            self._device.add(key, region, unit.layer)
            self._entries[key] = entry
            if staged is not None:
                self._both[key] = None
        return entry

    @torch.inference_mode()  # in which generation makes some of the memory; nothing else may then write to it
    def _bring(
        self,
        packed: Packed,
        buffer: torch.Tensor,
        staged: torch.Tensor | None,
        is_there: bool,
        given_up: torch.cuda.Event | None,
    ) -> None:
        """Fill ``buffer``, by way of host memory if there is some. Runs in a reader's thread."""
        if staged is None and not self._on_gpu:
            packed.read(buffer.numpy(), self._loader)
            return
        if staged is None:
            staged = torch.empty(packed.size_bytes, dtype=torch.uint8)
        if not is_there:
            packed.read(staged.numpy(), self._loader)
        if self._queue is None or given_up is None:
            buffer.copy_(staged)
            return
        with torch.cuda.device(self._where), torch.cuda.stream(self._queue):
            self._queue.wait_event(given_up)
            buffer.copy_(staged, non_blocking=True)
            done = self._queue.record_event()
        done.synchronize()

    def _room(self, unit: _Unit, may_leave: Callable[[str], bool]) -> Region | None:
        """Room for a unit on the device, in place of what may leave if need be."""
        while (region := self._device.arena.take(unit.size_bytes)) is None:
            key = self._device.first_to_leave(may_leave) if unit.size_bytes <= self._device.arena.size_bytes else None
            if key is None:
                return None
            self._leave_device(key)
        return region

    def _may_leave(self, key: str) -> bool:
        return key not in self._in_use and self._entries[key].arrival.done()

    def _leave_device(self, key: str) -> None:
        """Give up a unit's place on the device, for one in host memory if there is room."""
        entry = self._entries[key]
        if entry.arrival.exception() is not None:
            self._forget(key)
            return
        if self._host is not None and key not in self._host:
            layer = self._device.layer_of(key)
            if self._place_on_host(key, entry.buffer.numel(), layer, patiently=False):
                self._copy_to_host(key, entry.buffer)
        del self._entries[key]
        self._both.pop(key, None)
        self._device.remove(key)

    def _forget(self, key: str) -> None:
        """Remove a unit that could not be read from both memories."""
        self._entries.pop(key, None)
        self._both.pop(key, None)
        for shelf in (self._device, self._host):
            if shelf is not None and key in shelf:
                shelf.remove(key)

    def _allocate_device(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.uint8, device=self._where)

    # --- host memory --------------------------------------------------------------------------------------------------

    def _place_on_host(self, key: str, count: int, layer: int | None, *, patiently: bool) -> bool:
        """Set host memory aside. ``patiently``: where all of it is being filled, wait for a reader to be done."""
        host = self._host
        if host is None:
            return False
        while (region := host.arena.take(count)) is None:
            leaver = next(filter(self._is_quiet, self._both), None) or host.first_to_leave(self._is_quiet)
            if leaver is not None:
                self._both.pop(leaver, None)
                host.remove(leaver)
                continue
            busy = [filling for filling in self._filling.values() if not filling.done()]
            if not (patiently and busy):
                return False
            wait(busy, return_when=FIRST_COMPLETED)
        host.add(key, region, layer)
        return True

    def _is_quiet(self, key: str) -> bool:
        """Whether nothing writes to, or copies from, a unit's host memory any more."""
        filling, leaving = self._filling.get(key), self._leaving.get(key)
        if (filling is not None and not filling.done()) or (leaving is not None and not leaving.query()):
            return False
        self._filling.pop(key, None)
        self._leaving.pop(key, None)
        return True

    @torch.inference_mode()
    def _copy_to_host(self, key: str, buffer: torch.Tensor) -> None:
        if self._host is None:
            return
        target = self._host.arena.view(self._host.region(key), buffer.numel())
        if self._queue is None:
            target.copy_(buffer)
            return
        computed = torch.cuda.current_stream(self._where).record_event()
        with torch.cuda.device(self._where), torch.cuda.stream(self._queue):
            self._queue.wait_event(computed)
            target.copy_(buffer, non_blocking=True)
            self._leaving[key] = self._queue.record_event()

    def _allocate_host(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.uint8, pin_memory=self._on_gpu)


def _shelf(arena: Arena, ahead_bytes: int) -> Shelf:
    """A shelf whose permanent weights leave room for what is read ahead, but no more than half."""
    return Shelf(arena, arena.size_bytes - min(arena.size_bytes // 2, ahead_bytes))
