"""How the forward pass is divided among ranks, and how parts become whole again.

Every rank has whole hidden states, whole latents in its cache, the router and the norms. Attention is divided by heads,
a dense MLP and the shared experts by intermediate columns, routed experts by number, embedding and head by rows of the
vocabulary: what ``shard --mp`` cuts. A layer's attention and its MLP each end in one sum over ranks; the embedding ends
in one, the head in one gathering of logits.

Sums are F32 and the same bits on every rank, so that all ranks route alike and see the same logits. They are not the
bits of one process, which adds the same products in another order: in F32 logits agree to about 1e-6 of the largest, so
greedy tokens are the same wherever the best two logits are further apart than that; of equal ones both take the first.
In BF16 each rank rounds its part of a product once, which a process alone does once for the whole.
"""

from __future__ import annotations

import torch

from weightkit.model.weights import Weights, project
from weightkit.ranks.ranks import Ranks


class Parallel:
    """This rank's part of a model. Weights answer with its shares, as ``weightkit.layouts.rank_share`` cuts them."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = Ranks() if ranks is None else ranks

    @property
    def alone(self) -> bool:
        """Whether there is no other rank: then everything is whole and nothing is sent."""
        return self.ranks.size == 1

    def share_of(self, count: int) -> range:
        """Which of ``count`` heads, experts or vocabulary rows are this rank's."""
        return self.ranks.share_of(count)

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' ``part``, added in F32, in its dtype. ``part`` may be overwritten."""
        if self.alone:
            return part
        return self.ranks.sum(part.float().contiguous()).to(part.dtype)

    def embed(self, weights: Weights, name: str, ids: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Rows ``ids`` [...] of the embedding ``name`` [vocab, hidden]: each from the rank that has it."""
        if self.alone:
            return weights.rows(name, ids)
        mine = self.share_of(vocab_size)
        elsewhere = (ids < mine.start) | (ids >= mine.stop)
        rows = weights.rows(name, (ids - mine.start).clamp(0, len(mine) - 1))
        return self.sum(rows.masked_fill(elsewhere[..., None].to(rows.device), 0.0))

    def head(self, weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., hidden] times the transpose of the head ``name`` [vocab, hidden]: [..., vocab] F32."""
        part = project(weights, name, x).float()
        return part if self.alone else torch.cat(self.ranks.gather(part.contiguous()), dim=-1)


ALONE = Parallel()
"""One process, which has the whole model."""
