"""One layer's weights while it is quantized: first as they came, then, one by one, as integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from weightkit.errors import MissingTensorError
from weightkit.quantization.packed import Packed

Load = Callable[[str], torch.Tensor]
"""A weight by its published name, in the compute dtype on the device."""


class LayerWeights:
    """A source of weights (``weightkit.model.Weights``) for one layer.

    Args:
        load: for what is not quantized; it is kept.
        device, dtype: where and in which is computed.
        keep_bytes: most memory for dequantized weights that are kept for their next use.
    """

    def __init__(self, load: Load, device: torch.device, dtype: torch.dtype, keep_bytes: int = 0) -> None:
        self._load = load
        self.device = device
        self.dtype = dtype
        self._room = keep_bytes
        self._held: dict[str, torch.Tensor] = {}
        self._packed: dict[str, Packed] = {}

    def replace(self, name: str, packed: Packed) -> None:
        """From now on ``name`` is what ``packed`` says."""
        self._held.pop(name, None)
        self._packed[name] = packed

    def get(self, name: str) -> torch.Tensor:
        """See ``weightkit.model.Weights.get``."""
        if name in self._held:
            return self._held[name]
        packed = self._packed.get(name)
        if packed is None:
            tensor = self._held[name] = self._load(name)
            return tensor
        tensor = packed.weight(self.dtype)
        if tensor.nbytes <= self._room:
            self._room -= tensor.nbytes
            self._held[name] = tensor
        return tensor

    def rows(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """See ``weightkit.model.Weights.rows``: a layer has no embedding."""
        raise MissingTensorError("not a weight of a layer", where=name)

    def prefetch(self, names: Sequence[str]) -> None:
        """Nothing to do: whoever quantizes reads ahead."""
