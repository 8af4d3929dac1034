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
from weightkit.model.rope import Rope, Rotation
from weightkit.model.weights import Observer, Weights, project

if TYPE_CHECKING:
    from weightkit.family import Architecture

AfterLayer = Callable[[int, torch.Tensor], None]
"""Called with a layer's index and the hidden states after it (-1: the embedding)."""


class Layer:
    """One decoder layer. It holds no weights: making one costs nothing, and a model can be run layer by layer."""

    def __init__(
        self, arch: Architecture, index: int, weights: Weights, rope: Rope, observe: Observer | None = None
    ) -> None:
        self.arch = arch
        self.index = index
        self.prefix = f"model.layers.{index}"
        self.weights = weights
        self.attention = Attention(arch, f"{self.prefix}.self_attn", weights, rope.softmax_scale, observe)
        mlp = f"{self.prefix}.mlp"
        self.mlp: GatedMLP | MoE = (
            MoE(arch, mlp, weights, observe) if arch.is_moe_layer(index) else GatedMLP(mlp, weights, observe)
        )
        norms = (f"{self.prefix}.input_layernorm.weight", f"{self.prefix}.post_attention_layernorm.weight")
        self._names = [norms[0], *self.attention.names, norms[1], *self.mlp.names]

    def __call__(self, hidden: torch.Tensor, rotation: Rotation, cache: LayerCache | None = None) -> torch.Tensor:
        """``hidden`` [batch, seq, hidden] after this layer.

        Args:
            hidden: the states before it.
            rotation: that of the seq positions, which follow the cached tokens.
            cache: this layer's, read and extended.
        """
        self.weights.prefetch(self._names)
        hidden = hidden + self.attention(self._norm("input_layernorm", hidden), rotation, cache)
        return hidden + self.mlp(self._norm("post_attention_layernorm", hidden))

    def _norm(self, module: str, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weights.get(f"{self.prefix}.{module}.weight"), self.arch.rms_norm_eps)


class Model:
    """A member of the family: DeepSeek-V2, V2-Lite, V3, R1, Kimi-K2, Moonlight. MTP layers are no part of it.

    The dtype and the device are those of the weights: in F32 logits agree with transformers' to 1e-4 of the largest; in
    BF16 norms, routing, rotation, softmax and the sum over experts are F32, the rest BF16.

    Args:
        arch: the config's architecture.
        weights: the source of weights; asked for each weight at each use.
        observe: called with each linear map's name and input, for calibration.
    """

    def __init__(self, arch: Architecture, weights: Weights, observe: Observer | None = None) -> None:
        self.arch = arch
        self.weights = weights
        self.rope = Rope.of(arch)
        self.layers = [Layer(arch, i, weights, self.rope, observe) for i in range(arch.num_hidden_layers)]

    def new_cache(self) -> LatentCache:
        """An empty cache for one batch of sequences."""
        return LatentCache(len(self.layers))

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [batch, seq] to hidden states [batch, seq, hidden], in the weights' dtype on their device."""
        return self.weights.rows("model.embed_tokens.weight", ids)

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
        return project(self.weights, head, normed).float()

    def __call__(self, ids: torch.Tensor, cache: LatentCache | None = None) -> torch.Tensor:
        """Logits [batch, seq, vocab] F32 of the tokens that follow each of ``ids`` [batch, seq]."""
        return self.logits(self.hidden_states(ids, cache))
