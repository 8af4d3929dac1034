"""Ranks on this machine, as ``torchrun --nproc-per-node`` starts them, without its log among theirs. No torch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from weightkit.errors import DeviceError, RankError
from weightkit.ranks.world import World

LOOK_EVERY_S = 0.05
END_TIMEOUT_S = 15.0
"""How long ranks have to end once one of them failed, of which their own watch tells them."""

STOP_TIMEOUT_S = 2.0
"""How long they have after Ctrl-C, which reaches all processes of a terminal at once."""

LAUNCHED = "WEIGHTKIT_LAUNCHED"
"""Set for the ranks of ``launch``: they are not to outlive it."""


def start(size: int, arguments: Sequence[str]) -> int | None:
    """Run ``weightkit`` with ``arguments`` on ``size`` ranks of this machine, as torchrun would. The exit code; None
    where this process is such a rank already, or where one is enough.

    Raises:
        DeviceError: this is a rank among another number of them.
        RankError: one was ended by a signal.
    """
    world = World.of_environment()
    if world.size == size:
        return None
    if world.size > 1:
        raise DeviceError(
            "torchrun has started another number of ranks",
            where="--ranks",
            expected=world.size,
            found=size,
            fix="Leave --ranks out.",
        )
    return launch(size, [sys.executable, "-m", "weightkit", *arguments])


def launch(size: int, command: Sequence[str]) -> int:
    """Run ``command`` in ``size`` processes that find each other as torchrun's do. The first exit code that is not 0.

    Rank 0 has this process's standard input. None of them outlives this call.

    Raises:
        RankError: one was ended by a signal, and so could not say why.
    """
    with held_port() as port:
        return _launch(command, size, _environment(size, port))


@contextmanager
def held_port() -> Iterator[int]:
    """A port of this machine at which ranks may meet. The system gives it to nobody else meanwhile, as it is bound; the
    first rank's store may listen there, as it sets SO_REUSEADDR too."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def _launch(command: Sequence[str], size: int, common: Mapping[str, str]) -> int:
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(size):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=environment, stdin=None if rank == 0 else subprocess.DEVNULL))
        return _wait(ranks)
    except KeyboardInterrupt:
        _end(ranks, STOP_TIMEOUT_S)
        for process in ranks:  # a signal to this process alone did not reach them
            process.terminate()
        _end(ranks, STOP_TIMEOUT_S)
        return 130
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        for rank, code in enumerate(codes):
            if code is not None and code < 0:
                raise RankError(
                    f"ended by {signal.Signals(-code).name}",
                    where=f"rank {rank} of {len(ranks)}",
                    fix="SIGKILL is mostly the system's, for want of memory: use fewer ranks here, or more machines."
                    if code == -signal.SIGKILL
                    else None,
                )
        failed = [code for code in codes if code]
        if failed:
            _end(ranks, END_TIMEOUT_S)
            return failed[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(LOOK_EVERY_S)


def _end(ranks: Sequence[subprocess.Popen[bytes]], timeout_s: float) -> None:
    """Wait until all have ended by themselves, or for as long as they may take."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until and any(rank.poll() is None for rank in ranks):
        time.sleep(LOOK_EVERY_S)


def _environment(size: int, port: int) -> Mapping[str, str]:
    """What torchrun sets for all ranks of one machine."""
    threads = max(1, len(os.sched_getaffinity(0)) // size)
    return {
        "OMP_NUM_THREADS": str(threads),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # when one rank ends early, others' torch prints its C++ stack as a warning
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
        **os.environ,  # what the user set stands
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "GROUP_RANK": "0",
        LAUNCHED: "1",
    }
