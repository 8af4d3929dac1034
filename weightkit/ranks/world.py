"""A process's place among others, as torchrun tells it in the environment. No torch."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from weightkit.errors import DeviceError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class World:
    """This process among ``size`` of them.

    Attributes:
        rank, size: over all machines.
        local_rank, local_size: on this machine; the local rank is also the number of its GPU.
        host: the machine's name.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    host: str = ""

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] | None = None) -> World:
        """What torchrun set; without torchrun, this process alone.

        The sign of torchrun is ``LOCAL_RANK``: schedulers set ``WORLD_SIZE`` and ``RANK`` for other purposes.

        Raises:
            DeviceError: variables that are missing, no numbers, or contradict each other.
        """
        found = os.environ if environment is None else environment
        if "LOCAL_RANK" not in found:
            return cls(host=socket.gethostname())
        try:
            rank, size, local_rank, local_size = (int(found[name]) for name in _VARIABLES)
        except (KeyError, ValueError):
            raise _wrong(found) from None
        if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
            raise _wrong(found)
        return cls(rank, size, local_rank, local_size, socket.gethostname())

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size} ({self.host})"


def _wrong(found: Mapping[str, str]) -> DeviceError:
    return DeviceError(
        "the environment does not say which of several ranks this is",
        where="environment",
        expected=", ".join(_VARIABLES) + " as torchrun sets them",
        found=", ".join(f"{name}={found.get(name, '')}" for name in _VARIABLES),
        fix="Start it with torchrun, or unset LOCAL_RANK to run alone.",
    )
