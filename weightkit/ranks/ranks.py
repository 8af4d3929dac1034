"""What ranks send each other: ``torch.distributed``, with nothing sent where there is one process alone."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from weightkit.errors import DeviceError, RankError
from weightkit.ranks.world import World
from weightkit.units import human_seconds

T = TypeVar("T")

JOIN_TIMEOUT_S = 600.0
"""How long the first ranks wait for the last one to start."""

ANSWER_TIMEOUT_S = 1800.0
"""How long a rank waits in one exchange. Ranks that read their weights from a slow disk are minutes apart; where a
process ends, the others learn it at once and do not wait for this. With NCCL torch then ends the process."""

_NCCL_SAYS = "Last error:"


class Ranks:
    """This process among ``size`` of them; by itself alone, ``size`` 1, and then nothing is sent.

    Raises ``RankError`` from each method that sends: a rank is gone, or does not answer.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self._group: dist.ProcessGroup | None = None  # for tensors; None: the one in which the ranks met

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """The ranks that torchrun started, or this process alone. Tensors that they exchange lie on ``device``.

        Raises:
            RankError: not all of them came.
            DeviceError: GPUs that do not get what others send.
        """
        world = World.of_environment()
        if world.size == 1:
            return cls()
        if not dist.is_initialized():
            _initialize(world, "nccl" if device.type == "cuda" else "gloo")
        ranks = cls(dist.get_rank(), dist.get_world_size())
        if device.type == "cuda":
            ranks._connect(device)
        return ranks

    def move_to(self, device: torch.device) -> None:
        """Exchange tensors on ``device`` from now on; every rank must call it. For those that joined on the CPU, before
        it was known that all have their GPUs. Raises ``DeviceError`` for GPUs that do not get what others send."""
        if self.size > 1 and device.type == "cuda":
            atexit.unregister(_leave_at_exit)
            with _answered("starting NCCL"):
                self._group = dist.new_group(backend="nccl", timeout=timedelta(seconds=ANSWER_TIMEOUT_S))
            self._connect(device)

    @staticmethod
    def device(name: str) -> torch.device:
        """The device of this process: of several GPUs the one of its local rank.

        Raises:
            DeviceError: no such device, or fewer GPUs than processes on this machine.
        """
        from weightkit.compute import choose_engine

        if choose_engine(name).name == "cpu":  # type: ignore[arg-type]
            return torch.device("cpu")
        local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= found:
            raise DeviceError(
                "more processes than GPUs on this machine",
                where="torchrun",
                expected=f"--nproc-per-node at most {found}",
                found=os.environ.get("LOCAL_WORLD_SIZE", local + 1),
            )
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def share_of(self, count: int) -> range:
        """The part of ``count`` things in a row that is this rank's: neighbours, parts differing by one at most."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def everybodys(self, value: T) -> list[T]:
        """``value`` of each rank (anything that pickles), in their order."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        with _answered("gathering"):
            dist.all_gather_object(values, value)
        return values

    def exchange(self, outgoing: Sequence[torch.Tensor], incoming: Sequence[int]) -> list[torch.Tensor]:
        """Send ``outgoing[r]`` [n, width] to rank r; what each rank sent here, ``incoming[r]`` rows, in their order."""
        if self.size == 1:
            return [outgoing[0]]
        arrived = [outgoing[0].new_empty((count, outgoing[0].shape[1])) for count in incoming]
        arrived[self.rank] = outgoing[self.rank]
        others = [rank for rank in range(self.size) if rank != self.rank]
        wanted = [self._to(rank, outgoing[rank].contiguous()) for rank in others if len(outgoing[rank])]
        wanted += [self._from(rank, arrived[rank]) for rank in others if incoming[rank]]
        with _answered("exchanging rows"):
            _carry(wanted)
        return arrived

    def in_turn(self, total: torch.Tensor, add: Callable[[torch.Tensor], None]) -> None:
        """Add to ``total``, zeros at first, with every rank's ``add`` in the order of ranks; all ranks then hold it."""
        if self.rank > 0:
            with _answered("receiving a sum"):
                _carry([self._from(self.rank - 1, total)])
        add(total)
        if self.size > 1:
            with _answered("passing a sum on"):
                if self.rank + 1 < self.size:
                    _carry([self._to(self.rank + 1, total)])
                dist.broadcast(total, self.size - 1, group=self._group)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks in place of ``tensor`` (contiguous, of one shape on all), the same bits on each."""
        if self.size > 1:
            with _answered("summing"):
                dist.all_reduce(tensor, group=self._group)
        return tensor

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """``tensor``, of one shape on all ranks, of each rank, in their order."""
        if self.size == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        with _answered("gathering"):
            dist.all_gather(found, tensor, group=self._group)
        return found

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` of rank 0, which every rank has room for in its own."""
        if self.size > 1:
            with _answered("waiting for rank 0"):
                dist.broadcast(tensor, 0, group=self._group)
        return tensor

    def agree(self, numbers: Sequence[int]) -> list[int]:
        """Rank 0's ``numbers``, as many as on every rank. For ranks that joined on the CPU."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.int64)
        with _answered("waiting for rank 0"):
            dist.broadcast(found, 0)
        agreed: list[int] = found.tolist()
        return agreed

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            with _answered("waiting for all"):  # torch's barrier would open a GPU, also for ranks that work on the CPU
                dist.all_gather_object([None] * self.size, None)

    def leave(self) -> None:
        """End it, once all have done their work: nothing can be sent any more."""
        if self.size > 1:
            dist.destroy_process_group()

    def _connect(self, device: torch.device) -> None:
        """Exchange a number in each way. NCCL makes connections at the first exchange of a kind, and takes memory for
        them: so it has, before anybody measures what is free. And what does not work is known before the work begins.
        """
        with _answered("starting NCCL"):
            mine = torch.full((1, 1), float(self.rank), device=device)
            arrived = [self.broadcast(mine.clone()), self.sum(mine.clone())]
            arrived += self.exchange([mine] * self.size, [1] * self.size)
            found = torch.cat(arrived).flatten().tolist()
        expected = [0.0, float(sum(range(self.size))), *map(float, range(self.size))]
        if found != expected:
            raise DeviceError(
                "the GPUs do not get what others send",
                where=device,
                expected=expected,
                found=found,
                fix="Try NCCL_P2P_DISABLE=1: an IOMMU or PCI ACS may be in the way of what GPUs write to each other.",
            )

    def _to(self, rank: int, tensor: torch.Tensor) -> dist.P2POp:
        return dist.P2POp(dist.isend, tensor, rank, self._group)

    def _from(self, rank: int, tensor: torch.Tensor) -> dist.P2POp:
        return dist.P2POp(dist.irecv, tensor, rank, self._group)


def _carry(wanted: list[dist.P2POp]) -> None:
    """Send and receive. Even one tensor goes as a batch: NCCL otherwise makes another communicator for each pair of
    ranks, with memory of its own."""
    for work in dist.batch_isend_irecv(wanted) if wanted else []:
        work.wait()


def _initialize(world: World, backend: str) -> None:
    """Meet the other ranks where torchrun says."""
    started = time.monotonic()
    try:
        meeting = rendezvous("env://", world.rank, world.size, timeout=timedelta(seconds=JOIN_TIMEOUT_S))
        store, _, _ = next(meeting)
        patience = timedelta(seconds=ANSWER_TIMEOUT_S)
        store.set_timeout(patience)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=patience)
        if backend == "gloo":
            atexit.register(_leave_at_exit)
    except (RuntimeError, ValueError) as exc:
        waited = human_seconds(time.monotonic() - started)
        raise RankError(
            f"the ranks did not come together within {waited} ({_said(exc)})",
            where=world,
            expected=f"{world.size} ranks at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}",
            fix="Start torchrun on every node with the same --nnodes, --nproc-per-node and --rdzv-endpoint.",
        ) from exc


def _leave_at_exit() -> None:
    """gloo's threads, if they are left to run while Python ends, abort the process now and then, and with it torchrun.
    Not with NCCL: a group that others have left may have to be waited for, which only torch itself does rightly.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _answered(doing: str) -> Iterator[None]:
    """What torch.distributed raises where a rank is gone, as what it is. What this rank's own GPU failed with, which an
    exchange may be the first to hear, stays what it is."""
    try:
        yield
    except RuntimeError as exc:
        own = not isinstance(exc, dist.DistError) and "CUDA error" in str(exc)
        if own or isinstance(exc, torch.OutOfMemoryError):
            raise
        raise RankError(f"another rank is gone or does not answer (while {doing}: {_said(exc)})") from exc


def _said(error: Exception) -> str:
    """In a line. What NCCL itself says comes last, after where in torch's source it was heard."""
    lines = str(error).strip().split("\n")
    return lines[lines.index(_NCCL_SAYS) + 1] if _NCCL_SAYS in lines[:-1] else lines[0]
