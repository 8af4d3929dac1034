"""The first failure of any rank stops all of them, and is told once.

A rank that fails leaves the others waiting for what it will never send: gloo notices a closed connection, NCCL within a
machine notices nothing until its timeout. So whoever fails first says so in the store in which the ranks met, a thread
of every other rank looks there twice a second, and these ranks exit without a word.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from weightkit.errors import DeviceError, RankError, WeightkitError
from weightkit.ranks.launch import LAUNCHED
from weightkit.ranks.ranks import Ranks
from weightkit.ranks.world import World

LOOK_EVERY_S = 0.5
GRACE_S = 3.0
"""How long a rank has to end by itself once another failed; and how long the cause has to become known, where all that
a rank sees is that another is gone."""

LEAVE_AFTER_S = 1.0
FIRST_WORD_S = 0.3
"""How long rank 0 has to be the first to report what all ranks find at once."""


@contextmanager
def together(ranks: Ranks, world: World) -> Iterator[None]:
    """Run the body on every rank to its end. Where it fails on one, that rank raises its error, and all others exit.

    Raises:
        WeightkitError: what the body raised on this rank, its place after the rank's; of others' only if none of them
            came first.
        SystemExit: with code 1 on ranks whose failure is not the first; with 130 after Ctrl-C on all but rank 0.
    """
    if ranks.size == 1:
        yield
        return
    watch = _Watch(world)
    try:
        yield
        ranks.wait()
    except KeyboardInterrupt:
        if world.rank > 0 or watch.failed():
            raise SystemExit(130) from None
        raise
    except Exception as exc:
        watch.report(exc)
        if isinstance(exc, OSError):  # has its place; and a closed pipe is nobody's failure
            raise
        raise _of_rank(exc, world) from exc
    finally:
        watch.stop()


def leave_quietly() -> NoReturn:
    """Exit with code 1, after the rank that says why: torchrun ends the others as soon as the first has ended."""
    time.sleep(LEAVE_AFTER_S)
    raise SystemExit(1)


class _Watch:
    """Looks for the failure of another rank, and tells of this rank's."""

    def __init__(self, world: World) -> None:
        run = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._rank = world.rank
        self._key = f"weightkit/failed/{run}"
        # a connection of its own: a group's may be held by an exchange that waits
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=60),
        )
        # who was started by hand may well outlive the shell that did it
        self._parent = os.getppid() if {LAUNCHED, "TORCHELASTIC_RUN_ID"} & os.environ.keys() else None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, name=f"rank {world.rank}'s watch", daemon=True)
        self._thread.start()

    def failed(self) -> bool:
        """Whether some rank failed. So it is where the store is gone: its keeper ended."""
        try:
            return bool(self._store.check([self._key]))
        except RuntimeError:
            return True

    def report(self, error: Exception) -> None:
        """Tell of this rank's failure; where another was first, or is the cause, exit.

        Raises:
            SystemExit: another rank's failure came first.
        """
        self.stop()
        if isinstance(error, RankError):  # only the other end of somebody's failure, if that becomes known
            until = time.monotonic() + GRACE_S
            while time.monotonic() < until and not self.failed():
                time.sleep(LOOK_EVERY_S)
        elif self._rank > 0:
            time.sleep(FIRST_WORD_S)
        first = False
        with contextlib.suppress(RuntimeError):
            first = self._store.add(self._key, 1) == 1
        if not first:
            leave_quietly()

    def stop(self) -> None:
        """Stop looking. The thread must be out of torch before Python ends."""
        self._stopped.set()
        self._thread.join(GRACE_S)

    def _look(self) -> None:
        while not self._stopped.wait(LOOK_EVERY_S):
            orphaned = self._parent is not None and os.getppid() != self._parent
            if (orphaned or self.failed()) and not self._stopped.wait(GRACE_S):
                # the main thread may hang in a kernel or an exchange that nothing ends
                sys.stdout.flush()
                os._exit(1)


def _of_rank(error: Exception, world: World) -> WeightkitError:
    """The error with its rank."""
    if isinstance(error, WeightkitError):
        error.where = str(world) if error.where is None else f"{world}: {error.where}"
        return error
    if isinstance(error, torch.OutOfMemoryError):
        what = f"out of memory ({str(error).split('. ')[0]})"
        return DeviceError(what, where=world, fix="Use more ranks, or give weights less memory.")
    fix = "This is a defect in weightkit. Run it again with --debug and report what it prints."
    return RankError(f"{type(error).__name__}: {error}", where=world, fix=fix)
