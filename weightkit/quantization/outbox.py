"""From the quantizer to the writer: tensors that were made, waited for in the order of the file."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from weightkit.checkpoint.reading import Bytes
from weightkit.errors import Interrupted

Arrival = Callable[[], object]
"""Waits until a copy has arrived in host memory."""


class Outbox:
    """Tensors by name on their way to the disk. One thread puts, others take. A file that is whole waits for its name
    until that thread has allowed it."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[torch.Tensor, Arrival | None]] = {}
        self._allowed: set[str] = set()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Hand over ``tensor``, on any device; a copy from a GPU goes on behind the caller's back."""
        arrival: Arrival | None = None
        if tensor.device.type == "cuda":
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            tensor, arrival = host, event.synchronize
        with self._changed:
            self._held[name] = (tensor, arrival)
            self._changed.notify_all()

    def take(self, name: str) -> Bytes:
        """The bytes of ``name``, flat, once they are there. See ``weightkit.writer.executor.Promises``."""
        with self._changed:
            self._changed.wait_for(lambda: name in self._held or self._closed)
            if name not in self._held:
                raise Interrupted("stopped before it was made", where=name)
            tensor, arrival = self._held.pop(name)
        if arrival is not None:
            arrival()
        content: Bytes = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        return content

    def allow(self, file: str) -> None:
        """What belongs to ``file`` is on the disk: it may get its name."""
        with self._changed:
            self._allowed.add(file)
            self._changed.notify_all()

    def settle(self, file: str) -> None:
        """Wait until ``file`` is allowed. See ``weightkit.writer.executor.Promises``."""
        with self._changed:
            self._changed.wait_for(lambda: file in self._allowed or self._closed)
            if file not in self._allowed:
                raise Interrupted("stopped before it was complete", where=file)

    def close(self) -> None:
        """Nothing more comes: whoever waits is told so."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
