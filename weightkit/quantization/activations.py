"""The hidden states of the calibration tokens between two layers: on the GPU, or in host memory where that is small."""

from __future__ import annotations

from collections.abc import Iterator

import torch

#: Tokens that go through a part of a layer at once. The results depend on it, so that it follows from nothing.
BATCH_TOKENS = 65_536


def sequences_a_batch(seq_len: int) -> int:
    """Whole sequences in a batch."""
    return max(1, BATCH_TOKENS // seq_len)


class Activations:
    """Hidden states [sequences, seq_len, width].

    Args:
        hidden: where they lie, on ``device`` or on the host.
        device: where they are computed with.
        total_tokens: tokens over all ranks.
    """

    def __init__(self, hidden: torch.Tensor, device: torch.device, total_tokens: int) -> None:
        self.hidden = hidden
        self.device = device
        self.total_tokens = total_tokens

    @property
    def seq_len(self) -> int:
        return self.hidden.shape[1]

    def batches(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Sequences that go through at once, on the device: give them back with ``put`` where they changed."""
        step = sequences_a_batch(self.seq_len)
        for start in range(0, len(self.hidden), step):
            place = slice(start, min(start + step, len(self.hidden)))
            yield place, self.hidden[place].to(self.device)

    def put(self, place: slice, batch: torch.Tensor) -> None:
        """The batch at ``place``, changed. (One that lies here already was changed in place.)"""
        if self.hidden.device != batch.device:
            self.hidden[place] = batch.to(self.hidden.device)

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """The states of ``tokens`` [n] (I64 on the device, indices over all sequences): [n, width] on the device."""
        flat = self.hidden.view(-1, self.hidden.shape[-1])
        return flat.index_select(0, tokens.to(flat.device)).to(self.device)
