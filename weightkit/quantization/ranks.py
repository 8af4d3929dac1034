"""Several processes, each with a GPU and a part of the calibration sequences, that quantize one checkpoint.

Sequences lie on the ranks in their order, experts go round them. Sums over tokens are made in the order of the tokens,
whatever rank they lie on, so that the same bytes come out of any number of ranks on equal devices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from weightkit.errors import DeviceError

T = TypeVar("T")


class Ranks:
    """This process among ``size`` of them; by itself alone, ``size`` 1, and then nothing is sent."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank = rank
        self.size = size
        self._device = device or torch.device("cpu")

    @classmethod
    def join(cls, device: torch.device) -> Ranks:
        """The ranks that torchrun started, or this process alone."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), device)

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
        dist.all_gather_object(values, value)
        return values

    def exchange(self, outgoing: Sequence[torch.Tensor], incoming: Sequence[int]) -> list[torch.Tensor]:
        """Send ``outgoing[r]`` [n, width] to rank r; what each rank sent here, ``incoming[r]`` rows, in their order."""
        if self.size == 1:
            return [outgoing[0]]
        arrived = [outgoing[0].new_empty((count, outgoing[0].shape[1])) for count in incoming]
        arrived[self.rank] = outgoing[self.rank]
        others = [rank for rank in range(self.size) if rank != self.rank]
        wanted = [dist.P2POp(dist.isend, outgoing[rank].contiguous(), rank) for rank in others if len(outgoing[rank])]
        wanted += [dist.P2POp(dist.irecv, arrived[rank], rank) for rank in others if incoming[rank]]
        for work in dist.batch_isend_irecv(wanted) if wanted else []:
            work.wait()
        return arrived

    def in_turn(self, total: torch.Tensor, add: Callable[[torch.Tensor], None]) -> None:
        """Add to ``total``, zeros at first, with every rank's ``add`` in the order of ranks; all ranks then hold it."""
        if self.rank > 0:
            dist.recv(total, self.rank - 1)
        add(total)
        if self.size > 1:
            if self.rank + 1 < self.size:
                dist.send(total, self.rank + 1)
            dist.broadcast(total, self.size - 1)

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """``tensor``, of one shape on all ranks, of each rank, in their order."""
        if self.size == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor)
        return found

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` of rank 0, which every rank has room for in its own."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()
