"""The latent key-value cache: ``kv_lora_rank + qk_rope_head_dim`` numbers a token and layer.

For the 671B model that is 70 KB a token in BF16, where keys and values of 128 heads in 61 layers would take 5 MB.
"""

from __future__ import annotations

import torch


class LayerCache:
    """One layer's tokens so far, [batch, length, width]: the normed latent, then the rotated rope key."""

    def __init__(self) -> None:
        self.length = 0
        self._room: torch.Tensor | None = None

    def append(self, new: torch.Tensor) -> torch.Tensor:
        """Add ``new`` [batch, seq, width]. Returns all tokens so far, [batch, length, width], a view of the cache."""
        end = self.length + new.shape[1]
        if self._room is None or end > self._room.shape[1]:
            # doubling: the copies add up to no more than twice the final size
            room = new.new_empty(new.shape[0], max(end, 2 * self.length), new.shape[2])
            if self._room is not None:
                room[:, : self.length] = self._room[:, : self.length]
            self._room = room
        self._room[:, self.length : end] = new
        self.length = end
        return self._room[:, :end]

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on."""
        self.length = min(self.length, length)


class LatentCache:
    """The caches of all layers of one batch of sequences."""

    def __init__(self, num_layers: int) -> None:
        self.layers = [LayerCache() for _ in range(num_layers)]

    @property
    def length(self) -> int:
        """Tokens that every layer has seen (a pass that was cut short leaves some layers ahead)."""
        return min((layer.length for layer in self.layers), default=0)

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on."""
        for layer in self.layers:
            layer.truncate(length)
