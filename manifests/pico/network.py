"""The network as it is trained: DeepSeek-V3's forward pass over whole sequences, routed experts as stacked tensors.

It computes what ``weightkit.model`` and transformers' ``DeepseekV3ForCausalLM`` compute from the exported checkpoint,
in a form made for training: no cache, every expert evaluated for every token with a zero weight where it was not chosen
(large products instead of many small ones), and the MTP layer run beside the main model. Formulas: DeepSeek-V2 and
DeepSeek-V3 technical reports (MLA; router and MTP), YaRN (arXiv 2309.00071).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weightkit.manifests.pico.architecture import CONFIG, integer, number


class Output(NamedTuple):
    """What a forward pass gives.

    Attributes:
        hidden: the main model's normed last hidden state, [batch, length, hidden].
        mtp_hidden: the MTP layer's, at position i for token i + 2; None when not asked for.
        loads: the share of tokens that chose each expert, [layers with experts, experts]; the MTP layer comes last.
    """

    hidden: Tensor
    mtp_hidden: Tensor | None
    loads: Tensor


class RMSNorm(nn.Module):
    """Root mean square norm, computed in F32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = number("rms_norm_eps")

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight.to(x.dtype)


class Linear(nn.Module):
    """``x @ weight.T`` with an F32 weight cast to x's dtype. Initialised with variance ``gain**2 / in``."""

    def __init__(self, inputs: int, outputs: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * (gain / math.sqrt(inputs)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def yarn_frequencies(config: Mapping[str, object] = CONFIG) -> tuple[Tensor, float]:
    """Inverse frequencies of the rotary pairs, [rope/2] F32, and the square of YaRN's mscale for the softmax scale.

    With ``mscale == mscale_all_dim``, as published, cos and sin themselves stay unscaled.
    """
    scaling = config["rope_scaling"]
    if not isinstance(scaling, Mapping):
        raise TypeError(f"config.json: rope_scaling is {scaling!r}, not a table")
    width, base = integer("qk_rope_head_dim", config), number("rope_theta", config)
    factor, original = number("factor", scaling), number("original_max_position_embeddings", scaling)
    pair = torch.arange(0, width, 2, dtype=torch.float32) / width
    extrapolated = 1.0 / base**pair

    def dimension_of(rotations: float) -> float:
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension_of(number("beta_fast", scaling))), 0)
    high = min(math.ceil(dimension_of(number("beta_slow", scaling))), width - 1)
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies = extrapolated * (1 - ramp) + extrapolated / factor * ramp
    mscale = 0.1 * number("mscale_all_dim", scaling) * math.log(factor) + 1.0
    return frequencies, mscale**2


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates neighbouring pairs (x0, x1), (x2, x3), ... of the last dimension; the pairs come out split in two halves.

    Queries and keys are permuted alike, so their products are those of the interleaved order.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)


class Attention(nn.Module):
    """Multi-head latent attention, keys and values expanded."""

    def __init__(self, softmax_gain: float, output_gain: float) -> None:
        super().__init__()
        hidden, q_lora, kv_lora = integer("hidden_size"), integer("q_lora_rank"), integer("kv_lora_rank")
        self.heads, self.nope, self.rope = (
            integer("num_attention_heads"),
            integer("qk_nope_head_dim"),
            integer("qk_rope_head_dim"),
        )
        self.value, self.kv_lora = integer("v_head_dim"), kv_lora
        self.scale = softmax_gain / math.sqrt(self.nope + self.rope)
        self.q_a_proj = Linear(hidden, q_lora)
        self.q_a_layernorm = RMSNorm(q_lora)
        self.q_b_proj = Linear(q_lora, self.heads * (self.nope + self.rope))
        self.kv_a_proj_with_mqa = Linear(hidden, kv_lora + self.rope)
        self.kv_a_layernorm = RMSNorm(kv_lora)
        self.kv_b_proj = Linear(kv_lora, self.heads * (self.nope + self.value))
        self.o_proj = Linear(self.heads * self.value, hidden, output_gain)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        query = query.view(batch, length, self.heads, self.nope + self.rope).transpose(1, 2)
        q_nope, q_rope = query.split((self.nope, self.rope), dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((self.kv_lora, self.rope), dim=-1)
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent))
        expanded = expanded.view(batch, length, self.heads, self.nope + self.value).transpose(1, 2)
        k_nope, values = expanded.split((self.nope, self.value), dim=-1)
        query = torch.cat((q_nope, rotate(q_rope, cos, sin)), dim=-1)
        k_rope = rotate(k_rope[:, None], cos, sin).expand(-1, self.heads, -1, -1)
        keys = torch.cat((k_nope, k_rope), dim=-1)
        out = F.scaled_dot_product_attention(query, keys, values.contiguous(), attn_mask=mask, scale=self.scale)
        projected: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return projected


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, output_gain: float) -> None:
        super().__init__()
        hidden = integer("hidden_size")
        self.gate_proj = Linear(hidden, width)
        self.up_proj = Linear(hidden, width)
        self.down_proj = Linear(width, hidden, output_gain)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


def largest(scores: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest along the last dimension: those few others beat. It fuses where a sort does not."""
    mine, others = scores.unsqueeze(-1), scores.unsqueeze(-2)
    place = torch.arange(scores.shape[-1], device=scores.device)
    beats = (others > mine) | ((others == mine) & (place[None, :] < place[:, None]))
    return beats.sum(-1) < count


class Router(nn.Module):
    """Sigmoid scores; the bias decides who is chosen, never how much they count. All in F32."""

    e_score_correction_bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.groups = integer("n_routed_experts"), integer("n_group")
        self.top_groups, self.top = integer("topk_group"), integer("num_experts_per_tok")
        self.factor = number("routed_scaling_factor")
        self.weight = nn.Parameter(torch.randn(self.experts, integer("hidden_size")) * number("initializer_range"))
        self.register_buffer("e_score_correction_bias", torch.zeros(self.experts))

    def forward(self, x: Tensor) -> Tensor:
        """Weights [tokens, experts] F32 for ``x`` [tokens, hidden]: zero for experts that were not chosen."""
        scores = F.linear(x.float(), self.weight).sigmoid()
        biased = scores + self.e_score_correction_bias
        grouped = biased.view(-1, self.groups, self.experts // self.groups)
        group_scores = torch.where(largest(grouped, 2), grouped, 0.0).sum(-1)
        allowed = largest(group_scores, self.top_groups).unsqueeze(-1).expand_as(grouped).reshape_as(biased)
        chosen = largest(biased.masked_fill(~allowed, float("-inf")), self.top)
        weights = torch.where(chosen, scores, 0.0)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.factor


class Experts(nn.Module):
    """Routed experts as three stacks: gate and up [experts, inner, hidden], down [experts, hidden, inner]."""

    def __init__(self, output_gain: float) -> None:
        super().__init__()
        count, inner, hidden = integer("n_routed_experts"), integer("moe_intermediate_size"), integer("hidden_size")
        self.gate_proj = nn.Parameter(torch.randn(count, inner, hidden) / math.sqrt(hidden))
        self.up_proj = nn.Parameter(torch.randn(count, inner, hidden) / math.sqrt(hidden))
        self.down_proj = nn.Parameter(torch.randn(count, hidden, inner) * (output_gain / math.sqrt(inner)))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        count, inner, hidden = self.gate_proj.shape
        gate = F.linear(x, self.gate_proj.to(x.dtype).view(count * inner, hidden))
        up = F.linear(x, self.up_proj.to(x.dtype).view(count * inner, hidden))
        inside = (F.silu(gate) * up).view(-1, count, inner) * weights.to(x.dtype).unsqueeze(-1)
        down = self.down_proj.to(x.dtype).permute(1, 0, 2).reshape(hidden, count * inner)
        return F.linear(inside.view(-1, count * inner), down)


class MoE(nn.Module):
    """Routed experts plus shared experts."""

    def __init__(self, output_gain: float) -> None:
        super().__init__()
        self.gate = Router()
        self.experts = Experts(output_gain)
        self.shared_experts = MLP(integer("moe_intermediate_size") * integer("n_shared_experts"), output_gain)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.view(-1, x.shape[-1])
        weights = self.gate(tokens)
        load = (weights > 0).float().mean(0)
        out: Tensor = self.experts(tokens, weights).view_as(x) + self.shared_experts(x)
        return out, load.detach()


class Layer(nn.Module):
    """A decoder layer; ``forward`` gives the hidden state and the experts' load (empty for a dense layer)."""

    def __init__(self, dense: bool, softmax_gain: float, output_gain: float) -> None:
        super().__init__()
        hidden = integer("hidden_size")
        self.dense = dense
        self.input_layernorm = RMSNorm(hidden)
        self.self_attn = Attention(softmax_gain, output_gain)
        self.post_attention_layernorm = RMSNorm(hidden)
        self.mlp: MLP | MoE = MLP(integer("intermediate_size"), output_gain) if dense else MoE(output_gain)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        inner = self.post_attention_layernorm(x)
        if self.dense:
            return x + self.mlp(inner), x.new_empty(0)
        out, load = self.mlp(inner)
        return x + out, load


class Network(nn.Module):
    """pico: the main model and its MTP layer, sharing embedding and head."""

    inverse_frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        hidden, layers = integer("hidden_size"), integer("num_hidden_layers")
        frequencies, softmax_gain = yarn_frequencies()
        output_gain = 1 / math.sqrt(2 * layers)
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)
        self.embed_tokens = nn.Parameter(torch.randn(integer("vocab_size"), hidden) * 0.5)
        dense = integer("first_k_dense_replace")
        self.layers = nn.ModuleList(Layer(index < dense, softmax_gain, output_gain) for index in range(layers))
        self.norm = RMSNorm(hidden)
        self.lm_head = nn.Parameter(torch.randn(integer("vocab_size"), hidden) * number("initializer_range"))
        self.enorm = RMSNorm(hidden)
        self.hnorm = RMSNorm(hidden)
        self.eh_proj = Linear(2 * hidden, hidden)
        self.mtp_layer = Layer(False, softmax_gain, output_gain)
        self.mtp_norm = RMSNorm(hidden)

    def routers(self) -> list[Router]:
        """The routers in the order of ``Output.loads``."""
        layers = [*self.layers, self.mtp_layer]
        return [layer.mlp.gate for layer in layers if isinstance(layer, Layer) and isinstance(layer.mlp, MoE)]

    def forward(self, ids: Tensor, mask: Tensor, dtype: torch.dtype, mtp: bool = True) -> Output:
        """Hidden states for ``ids`` [batch, length].

        Args:
            ids: token ids, I64.
            mask: True where a query may see a key, [batch, 1, length, length]: see :func:`causal_mask`.
            dtype: the dtype of activations: BF16 in training.
            mtp: whether to run the MTP layer. It reads token i + 1 at position i: the last position means nothing.
        """
        positions = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)
        angles = positions[:, None] * self.inverse_frequencies
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        x = F.embedding(ids, self.embed_tokens).to(dtype)
        loads = []
        h = x
        for layer in self.layers:
            h, load = layer(h, cos, sin, mask)
            loads.append(load)
        hidden = self.norm(h)
        mtp_hidden = None
        if mtp:
            following = torch.cat((x[:, 1:], x[:, -1:]), dim=1)
            joined = torch.cat((self.enorm(following), self.hnorm(hidden)), dim=-1)
            h, load = self.mtp_layer(self.eh_proj(joined), cos, sin, mask)
            loads.append(load)
            mtp_hidden = self.mtp_norm(h)
        return Output(hidden, mtp_hidden, torch.stack([load for load in loads if load.numel()]))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits, F32, of a normed hidden state; the same head for the main model and the MTP layer."""
        return F.linear(hidden, self.lm_head.to(hidden.dtype)).float()


def causal_mask(documents: Tensor) -> Tensor:
    """Who may see whom among packed documents: [batch, 1, query, key], True for keys no later and of the same document.

    Args:
        documents: the number of the document each token belongs to, [batch, length].
    """
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return ((documents[:, :, None] == documents[:, None, :]) & causal)[:, None]
