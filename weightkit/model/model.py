"""The forward pass: embedding, layers, head."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from weightkit.errors import UnsupportedError
from weightkit.model.attention import Attention
from weightkit.model.cache import LatentCache, LayerCache
from weightkit.model.mlp import GatedMLP, MoE
from weightkit.model.norm import rms_norm
from weightkit.model.parallel import ALONE, Parallel
from weightkit.model.rope import Rope, Rotation
from weightkit.model.weights import Observer, Weights

if TYPE_CHECKING:
    from weightkit.family import Architecture

AfterLayer = Callable[[int, torch.Tensor], None]
"""Called with a layer's index and the hidden states after it (-1: the embedding)."""

FEED_TOKENS = 65_536
"""Tokens that go through an MLP or the experts at once. With 256 experts and 8 a token that is 2048 for each, enough
for a fast product. Beside them stand the F32 sums over experts, 1.9 GB at a width of 7168, or the two intermediates of
a dense layer, 4.8 GB."""


class Layer:
    """One decoder layer. It holds no weights: making one costs nothing, and a model can be run layer by layer."""

    def __init__(
        self,
        arch: Architecture,
        index: int,
        weights: Weights,
        rope: Rope,
        observe: Observer | None = None,
        parallel: Parallel = ALONE,
    ) -> None:
        self.arch = arch
        self.index = index
        self.prefix = f"model.layers.{index}"
        self.weights = weights
        self.attention = Attention(arch, f"{self.prefix}.self_attn", weights, rope.softmax_scale, observe, parallel)
        mlp = f"{self.prefix}.mlp"
        self.mlp: GatedMLP | MoE = (
            MoE(arch, mlp, weights, observe, parallel)
            if arch.is_moe_layer(index)
            else GatedMLP(mlp, weights, observe, parallel)
        )
        norms = (f"{self.prefix}.input_layernorm.weight", f"{self.prefix}.post_attention_layernorm.weight")
        self._names = [norms[0], *self.attention.names, norms[1], *self.mlp.names]

    def __call__(
        self,
        hidden: torch.Tensor,
        rotation: Rotation,
        cache: LayerCache | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``hidden`` [batch, seq, hidden] after this layer: ``attend``, then ``feed_forward``.

        Args:
            hidden: the states before it.
            rotation: that of the seq positions, which follow the cached tokens.
            cache: this layer's, read and extended.
            out: where to put the result; ``hidden`` itself for a layer in place. None for a new tensor.
        """
        self.weights.prefetch(self._names)
        hidden = self.attend(hidden, rotation, cache, out)
        return self.feed_forward(hidden, hidden)

    def attend(
        self,
        hidden: torch.Tensor,
        rotation: Rotation,
        cache: LayerCache | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``hidden`` [batch, seq, hidden] plus this layer's attention to it, normed. Arguments as for the whole layer.

        Without a cache the batch goes in the attention's slices, so that beside ``out`` memory holds one of them.
        """
        out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if out is None else out
        parts = list(self.attention.slices(hidden)) if cache is None else [slice(None)]
        attention = self.attention if len(parts) == 1 else self.attention.holding()
        weight = self.weights.get(f"{self.prefix}.input_layernorm.weight")
        for part in parts:
            states = hidden[part]
            normed = rms_norm(states, weight, self.arch.rms_norm_eps)
            torch.add(states, attention(normed, rotation, cache), out=out[part])
        return out

    def feed_forward(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """``hidden`` [..., hidden] plus the MLP or the experts on it, normed, ``FEED_TOKENS`` tokens at a time.

        Args:
            hidden: contiguous.
            out: where to put the result, contiguous; it may be ``hidden``. None for a new tensor.
        """
        out = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if out is None else out
        tokens, targets = hidden.view(-1, hidden.shape[-1]), out.view(-1, hidden.shape[-1])
        mlp = self.mlp if len(tokens) <= FEED_TOKENS else self.mlp.holding()
        for states, target in zip(tokens.split(FEED_TOKENS), targets.split(FEED_TOKENS), strict=True):
            torch.add(states, mlp(self.mlp_input(states)), out=target)
        return out

    def mlp_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the MLP, or the router and the experts, see of ``hidden`` [..., hidden] after the attention."""
        weight = self.weights.get(f"{self.prefix}.post_attention_layernorm.weight")
        return rms_norm(hidden, weight, self.arch.rms_norm_eps)


class Model:
    """A member of the family: DeepSeek-V2, V2-Lite, V3, R1, Kimi-K2, Moonlight. MTP layers are no part of it.

    The dtype and the device are those of the weights: in F32 logits agree with transformers' to 1e-4 of the largest; in
    BF16 norms, routing, rotation, softmax and the sum over experts are F32, the rest BF16.

    Args:
        arch: the config's architecture.
        weights: the source of weights; asked for each weight at each use.
        observe: called with each linear map's name and input, for calibration.
        parallel: this rank's part of the model; all ranks call the same methods with the same arguments.
    """

    def __init__(
        self, arch: Architecture, weights: Weights, observe: Observer | None = None, parallel: Parallel = ALONE
    ) -> None:
        self.arch = arch
        self.weights = weights
        self.parallel = parallel
        self.rope = Rope.of(arch)
        self.layers = [Layer(arch, i, weights, self.rope, observe, parallel) for i in range(arch.num_hidden_layers)]

    def new_cache(self) -> LatentCache:
        """An empty cache for one batch of sequences."""
        return LatentCache(len(self.layers))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [batch, seq] to hidden states [batch, seq, hidden], in the weights' dtype on their device."""
        return self.parallel.embed(self.weights, "model.embed_tokens.weight", ids, self.arch.vocab_size)

    def hidden_states(
        self, ids: torch.Tensor, cache: LatentCache | None = None, after_layer: AfterLayer | None = None
    ) -> torch.Tensor:
        """Hidden states [batch, seq, hidden] after the last layer, before the final norm.

        Args:
            ids: [batch, seq] token ids; with a cache, those that follow what it holds.
            cache: read and extended.
            after_layer: sees the hidden states after each layer.

        Raises:
            UnsupportedError: more tokens than the indexer of V3.2 or GLM-5 picks.
        """
        start = 0 if cache is None else cache.length
        self._require_dense(start + ids.shape[1])
        hidden = self.embed(ids)
        if after_layer is not None:
            after_layer(-1, hidden)
        rotation = self.rope.at(torch.arange(start, start + ids.shape[1], device=hidden.device))
        for layer in self.layers:
            hidden = layer(hidden, rotation, None if cache is None else cache.layers[layer.index])
            if after_layer is not None:
                after_layer(layer.index, hidden)
        return hidden

    def _require_dense(self, tokens: int) -> None:
        """Refuse what only sparse attention would compute."""
        limit = self.arch.index_topk
        if limit is not None and tokens > limit:
            raise UnsupportedError(
                "sparse attention, which weightkit does not compute; it is dense only up to index_topk tokens",
                where=self.arch.member,
                expected=f"at most {limit} tokens",
                found=tokens,
                fix="Use a shorter prompt or fewer new tokens.",
            )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final norm and head: ``hidden`` [..., hidden] to logits [..., vocab] F32."""
        head = "model.embed_tokens.weight" if self.arch.tie_word_embeddings else "lm_head.weight"
        normed = rms_norm(hidden, self.weights.get("model.norm.weight"), self.arch.rms_norm_eps)
        return self.parallel.head(self.weights, head, normed)

    def __call__(self, ids: torch.Tensor, cache: LatentCache | None = None) -> torch.Tensor:
        """Logits [batch, seq, vocab] F32 of the tokens that follow each of ``ids`` [batch, seq]."""
        return self.logits(self.hidden_states(ids, cache))
