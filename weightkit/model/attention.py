"""Multi-head latent attention (MLA), expanded for whole sequences and absorbed for what follows cached tokens.

Every head's key is ``W_UK c`` and its value ``W_UV c``, with ``c`` the one latent of a token (DeepSeek-V2,
arXiv:2405.04434, section 2.1); behind the key comes the rotated rope key that all heads share. ``kv_b_proj.weight``
[heads*(nope+v), kv_lora] holds both, a head's ``W_UK`` [nope, kv_lora] above its ``W_UV`` [v, kv_lora].

- **Expanded**, where there are no cached tokens: keys and values of heads are made, and a flash kernel takes them. A
  product of a query and a key has nope+rope terms, of shares and values v: 320 for V3 in place of the 1088 below.
- **Absorbed**, for tokens that follow cached ones: as ``q . (W_UK c) = (W_UK^T q) . c``, the key projection is applied
  to the query, the products are taken with the latents themselves, and ``W_UV`` comes after the softmax. Keys and
  values of the cached tokens are never made.

Members with an indexer (V3.2, GLM-5) attend to the ``index_topk`` tokens that it picks. Up to so many tokens these are
all of them, so there this is their attention too; ``Model`` refuses more.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear, pad, scaled_dot_product_attention

from weightkit.model.cache import LayerCache
from weightkit.model.norm import LATENT_EPS, rms_norm
from weightkit.model.parallel import ALONE, Parallel
from weightkit.model.rope import Rotation
from weightkit.model.weights import Held, Observer, Weights, project

if TYPE_CHECKING:
    from weightkit.family import Architecture

PREFILL_SIZE_BYTES = 2 << 30
"""Most memory for queries, keys, values and outputs of the heads at once, where they are expanded. One sequence of 4096
tokens takes 1.2 GB of it in BF16 at 128 heads. Short sequences go in slices of so much. A sequence that takes more by
itself goes in groups of heads; its queries and outputs, nearly half of that, are whole nevertheless."""

LONE_TOKENS = 2048
"""A sequence of so many tokens is a slice by itself: its products are large enough to be fast, and as their shapes are
the same in every batch, its bits do not depend on the sequences beside it. Those of short ones may, where a library
sums in another order for another number of rows. Slices follow from shapes, never from free memory, so that a rerun
repeats its bits."""

SCORES_SIZE_BYTES = 256 << 20
"""Most memory for one block of F32 scores in the absorbed form: queries go in blocks, so that a long chunk needs no
seq x tokens matrix."""

_CUDNN_ANY_LENGTH = 91_500
"""cuDNN after this version is right for every length; torch prefers it on Hopper from there on, too."""


class Attention:
    """The attention of one layer. ``prefix`` is such as ``model.layers.3.self_attn``.

    Among several ranks each has a part of the heads, which is what "heads" means below; what it returns is whole.
    """

    def __init__(
        self,
        arch: Architecture,
        prefix: str,
        weights: Weights,
        softmax_scale: float,
        observe: Observer | None = None,
        parallel: Parallel = ALONE,
    ) -> None:
        self.arch = arch
        self.prefix = prefix
        self.weights = weights
        self.softmax_scale = softmax_scale
        self.observe = observe
        self.parallel = parallel
        self.heads = len(parallel.share_of(arch.num_attention_heads))

    def __call__(self, x: torch.Tensor, rotation: Rotation, cache: LayerCache | None = None) -> torch.Tensor:
        """Causal attention of ``x`` [batch, seq, hidden] over the cached tokens and itself: [batch, seq, hidden].

        Without cached tokens ``x`` goes in ``slices``, and ``observe`` is called once for each.
        """
        if cache is not None and cache.length > 0:
            query = self.queries(x, rotation)
            latents = cache.append(self.latents(x, rotation))
            return self._outputs(self._absorbed(query, latents))
        parts = list(self.slices(x))
        module = self if len(parts) == 1 else self.holding()
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        kept = []
        for part in parts:
            out[part], latents = module._sequences(x[part], rotation)
            if cache is not None:
                kept.append(latents)
        if cache is not None:
            cache.append(torch.cat(kept))
        return out

    @property
    def names(self) -> list[str]:
        """The weights, in the order of their use."""
        queries = ("q_proj",) if self.arch.q_lora_rank is None else ("q_a_proj", "q_a_layernorm", "q_b_proj")
        modules = (*queries, "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
        return [f"{self.prefix}.{module}.weight" for module in modules]

    def holding(self) -> Attention:
        """The same attention, asking for each weight once and holding it as long as the returned object lives."""
        held = copy.copy(self)
        held.weights = Held(self.weights, self.names)
        return held

    def slices(self, x: torch.Tensor) -> Iterator[slice]:
        """The slices of the batch of ``x`` [batch, seq, hidden] in which whole sequences go through."""
        a_sequence = max(1, x.shape[1] * self.heads * self._head_bytes(x))
        step = 1 if x.shape[1] >= LONE_TOKENS else max(1, PREFILL_SIZE_BYTES // a_sequence)
        return (slice(start, min(start + step, x.shape[0])) for start in range(0, x.shape[0], step))

    def queries(self, x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """The heads' queries, [batch, seq, heads, nope + rope]; the last ``rope`` are rotated."""
        arch = self.arch
        if arch.q_lora_rank is None:
            q = self._project("q_proj", x)
        else:
            q = self._project("q_b_proj", self._norm("q_a_layernorm", self._project("q_a_proj", x)))
        q = q.view(*q.shape[:-1], self.heads, arch.qk_head_dim)
        turning = q[..., arch.qk_nope_head_dim :]
        rotation.apply(turning, out=turning)
        return q

    def latents(self, x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        """What the cache keeps of each token: [batch, seq, kv_lora + rope]."""
        rank = self.arch.kv_lora_rank
        compressed = self._project("kv_a_proj_with_mqa", x)
        latent, k_rope = self._norm("kv_a_layernorm", compressed[..., :rank]), compressed[..., rank:]
        if self.observe is not None:  # absorbed, kv_b_proj is in no product with the latent; expanded, in several
            self.observe(f"{self.prefix}.kv_b_proj.weight", latent)
        return torch.cat((latent, rotation.apply(k_rope)), dim=-1)

    def expanded(self, query: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The heads' outputs [batch, seq, heads, v] of whole sequences: both of the same tokens, from the first on.

        Args:
            query: [batch, seq, heads, nope + rope], as by ``queries``.
            latents: [batch, seq, kv_lora + rope], as by ``latents``.
        """
        batch, seq, heads, _ = query.shape
        rank, nope = self.arch.kv_lora_rank, self.arch.qk_nope_head_dim
        kv_b = self._kv_b()
        latent, k_rope = latents[..., :rank], latents[..., None, rank:]
        step = min(heads, max(1, PREFILL_SIZE_BYTES // max(1, batch * seq * self._head_bytes(query))))
        outputs = []
        for start in range(0, heads, step):
            group = slice(start, min(start + step, heads))
            kv = linear(latent, kv_b[group].flatten(0, 1)).view(batch, seq, -1, kv_b.shape[1])
            key = torch.cat((kv[..., :nope], k_rope.expand(-1, -1, kv.shape[2], -1)), dim=-1)
            outputs.append(causal_attention(query[:, :, group], key, kv[..., nope:], self.softmax_scale))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _sequences(self, x: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of one slice of sequences, and its latents; all else that it makes is freed when it returns."""
        query, latents = self.queries(x, rotation), self.latents(x, rotation)
        return self._outputs(self.expanded(query, latents)), latents

    def _outputs(self, heads: torch.Tensor) -> torch.Tensor:
        """What the layer makes of the ``heads`` [batch, seq, heads, v] of all ranks: [batch, seq, hidden]."""
        return self.parallel.sum(self._project("o_proj", heads.flatten(2)))

    def _head_bytes(self, x: torch.Tensor) -> int:
        """What the expanded form holds of one token and head, in ``x``'s dtype."""
        arch = self.arch
        query, widest = arch.qk_head_dim, max(arch.qk_head_dim, arch.v_head_dim)
        kv = arch.qk_nope_head_dim + arch.v_head_dim
        # query, kv_b_proj's output, key; value and output padded; the output that o_proj takes
        return x.element_size() * (2 * query + kv + 2 * widest + arch.v_head_dim)

    def _absorbed(self, query: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The heads' outputs [batch, seq, heads, v]. Queries belong to the last ``seq`` of ``latents``' tokens."""
        batch, seq, heads, _ = query.shape
        tokens, nope = latents.shape[1], self.arch.qk_nope_head_dim
        kv_b = self._kv_b()
        w_uk, w_uv = kv_b[:, :nope], kv_b[:, nope:]
        block = max(1, SCORES_SIZE_BYTES // (4 * batch * heads * tokens))
        outputs = []
        for start in range(0, seq, block):
            end = min(start + block, seq)
            inner = torch.einsum("bshn,hnc->bshc", query[:, start:end, :, :nope], w_uk)
            inner = torch.cat((inner, query[:, start:end, :, nope:]), dim=-1)
            average = self._average(inner, latents[:, : tokens - seq + end])
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
        scores.mul_(self.softmax_scale)
        if seq > 1:
            place = torch.arange(tokens, device=query.device)
            later = place > place[tokens - seq :, None]
            scores.masked_fill_(later[:, None, :], float("-inf"))
        shares = scores.softmax(dim=-1).to(query.dtype).view(batch, seq * heads, tokens)
        average: torch.Tensor = shares @ latents[..., : self.arch.kv_lora_rank]
        return average.view(batch, seq, heads, -1)

    def _kv_b(self) -> torch.Tensor:
        """``kv_b_proj.weight`` by head: [heads, nope + v, kv_lora]."""
        weight = self.weights.get(f"{self.prefix}.kv_b_proj.weight")
        return weight.view(self.heads, -1, self.arch.kv_lora_rank)

    def _project(self, module: str, x: torch.Tensor) -> torch.Tensor:
        return project(self.weights, f"{self.prefix}.{module}.weight", x, self.observe)

    def _norm(self, module: str, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weights.get(f"{self.prefix}.{module}.weight"), LATENT_EPS)


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of each token to itself and those before it, by torch's fused kernels: [batch, seq, heads, v].

    The flash kernels (CPU, CUDA) want heads of one width, so the narrower side is padded with zeros for them, which add
    nothing to a product. cuDNN's on Hopper takes 192 and 128 as they are.

    Args:
        query, key: [batch, seq, heads, width].
        value: [batch, seq, heads, v].
        scale: factor on the products of queries and keys.
    """
    width, query, key, value = value.shape[-1], query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    missing = query.shape[-1] - width
    if missing > 0 and not _takes_unequal_widths(query, key, value):
        value = pad(value, (0, missing))
    elif missing < 0:
        query, key = pad(query, (0, -missing)), pad(key, (0, -missing))
    out: torch.Tensor = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    return out[..., :width].transpose(1, 2)


def _takes_unequal_widths(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether torch's fastest kernel for these [batch, heads, seq, width] takes a narrower value as it is."""
    if not query.is_cuda:
        return False
    if query.dtype == torch.float32:
        return True  # no flash kernel there; the memory-efficient one takes any widths
    if (torch.backends.cudnn.version() or 0) <= _CUDNN_ANY_LENGTH:
        return False
    params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, False)
    return torch.backends.cuda.can_use_cudnn_attention(params)
