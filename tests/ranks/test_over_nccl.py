"""What ranks send over NCCL, between threads, by a stand-in that has NCCL's rules and nothing of torch's that breaks
them: no send or receive outside a batch, no barrier of torch's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from torch.overrides import TorchFunctionMode

from weightkit.errors import DeviceError, RankError
from weightkit.ranks import World
from weightkit.ranks import ranks as module
from weightkit.ranks.ranks import Ranks

T = TypeVar("T")

GPU = torch.device("cuda", 0)
SIZE = 3
HANGS_S = 60
"""Nobody waits as long, unless for what never comes."""

TAKEN = {torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int32, torch.int64}


class GpuIsHere(TorchFunctionMode):
    """What is made on a GPU is made on the host."""

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if "device" in options:
            options["device"] = "cpu"
        return func(*args, **options)


@dataclass(frozen=True)
class Op:
    kind: Callable[..., None]
    tensor: torch.Tensor
    peer: int
    group: str | None


class Nccl:
    """``torch.distributed`` for ``SIZE`` threads.

    Attributes:
        done: what each rank did, with the group's backend.
        broken: whether what is sent arrives as something else.
    """

    DistError = torch.distributed.DistError  # type: ignore[attr-defined]
    P2POp = Op

    def __init__(self) -> None:
        self.done: list[list[tuple[str, str]]] = [[] for _ in range(SIZE)]
        self.broken = False
        self._default = ""
        self._me = threading.local()
        self._meeting = threading.Barrier(SIZE)
        self._brought: list[Any] = [None] * SIZE
        self._mail = {(a, b): SimpleQueue[Any]() for a in range(SIZE) for b in range(SIZE)}
        self._connected: list[set[str]] = [set() for _ in range(SIZE)]

    # --- the threads ----------------------------------------------------------------------------------------------

    def on_ranks(self, work: Callable[[int], T]) -> list[T]:
        """What ``work`` returns on each rank. Raises what it raises on any."""
        found: dict[int, T] = {}
        failed: list[BaseException] = []

        def run(rank: int) -> None:
            self._me.rank = rank
            try:
                with GpuIsHere():
                    found[rank] = work(rank)
            except BaseException as exc:
                failed.append(exc)
                self._meeting.abort()

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(SIZE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        return [found[rank] for rank in range(SIZE)]

    def world(self) -> World:
        return World(self.get_rank(), SIZE, self.get_rank(), SIZE, "here")

    def initialize(self, _: World, backend: str) -> None:
        self._default = backend

    # --- torch.distributed ----------------------------------------------------------------------------------------

    def is_initialized(self) -> bool:
        return bool(self._default)

    def get_rank(self) -> int:
        rank: int = self._me.rank
        return rank

    def get_world_size(self) -> int:
        return SIZE

    def new_group(self, *, backend: str, timeout: timedelta) -> str:
        assert timeout.total_seconds() > 0
        return backend

    def all_reduce(self, tensor: torch.Tensor, group: str | None = None) -> None:
        tensor.copy_(torch.stack(self._together("all_reduce", tensor, group)).sum(0))

    def broadcast(self, tensor: torch.Tensor, source: int, group: str | None = None) -> None:
        tensor.copy_(self._together("broadcast", tensor, group)[source])

    def all_gather(self, found: list[torch.Tensor], tensor: torch.Tensor, group: str | None = None) -> None:
        for place, brought in zip(found, self._together("all_gather", tensor, group), strict=True):
            place.copy_(brought)

    def all_gather_object(self, found: list[Any], value: object) -> None:
        found[:] = self._meet("all_gather_object", value, self._default)

    def isend(self) -> None: ...

    def irecv(self) -> None: ...

    def batch_isend_irecv(self, ops: Sequence[Op]) -> list[Any]:
        """A send ends when what it sends was received, as one of many bytes does."""
        backend, me, sent = self._backend(ops[0].group), self.get_rank(), []
        assert backend in self._connected[me], "the first exchange of a group must be everybody's"
        self.done[me].append(("batch", backend))
        for op in ops:
            self._require_fit(op.tensor, backend)
            if op.kind.__name__ == "isend":
                sent.append(threading.Event())
                self._mail[me, op.peer].put((op.tensor.clone().add_(self.broken), sent[-1]))
        for op in ops:
            if op.kind.__name__ == "irecv":
                tensor, received = self._mail[op.peer, me].get(timeout=HANGS_S)
                assert (tensor.shape, tensor.dtype) == (op.tensor.shape, op.tensor.dtype)
                op.tensor.copy_(tensor)
                received.set()
        assert all(received.wait(HANGS_S) for received in sent)
        return [SimpleNamespace(wait=lambda: None)]

    def _backend(self, group: str | None) -> str:
        backend = self._default if group is None else group
        assert backend == "nccl", "tensors of a GPU's go over NCCL"
        return backend

    def _require_fit(self, tensor: torch.Tensor, backend: str) -> None:
        assert backend == "gloo" or (tensor.is_contiguous() and tensor.dtype in TAKEN and tensor.numel())

    def _together(self, name: str, tensor: torch.Tensor, group: str | None) -> list[torch.Tensor]:
        backend = self._backend(group)
        self._require_fit(tensor, backend)
        brought = self._meet(name, tensor.clone(), backend)
        assert len({(other.shape, other.dtype) for other in brought}) == 1
        return brought

    def _meet(self, name: str, value: Any, backend: str) -> list[Any]:
        me = self.get_rank()
        self.done[me].append((name, backend))
        self._brought[me] = (name, backend, value)
        self._meeting.wait(HANGS_S)
        brought = list(self._brought)
        self._meeting.wait(HANGS_S)
        self._connected[me].add(backend)
        assert {entry[:2] for entry in brought} == {(name, backend)}, "ranks do different things"
        return [entry[2] for entry in brought]


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Nccl:
    made = Nccl()
    monkeypatch.setattr(module, "dist", made)
    monkeypatch.setattr(module, "_initialize", made.initialize)
    monkeypatch.setattr(module.World, "of_environment", made.world)
    return made


def test_ranks_are_connected_in_each_way_before_any_work(nccl: Nccl) -> None:
    """What NCCL takes of a GPU's memory is then known to who measures what is free."""
    nccl.on_ranks(lambda _: Ranks.join(GPU))
    assert nccl.done == [[("broadcast", "nccl"), ("all_reduce", "nccl"), ("batch", "nccl")]] * SIZE


def test_ranks_that_met_on_the_cpu_are_connected_when_they_move(nccl: Nccl, monkeypatch: pytest.MonkeyPatch) -> None:
    """From then on Python's exit no longer leaves the others, which NCCL might have to wait for."""
    left_alone: list[object] = []
    monkeypatch.setattr(module, "atexit", SimpleNamespace(unregister=left_alone.append))

    def work(_: int) -> list[list[int]]:
        ranks = Ranks.join(torch.device("cpu"))
        before = ranks.everybodys([ranks.rank])
        ranks.move_to(GPU)
        ranks.wait()
        return before

    assert nccl.on_ranks(work) == [[[0], [1], [2]]] * SIZE
    over = [("broadcast", "nccl"), ("all_reduce", "nccl"), ("batch", "nccl")]
    assert nccl.done == [[("all_gather_object", "gloo"), *over, ("all_gather_object", "gloo")]] * SIZE
    assert left_alone == [module._leave_at_exit] * SIZE


def test_gpus_that_do_not_get_what_others_send_are_refused(nccl: Nccl) -> None:
    nccl.broken = True
    with pytest.raises(DeviceError, match=r"cuda:0: the GPUs do not get what others send(.|\n)*NCCL_P2P_DISABLE=1"):
        nccl.on_ranks(lambda _: Ranks.join(GPU))


def test_a_sum_goes_from_rank_to_rank_in_their_order(nccl: Nccl) -> None:
    def work(rank: int) -> float:
        ranks, total = Ranks.join(GPU), torch.zeros(2, 2)
        ranks.in_turn(total, lambda held: held.mul_(10).add_(rank + 1))
        ranks.wait()
        return float(total[1, 1])

    assert nccl.on_ranks(work) == [123.0] * SIZE


def test_rows_are_exchanged_also_by_ranks_that_have_none_for_another(nccl: Nccl) -> None:
    """Rank 1 has nothing to send, and rank 2 gets nothing."""
    counts = [[2, 1, 0], [0, 0, 0], [4, 3, 0]]

    def work(rank: int) -> list[Any]:
        ranks = Ranks.join(GPU)
        outgoing = [torch.full((n, 4), float(rank), dtype=torch.bfloat16)[:, ::2] for n in counts[rank]]
        arrived = ranks.exchange(outgoing, [row[rank] for row in counts])
        gathered = torch.cat(ranks.gather(torch.full((3,), rank, dtype=torch.uint8)))
        return [torch.cat(arrived)[:, 0].tolist(), gathered.tolist()]

    rows = [[0.0] * 2 + [2.0] * 4, [0.0] + [2.0] * 3, []]
    assert nccl.on_ranks(work) == [[found, [0, 0, 0, 1, 1, 1, 2, 2, 2]] for found in rows]


NCCL_ERROR = """NCCL error in: /torch/csrc/distributed/c10d/NCCLUtils.cpp:94, invalid usage, NCCL version 2.28.9
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 18000"""


@pytest.mark.parametrize(
    ("error", "expected", "said"),
    [
        (torch.distributed.DistBackendError(NCCL_ERROR), RankError, r"while summing: Duplicate GPU detected : rank 0"),
        (RuntimeError("Connection closed by peer\nmore"), RankError, r"while summing: Connection closed by peer\)"),
        (RuntimeError("CUDA error: an illegal memory access\nmore"), RuntimeError, r"^CUDA error: an illegal"),
    ],
    ids=["NCCL", "gloo", "CUDA"],
)
def test_a_rank_that_is_gone_is_told_from_a_gpu_that_fails(
    error: Exception, expected: type[Exception], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(module.dist, "all_reduce", fail)
    with pytest.raises(expected, match=said):
        Ranks(0, 2).sum(torch.ones(1))
