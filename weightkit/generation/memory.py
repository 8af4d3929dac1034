"""What generation needs beside the weights, and what a budget of memory leaves for them."""

from __future__ import annotations

from dataclasses import dataclass

from weightkit.checkpoint.direct import PIECE_BYTES
from weightkit.errors import SpaceError
from weightkit.family import Architecture
from weightkit.machine import available_memory_bytes
from weightkit.model import CheckpointWeights
from weightkit.model.attention import PREFILL_SIZE_BYTES, SCORES_SIZE_BYTES
from weightkit.model.checkpoint_weights import WeightSizes
from weightkit.model.memory import FREE_SHARE, free_memory_bytes
from weightkit.model.mlp import GROUP_ROWS
from weightkit.model.model import FEED_TOKENS
from weightkit.units import human_bytes

GPU_SHARE = 0.9
"""The share of a GPU's free memory that is used where no budget is named: all that is known to be needed is counted."""

WORKSPACE_BYTES = {"cuda": 256 << 20, "cpu": 32 << 20}
"""What matrix libraries take."""


@dataclass(frozen=True)
class Budget:
    """How memory is divided, in bytes.

    Attributes:
        device: all that may be used on the device that computes; beside it a GPU's context takes some 0.5 GB.
        working: of it, what tokens take: states, caches, scratch, one dequantized weight.
        device_weights: what is left there for weights.
        host_weights: for weights in host memory beside a GPU.
    """

    device: int
    working: int
    device_weights: int
    host_weights: int


def divide(
    weights: CheckpointWeights,
    *,
    tokens: int,
    sequences: int,
    most_tokens: int,
    gpu_memory: int | None,
    host_memory: int | None,
) -> Budget:
    """Divide the budgets for passes of so many tokens.

    Args:
        weights: says its sizes, dtype and device; nothing is read.
        tokens: of all prompts and answers that go through together.
        sequences: their number.
        most_tokens: of a sequence through attention at once.
        gpu_memory, host_memory: the budgets; None for a share of what is free.

    Raises:
        SpaceError: a budget that nothing can be generated with, or not without streaming where that is refused; says
            the least that works.
    """
    on_gpu, sizes = weights.device.type == "cuda", weights.sizes
    option, given = ("--gpu-memory", gpu_memory) if on_gpu else ("--host-memory", host_memory)
    free = free_memory_bytes(weights.device)
    device = int(free * (GPU_SHARE if on_gpu else FREE_SHARE)) if given is None else given
    working = working_bytes(weights.arch, sizes, weights.dtype.itemsize, tokens, sequences, most_tokens)
    if weights.multiplies_stored:
        working += grouped_bytes(weights.arch, weights.dtype.itemsize, tokens)
    working += WORKSPACE_BYTES[weights.device.type] + (0 if on_gpu else weights.jobs * PIECE_BYTES)
    least = working + 2 * sizes.largest
    if weights.may_stream is False:
        least = working + weights.fitting_bytes
    if device < least:
        refused = weights.may_stream is False and device >= working + 2 * sizes.largest
        raise SpaceError(
            "the weights do not fit in memory, and are not to be streamed" if refused else "not enough memory",
            where=option,
            expected=f"{human_bytes(least)} at least, {human_bytes(working)} of it for {tokens:,} tokens",
            found=human_bytes(device),
            fix="Leave out --no-stream." if refused else "Use shorter or fewer prompts, or more memory.",
        )
    host = _host_weights(weights, host_memory) if on_gpu else 0
    return Budget(device, working, device - working, host)


def working_bytes(
    arch: Architecture, sizes: WeightSizes, itemsize: int, tokens: int, sequences: int, most_tokens: int
) -> int:
    """Most that tokens take on the device at once, beside the weights that are kept there."""
    hidden, heads = arch.hidden_size, arch.num_attention_heads
    latent = arch.kv_lora_rank + arch.qk_rope_head_dim
    kept = 2 * tokens * hidden * itemsize + sequences * 8 * arch.vocab_size
    kept += 2 * tokens * arch.num_hidden_layers * latent * itemsize  # caches grow by doubling
    chunk = min(tokens, most_tokens)
    widest = max(arch.qk_head_dim, arch.v_head_dim)
    a_head = itemsize * (2 * arch.qk_head_dim + arch.qk_nope_head_dim + 2 * arch.v_head_dim + 2 * widest)
    expanded = min(PREFILL_SIZE_BYTES, chunk * heads * a_head) + chunk * heads * widest * 2 * itemsize
    scores = 3 * min(SCORES_SIZE_BYTES, 4 * heads * chunk * tokens)
    held = sizes.attention if sequences > 1 or tokens > chunk else 0  # else one matrix after the other
    attention = held + max(expanded, scores) + 4 * chunk * hidden * itemsize
    inner = max(arch.intermediate_size, arch.moe_intermediate_size * max(1, arch.n_shared_experts))
    feed = min(tokens, FEED_TOKENS) * (hidden * (8 + 4 * itemsize) + 2 * inner * itemsize)
    return kept + max(attention, feed) + 2 * sizes.largest_dense


def grouped_bytes(arch: Architecture, itemsize: int, tokens: int) -> int:
    """Most that the products of experts at once take beside an MLP's: their inputs, inner states, outputs, and those
    weighted, in F32, in the order of experts and in that of tokens."""
    rows = min(tokens * arch.num_experts_per_tok, GROUP_ROWS) if arch.n_routed_experts else 0
    return rows * (arch.hidden_size * (2 * itemsize + 2 * 4) + 4 * arch.moe_intermediate_size * itemsize)


def _host_weights(weights: CheckpointWeights, host_memory: int | None) -> int:
    """What is left of host memory for weights beside a GPU, the readers' buffers taken off."""
    total = int(available_memory_bytes() * FREE_SHARE) if host_memory is None else host_memory
    buffers = weights.jobs * PIECE_BYTES
    least = buffers + 2 * (1 << (weights.sizes.largest - 1).bit_length())  # pinned in powers of two
    if total < least and weights.is_streamed:
        raise SpaceError(
            "not enough host memory to read weights into",
            where="--host-memory",
            expected=f"{human_bytes(least)} at least",
            found=human_bytes(total),
            fix="Give more, or fewer --jobs.",
        )
    return max(0, total - buffers)
