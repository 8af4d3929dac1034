"""Choosing the next token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from weightkit.errors import GenerationError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn.
        top_p: draw from the fewest likeliest tokens that hold this much probability.
        seed: the same seed draws the same tokens, on every device that computes the same logits.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise GenerationError("no such temperature", expected="a number from 0 up", found=self.temperature)
        if not 0 < self.top_p <= 1:
            raise GenerationError("no such top_p", expected="a number above 0, at most 1", found=self.top_p)

    def generator(self) -> torch.Generator:
        """A fresh source of draws."""
        return torch.Generator().manual_seed(self.seed)

    def choose(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        """The next token's id from finite ``logits`` [vocab] F32."""
        if self.temperature == 0:
            return int(logits.argmax())
        # drawn on the CPU: generators of different devices draw differently
        shares = (logits.double().cpu() / self.temperature).softmax(dim=-1)
        if self.top_p < 1:
            ordered, places = shares.sort(descending=True)
            # a token stays if those before it do not fill top_p yet, so that at least one does
            ordered[ordered.cumsum(dim=-1) - ordered >= self.top_p] = 0.0
            shares = torch.zeros_like(shares).scatter_(0, places, ordered)
        return int(torch.multinomial(shares, 1, generator=generator))
