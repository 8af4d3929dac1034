"""One pass over all tokens, layer by layer, with an eye on what goes through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from weightkit.model import Layer, Model, MoE

LOGIT_TOKENS = 256
"""Positions whose logits are in memory at once: 132 MB at a vocabulary of 129,280."""


@dataclass(frozen=True)
class Pass:
    """What one pass showed.

    Attributes:
        losses: negative log-likelihood of each token after the first, in nats, F32 on the CPU.
        finite: positions with finite logits.
        broken: where NaN or Inf came up first (``layer 3``), with how many tokens; None where all is finite.
        loads: tokens of each expert, by MoE layer.
    """

    losses: torch.Tensor
    finite: int
    broken: str | None
    loads: dict[int, list[int]]


@torch.inference_mode()
def run(model: Model, ids: Sequence[int], advance: Callable[[], None]) -> Pass:
    """Run ``ids`` through the model as one sequence. ``advance`` is called after each layer."""
    tokens = torch.tensor([ids])
    hidden = model.embed(tokens)
    rotation = model.rope.at(torch.arange(len(ids), device=hidden.device))
    broken, loads = _broken("the embedding", hidden), {}
    for layer in model.layers:
        model.weights.prefetch(layer_names(layer))
        attended = layer.attend(hidden, rotation)
        if isinstance(layer.mlp, MoE):
            chosen, _ = layer.mlp.route(layer.mlp_input(attended).flatten(0, -2))
            loads[layer.index] = layer.mlp.dispatch(chosen).counts
        hidden = layer.feed_forward(attended, attended)
        broken = broken or _broken(f"layer {layer.index}", hidden)
        advance()
    losses, finite = _losses(model, hidden[0], tokens[0])
    if broken is None and finite < len(ids):
        broken = f"{len(ids) - finite} of {len(ids)} tokens, first in the final norm or the head"
    return Pass(losses, finite, broken, loads)


def layer_names(layer: Layer) -> list[str]:
    """The weights that every token needs, in the order of their use."""
    norms = [f"{layer.prefix}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")]
    return [norms[0], *layer.attention.names, norms[1], *layer.mlp.names]


def _broken(place: str, hidden: torch.Tensor) -> str | None:
    finite = hidden.isfinite().all(dim=-1)
    count = finite.numel() - int(finite.sum())
    return f"{count} of {finite.numel()} tokens, first after {place}" if count else None


def _losses(model: Model, hidden: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Losses [n - 1] and the number of positions with finite logits, of ``hidden`` [n, hidden] and ``tokens`` [n]."""
    losses, finite = [], 0
    for start in range(0, len(hidden), LOGIT_TOKENS):
        logits = model.logits(hidden[start : start + LOGIT_TOKENS])
        finite += int(logits.isfinite().all(dim=-1).sum())
        following = tokens[start + 1 : start + 1 + len(logits)].to(logits.device)
        losses.append(cross_entropy(logits[: len(following)], following, reduction="none").cpu())
    return torch.cat(losses), finite
