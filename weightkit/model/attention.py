"""Multi-head latent attention (MLA) in its absorbed form.

Every head's key is ``W_UK c`` and its value ``W_UV c``, with ``c`` the one latent of a token (DeepSeek-V2,
arXiv:2405.04434, section 2.1). As ``q . (W_UK c) = (W_UK^T q) . c``, the key projection is applied to the query
instead, the products are taken with the latents themselves, and ``W_UV`` comes after the softmax: keys and values of
heads are never made. ``kv_b_proj.weight`` [heads*(nope+v), kv_lora] holds both, a head's ``W_UK`` [nope, kv_lora] above
its ``W_UV`` [v, kv_lora].

Members with an indexer (V3.2, GLM-5) attend to the ``index_topk`` tokens that it picks. Up to so many tokens these are
all of them, so there this is their attention too; ``Model`` refuses more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from weightkit.model.cache import LayerCache
from weightkit.model.norm import LATENT_EPS, rms_norm
from weightkit.model.rope import Rotation
from weightkit.model.weights import Observer, Weights, project

if TYPE_CHECKING:
    from weightkit.family import Architecture

SCORES_SIZE_BYTES = 256 << 20
"""Most memory for one block of F32 scores: queries go in blocks, so that a long prompt needs no seq x seq matrix."""


class Attention:
    """The attention of one layer. ``prefix`` is such as ``model.layers.3.self_attn``."""

    def __init__(
        self, arch: Architecture, prefix: str, weights: Weights, softmax_scale: float, observe: Observer | None = None
    ) -> None:
        self.arch = arch
        self.prefix = prefix
        self.weights = weights
        self.softmax_scale = softmax_scale
        self.observe = observe

    def __call__(self, x: torch.Tensor, rotation: Rotation, cache: LayerCache | None = None) -> torch.Tensor:
        """Causal attention of ``x`` [batch, seq, hidden] over the cached tokens and itself: [batch, seq, hidden]."""
        q_nope, q_rope = self.queries(x, rotation)
        latents = self.latents(x, rotation)
        if cache is not None:
            latents = cache.append(latents)
        heads = self._attend(q_nope, q_rope, latents)
        return self._project("o_proj", heads.flatten(2))

    @property
    def names(self) -> list[str]:
        """The weights, in the order of their use."""
        queries = ("q_proj",) if self.arch.q_lora_rank is None else ("q_a_proj", "q_a_layernorm", "q_b_proj")
        modules = (*queries, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
        return [f"{self.prefix}.{module}.weight" for module in modules]

    def queries(self, x: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """The heads' queries: [batch, seq, heads, nope], and [batch, seq, heads, rope] rotated."""
        arch = self.arch
        if arch.q_lora_rank is None:
            q = self._project("q_proj", x)
        else:
            q = self._project("q_b_proj", self._norm("q_a_layernorm", self._project("q_a_proj", x)))
        q = q.view(*q.shape[:-1], arch.num_attention_heads, arch.qk_head_dim)
        return q[..., : arch.qk_nope_head_dim], rotation.apply(q[..., arch.qk_nope_head_dim :])

    def latents(self, x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """What the cache keeps of each token: [batch, seq, kv_lora + rope]."""
        rank = self.arch.kv_lora_rank
        compressed = self._project("kv_a_proj_with_mqa", x)
        latent, k_rope = self._norm("kv_a_layernorm", compressed[..., :rank]), compressed[..., rank:]
        if self.observe is not None:  # absorbed, kv_b_proj is in no product with the latent; without, this is its input
            self.observe(f"{self.prefix}.kv_b_proj.weight", latent)
        return torch.cat((latent, rotation.apply(k_rope)), dim=-1)

    def _attend(self, q_nope: torch.Tensor, q_rope: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The heads' outputs [batch, seq, heads, v]. Queries belong to the last ``seq`` of ``latents``' tokens."""
        batch, seq, heads, nope = q_nope.shape
        tokens = latents.shape[1]
        kv_b = self.weights.get(f"{self.prefix}.kv_b_proj.weight").view(heads, -1, self.arch.kv_lora_rank)
        w_uk, w_uv = kv_b[:, :nope], kv_b[:, nope:]
        block = max(1, SCORES_SIZE_BYTES // (4 * batch * heads * tokens))
        outputs = []
        for start in range(0, seq, block):
            end = min(start + block, seq)
            absorbed = torch.einsum("bshn,hnc->bshc", q_nope[:, start:end], w_uk)
            query = torch.cat((absorbed, q_rope[:, start:end]), dim=-1)
            average = self._average(query, latents[:, : tokens - seq + end])
            outputs.append(torch.einsum("bshc,hvc->bshv", average, w_uv))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _average(self, query: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Latents averaged by softmax, [batch, seq, heads, kv_lora].

        Args:
            query: [batch, seq, heads, kv_lora + rope], absorbed, of the last ``seq`` tokens.
            latents: [batch, tokens, kv_lora + rope].
        """
        batch, seq, heads, _ = query.shape
        tokens = latents.shape[1]
        # all heads share the latents: heads become rows of one product, and nothing is repeated a head
        scores = (query.flatten(1, 2) @ latents.transpose(1, 2)).float().view(batch, seq, heads, tokens)
        scores = scores * self.softmax_scale
        if seq > 1:
            place = torch.arange(tokens, device=query.device)
            later = place > place[tokens - seq :, None]
            scores = scores.masked_fill(later[:, None, :], float("-inf"))
        shares = scores.softmax(dim=-1).to(query.dtype).view(batch, seq * heads, tokens)
        average: torch.Tensor = shares @ latents[..., : self.arch.kv_lora_rank]
        return average.view(batch, seq, heads, -1)

    def _project(self, module: str, x: torch.Tensor) -> torch.Tensor:
        return project(self.weights, f"{self.prefix}.{module}.weight", x, self.observe)

    def _norm(self, module: str, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weights.get(f"{self.prefix}.{module}.weight"), LATENT_EPS)
