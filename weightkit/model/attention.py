"""Multi-head latent attention (MLA) in its absorbed form.

Every head's key is ``W_UK c`` and its value ``W_UV c``, with ``c`` the one latent of a token (DeepSeek-V2, arXiv:2405.04434,
section 2.1). As ``q . (W_UK c) = (W_UK^T q) . c``, the key projection is applied to the query instead, the products are taken
with the latents themselves, and ``W_UV`` comes after the softmax: keys and values of heads are never made.
``kv_b_proj.weight`` [heads*(nope+v), kv_lora] holds both, a head's ``W_UK`` [nope, kv_lora] above its ``W_UV`` [v, kv_lora].
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
"""Most memory for one block of F32 scores: queries are taken in blocks, so that a long prompt needs no seq x seq matrix."""


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

    def queries(self, x: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """The heads' queries: [batch, seq, heads, nope], and [batch, seq, heads, rope] rotated."""
        arch = self.arch
        if arch.q_lora_rank is None:
            q = self._project("q_proj", x)
        else:
            q = self._project("q_b_proj", self._norm("q_a_layernorm", self._project("q_a_proj", x)))
        q = q.unflatten(-1, (arch.num_attention_heads, -1))
        q_nope, q_rope = q.split((arch.qk_nope_head_dim, arch.qk_rope_head_dim), dim=-1)
        return q_nope, rotation.apply(q_rope)

    def latents(self, x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """What the cache keeps of each token: [batch, seq, kv_lora + rope]."""
        arch = self.arch
        latent, k_rope = self._project("kv_a_proj_with_mqa", x).split(
            (arch.kv_lora_rank, arch.qk_rope_head_dim), dim=-1
        )
        latent = self._norm("kv_a_layernorm", latent)
        if self.observe is not None:
            self.observe(f"{self.prefix}.kv_b_proj.weight", latent)
        return torch.cat((latent, rotation.apply(k_rope)), dim=-1)

    def _attend(self, q_nope: torch.Tensor, q_rope: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Heads' outputs [batch, seq, heads, v] of the last ``seq`` of the tokens in ``latents`` [batch, tokens, kv_lora+rope]."""
        arch = self.arch
        kv_b = self.weights.get(f"{self.prefix}.kv_b_proj.weight").unflatten(0, (arch.num_attention_heads, -1))
        w_uk, w_uv = kv_b.split((arch.qk_nope_head_dim, arch.v_head_dim), dim=1)
        batch, seq, heads, _ = q_nope.shape
        past = latents.shape[1] - seq
        block = max(1, SCORES_SIZE_BYTES // (4 * batch * heads * latents.shape[1]))
        outputs = []
        for start in range(0, seq, block):
            end = min(start + block, seq)
            absorbed = torch.einsum("bshn,hnc->bshc", q_nope[:, start:end], w_uk)
            query = torch.cat((absorbed, q_rope[:, start:end]), dim=-1)
            mixed = self._softmax_average(query, latents[:, : past + end])
            outputs.append(torch.einsum("bshc,hvc->bshv", mixed, w_uv))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _softmax_average(self, query: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The latents averaged by softmax: [batch, seq, heads, kv_lora] for ``query`` [batch, seq, heads, kv_lora+rope], the
        last ``seq`` of the tokens in ``latents`` [batch, tokens, kv_lora+rope]."""
        _, seq, heads, _ = query.shape
        tokens = latents.shape[1]
        # all heads share the latents: heads become rows of one product, and nothing is repeated a head
        scores = (query.flatten(1, 2) @ latents.transpose(1, 2)).float() * self.softmax_scale
        if seq > 1:
            place = torch.arange(tokens, device=query.device)
            later = place > place[tokens - seq :, None]
            scores = scores.unflatten(1, (seq, heads)).masked_fill(later[:, None, :], float("-inf")).flatten(1, 2)
        shares = scores.softmax(dim=-1).to(query.dtype)
        return (shares @ latents[..., : self.arch.kv_lora_rank]).unflatten(1, (seq, heads))

    def _project(self, module: str, x: torch.Tensor) -> torch.Tensor:
        return project(self.weights, f"{self.prefix}.{module}.weight", x, self.observe)

    def _norm(self, module: str, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weights.get(f"{self.prefix}.{module}.weight"), LATENT_EPS)
