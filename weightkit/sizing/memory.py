"""What lies in a GPU's memory beside the weights: the latent KV cache, and activations."""

from __future__ import annotations

from dataclasses import dataclass

from weightkit.errors import PlanError, WeightkitError, raise_all
from weightkit.family import Architecture

ITEM_BYTES = 2
"""Of BF16: what activations and, by default, the cache are kept in."""
LOGIT_BYTES = 4
STEP_TOKENS = 8192
"""Tokens that an engine puts through the model at once: ``max_num_batched_tokens`` of vLLM's server on GPUs of 70 GiB
and more, where the user says nothing."""
INDEX_BLOCK = 128
"""Elements of an indexer's key that share an F32 scale in its FP8 cache."""


@dataclass(frozen=True)
class Load:
    """What a model is to be served with.

    Attributes:
        context: tokens of a sequence, prompt and answer.
        batch: sequences at once.
        mtp: whether the engine loads the MTP layers (speculative decoding).
    """

    context: int = 4096
    batch: int = 1
    mtp: bool = False

    def __post_init__(self) -> None:
        problems: list[WeightkitError] = [
            PlanError("not a number of them", where=option, expected="at least 1", found=value)
            for option, value in (("--context", self.context), ("--batch", self.batch))
            if value < 1
        ]
        raise_all("nothing to plan for", problems)

    @property
    def tokens(self) -> int:
        """In the cache at once."""
        return self.context * self.batch


def kv_cache_token_bytes(arch: Architecture, *, mtp: bool = False) -> int:
    """Bytes of cache a token takes on every rank.

    Multi-head latent attention keeps one latent of ``kv_lora_rank`` and one rotary key of ``qk_rope_head_dim`` a layer,
    whatever the number of heads (DeepSeek-V2, arXiv:2405.04434, section 2.1), here in BF16. There is no head to divide
    among tensor-parallel ranks, so each of them holds all of it; data-parallel attention would divide the sequences. A
    layer with an indexer keeps its key too, ``index_head_dim`` bytes of FP8 and an F32 scale for each 128 (vLLM's
    ``DeepseekV32IndexerCache``).
    """
    layers = arch.total_layers if mtp else arch.num_hidden_layers
    latent = (arch.kv_lora_rank + arch.qk_rope_head_dim) * ITEM_BYTES
    width = arch.index_head_dim or 0
    key = width + 4 * -(-width // INDEX_BLOCK)
    indexers = sum(layer < layers for layer in arch.indexer_layers)
    return layers * latent + indexers * key


def activation_bytes(arch: Architecture, n: int, load: Load, *, whole_experts: bool) -> int:
    """Bytes of activations on one of ``n`` ranks at the peak: an estimate from the shapes, not a measurement.

    With T the tokens of a step (``STEP_TOKENS``, or fewer where the load has fewer), H the heads of a rank and all in
    BF16, the residual stream and its normalized copy live throughout, 2 T hidden, and beside them the largest of

        attention  T (q_lora + kv_lora + rope + H (2 (nope + rope) + 2 v))   queries, keys, values, output (prefill)
        dense MLP  T 3 intermediate / n                                      gate and up, their product
        experts    T topk (3 moe_intermediate / n + hidden)                  the same for each expert, and its output

    as vLLM's fused MoE allocates its caches; experts that stay whole are not divided by n, and their rank may get all
    tokens. To that the logits of each sequence's next token, in F32. Not in it: CUDA's context and graphs, NCCL's
    buffers, workspaces, fragments. Those are what the rest of the memory is left for.
    """
    tokens = min(STEP_TOKENS, load.tokens)
    heads = -(-arch.num_attention_heads // n)
    attention = (arch.q_lora_rank or 0) + arch.kv_lora_rank + arch.qk_rope_head_dim
    attention += heads * 2 * (arch.qk_head_dim + arch.v_head_dim)
    dense = 3 * -(-arch.intermediate_size // n)
    width = arch.moe_intermediate_size if whole_experts else -(-arch.moe_intermediate_size // n)
    experts = arch.num_experts_per_tok * (3 * width + arch.hidden_size)
    stream = 2 * arch.hidden_size
    logits = load.batch * arch.vocab_size * LOGIT_BYTES
    return tokens * (stream + max(attention, dense, experts)) * ITEM_BYTES + logits
