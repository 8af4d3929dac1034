"""Seconds by stage, on the host or on a GPU whose work runs behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Adds up the seconds of named stages. On a GPU they are those between two marks in its queue."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens within for the stage ``name``."""
        if self._on_gpu:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._marks.append((name, begin, end))
            return
        started = time.perf_counter()
        yield
        self._add(name, time.perf_counter() - started)

    def seconds(self) -> dict[str, float]:
        """Seconds by stage so far, in the order in which the stages first came; waits for the GPU."""
        if self._marks:
            torch.cuda.synchronize()
            for name, begin, end in self._marks:
                self._add(name, begin.elapsed_time(end) / 1000)
            self._marks.clear()
        return dict(self._seconds)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
