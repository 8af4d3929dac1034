"""A task on a node whose GPU works, or breaks, as its environment says: for tests on machines that have none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch  # noqa: F401 - what a GPU says comes out of it

from weightkit.cluster import RayExecutor, filling
from weightkit.cluster.news import News
from weightkit.cluster.writing import Order, write_file
from weightkit.compute import CpuEngine, Engine, EngineSupply, Started

#: Of a node: ``works``, or how many strips its GPU computes before it breaks; of several, each after a comma.
STATE = "TEST_GPU"


_run = ""


class Gpu(CpuEngine):
    """Computes as the CPU does, and writes down where."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        states = os.environ[STATE].split(",")
        self._state = states[int(os.environ["CUDA_VISIBLE_DEVICES"]) if len(states) > 1 else 0]
        self._log, self.left = log, float("inf") if self._state == "works" else int(self._state)

    def start_dequantize(self, *arguments: object) -> Started:
        if self.left <= 0:
            raise RuntimeError("CUDA error: unspecified launch failure")
        self.left -= 1
        with self._log.open("a") as log:
            log.write(f"{self._state}\n")
        return super().start_dequantize(*arguments)  # type: ignore[arg-type]


class Supply:
    """An engine that is there at once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def now(self) -> Engine:
        return self._engine


def write_with_gpu(order: Order) -> Iterator[News]:
    """As ``write_file``. A line a strip of a GPU's in the log beside the target."""

    def start_engine(*_: object, **__: object) -> EngineSupply:
        return Supply(Gpu(log_of(order.place.target)))

    global _run
    if order.place.hold != _run:  # a process may serve several runs
        _run = order.place.hold
        filling._engines.clear()
    filling.start_engine = start_engine  # type: ignore[assignment]
    yield from write_file(order)


def log_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.log")


class GpuRay(RayExecutor):
    """Whose nodes have such GPUs."""

    work = staticmethod(write_with_gpu)
