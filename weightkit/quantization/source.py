"""The source's weights, read ahead of the solver in the order in which it asks for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from weightkit.checkpoint import Checkpoint
from weightkit.model.loading import Loader
from weightkit.quantization.memory import AHEAD

READERS = 3


class Source:
    """Weights [N, K] in F32 on the device. On a GPU they are read on a queue of their own, beside the computation.

    Args:
        exact: the checkpoint in F32.
        loader: reads and dequantizes.
    """

    def __init__(self, exact: Checkpoint, loader: Loader) -> None:
        self._exact = exact
        self._loader = loader
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="source")
        self._queue = torch.cuda.Stream(loader.device) if loader.device.type == "cuda" else None
        self._wanted: deque[str] = deque()
        self._ahead: dict[str, Future[tuple[torch.Tensor, torch.cuda.Event | None]]] = {}

    def close(self) -> None:
        """Stop reading ahead."""
        self._pool.shutdown(cancel_futures=True)

    def upcoming(self, names: Sequence[str]) -> None:
        """Start to read ``names``, a few at a time: they will be asked for in this order."""
        self._wanted.extend(names)
        self._read_ahead()

    def get(self, name: str) -> torch.Tensor:
        """The weight; whoever computes with it on the current queue finds it complete."""
        ahead = self._ahead.pop(name, None)
        tensor, event = self._load(name) if ahead is None else ahead.result()
        self._read_ahead()
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
            tensor.record_stream(torch.cuda.current_stream())
        return tensor

    def _read_ahead(self) -> None:
        while self._wanted and len(self._ahead) < AHEAD:
            name = self._wanted.popleft()
            self._ahead[name] = self._pool.submit(self._load, name)

    def _load(self, name: str) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        if self._queue is None:
            return self._loader.load(self._exact[name], torch.float32), None
        with torch.cuda.device(self._loader.device), torch.cuda.stream(self._queue):
            tensor = self._loader.load(self._exact[name], torch.float32)
            event = torch.cuda.Event()
            event.record()
        return tensor, event
