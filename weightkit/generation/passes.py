"""Several sequences of different lengths through the model at once, so that each layer's weights are read once for all.

Nothing is padded: attention takes each sequence by itself, with its own positions and cache, and what follows, the
experts above all, takes the tokens of all sequences in one piece. A sequence's result is that of the sequence alone
but for the order in which a matrix library adds, which may differ with the number of rows: in F32 logits agree to
about 1e-6 of the largest; in BF16 rounding may part two runs where the best logits lie closer than that.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weightkit.model import AfterLayer, CheckpointWeights, LatentCache, Layer, Model, Rotation


@dataclass(frozen=True)
class _Part:
    """Neighbouring tokens of one sequence, and where they lie among all tokens of the pass."""

    rows: slice
    rotation: Rotation
    cache: LatentCache


def run_pass(
    model: Model,
    weights: CheckpointWeights,
    sequences: Sequence[tuple[Sequence[int], LatentCache]],
    *,
    most_tokens: int,
    after_layer: AfterLayer | None = None,
) -> torch.Tensor:
    """Hidden states [sequences, hidden] of each sequence's last token after the last layer, before the final norm.

    Args:
        model, weights: the model, and what its weights come from, told what the next layer needs.
        sequences: ids that follow what the cache holds, at least one each; caches are extended.
        most_tokens: of a sequence through attention at once.
        after_layer: sees the hidden states [1, tokens, hidden] of all sequences after each layer.
    """
    ids = torch.tensor([[token for tokens, _ in sequences for token in tokens]])
    hidden = model.embed(ids)
    if after_layer is not None:
        after_layer(-1, hidden)
    parts = _parts(model, sequences, most_tokens, hidden.device)
    for layer in model.layers:
        after = model.layers[layer.index + 1 : layer.index + 2]
        weights.upcoming(_names(after[0]) if after else ["model.norm.weight", _head(model)])
        weights.prefetch(_names(layer))
        _attend(layer, hidden, parts)
        hidden = layer.feed_forward(hidden, hidden)
        if after_layer is not None:
            after_layer(layer.index, hidden)
    ends = torch.tensor([len(tokens) for tokens, _ in sequences]).cumsum(0) - 1
    return hidden[0, ends.to(hidden.device)]


def _parts(
    model: Model, sequences: Sequence[tuple[Sequence[int], LatentCache]], most_tokens: int, device: torch.device
) -> list[_Part]:
    parts, at = [], 0
    for tokens, cache in sequences:
        for start in range(0, len(tokens), most_tokens):
            count, first = min(most_tokens, len(tokens) - start), cache.length + start
            rotation = model.rope.at(torch.arange(first, first + count, device=device))
            parts.append(_Part(slice(at + start, at + start + count), rotation, cache))
        at += len(tokens)
    return parts


def _attend(layer: Layer, hidden: torch.Tensor, parts: Sequence[_Part]) -> None:
    """Add the layer's attention to ``hidden`` in place; its weights are read once for all parts, and dequantized once
    where they are not multiplied with as they are stored."""
    if len(parts) > 1:
        held = copy.copy(layer)
        held.attention = layer.attention.holding()
        layer = held
    for part in parts:
        states = hidden[:, part.rows]
        layer.attend(states, part.rotation, part.cache.layers[layer.index], out=states)


def _names(layer: Layer) -> list[str]:
    """The weights of a layer that every token needs, in the order of their use."""
    norms = [f"{layer.prefix}.{norm}_layernorm.weight" for norm in ("input", "post_attention")]
    return [norms[0], *layer.attention.names, norms[1], *layer.mlp.names]


def _head(model: Model) -> str:
    return "model.embed_tokens.weight" if model.arch.tie_word_embeddings else "lm_head.weight"
