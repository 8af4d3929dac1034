"""How much memory a quantization takes, and where the activations lie: said before it starts, and held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from weightkit.errors import SpaceError
from weightkit.model.attention import PREFILL_SIZE_BYTES
from weightkit.model.memory import free_memory_bytes
from weightkit.quantization.activations import sequences_a_batch
from weightkit.quantization.layer import CHUNK_TOKENS, HELD_TOKENS
from weightkit.units import human_bytes

if TYPE_CHECKING:
    from weightkit.quantization.plan import QuantizationPlan

#: Of a GPU's free memory, what is not planned with: the context's own, fragments.
SPARE_BYTES = 1 << 30
#: Weights in F32 that are read ahead of the solver.
AHEAD = 6


@dataclass(frozen=True)
class MemoryPlan:
    """Where what lies, in bytes of this process.

    Attributes:
        on_device: whether the activations stay on the device between layers.
        activations: hidden states of this rank's calibration tokens.
        working: most that one layer takes on the device beside them.
        kept: what may be spent there on weights that would otherwise be dequantized again.
        host: most that this takes of host memory.
    """

    on_device: bool
    activations: int
    working: int
    kept: int
    host: int


def plan_memory(
    plan: QuantizationPlan,
    *,
    sequences: int,
    seq_len: int,
    device: torch.device,
    gpu_memory: int | None,
    host_memory: int,
    ranks: int = 1,
    all_sequences: int | None = None,
) -> MemoryPlan:
    """Decide where the activations of ``sequences`` of ``seq_len`` tokens lie.

    Args:
        sequences: this rank's.
        gpu_memory: most that may be used, in bytes; None for what is free.
        host_memory: most that may be used, in bytes.
        ranks: that work on it, and send each other the inputs of experts.
        all_sequences: of all ranks, where these are several.

    Raises:
        SpaceError: not enough of either; says the least that works.
    """
    itemsize = 2 if device.type == "cuda" else 4
    activations = sequences * seq_len * plan.arch.hidden_size * itemsize
    batch = min(sequences, sequences_a_batch(seq_len)) * seq_len
    working = _working_bytes(plan, batch, (all_sequences or sequences) * seq_len, itemsize, ranks)
    host = plan.largest_layer_bytes + AHEAD * _largest_weight_bytes(plan)
    if device.type != "cuda":
        total = activations + working + host
        if total > host_memory:
            raise _too_little("host memory", "--host-memory", total, host_memory)
        return MemoryPlan(True, activations, working, max(0, host_memory - total) // 2, total)
    room = (free_memory_bytes(device) if gpu_memory is None else gpu_memory) - SPARE_BYTES
    if working > room:
        raise _too_little("GPU memory", "--gpu-memory", working + SPARE_BYTES, room + SPARE_BYTES)
    on_device = activations + working <= room
    host += 0 if on_device else activations
    if host > host_memory:
        raise _too_little("host memory", "--host-memory", host, host_memory)
    kept = max(0, room - working - (activations if on_device else 0))
    return MemoryPlan(on_device, activations, working, kept, host)


def _too_little(what: str, option: str, needed: int, found: int) -> SpaceError:
    return SpaceError(
        f"not enough {what}",
        where=option,
        expected=f"at least {needed:,} bytes ({human_bytes(needed)})",
        found=f"{found:,} ({human_bytes(found)})",
        fix="Use fewer --samples, a smaller --seq-len, or more GPUs.",
    )


def _largest_weight_bytes(plan: QuantizationPlan) -> int:
    return max((4 * rows * columns for rows, columns in plan.shapes.values()), default=0)


def _working_bytes(plan: QuantizationPlan, batch: int, tokens: int, itemsize: int, ranks: int) -> int:
    """A layer's weights, packed and not, and the largest of: attention, a batch through the experts, one solution."""
    arch = plan.arch
    hidden, widest = arch.hidden_size, max((max(shape) for shape in plan.shapes.values()), default=0)
    inner = max(arch.moe_intermediate_size * max(1, arch.n_shared_experts), arch.intermediate_size)
    attention = PREFILL_SIZE_BYTES + 3 * batch * hidden * itemsize
    experts = batch * (hidden * (4 * itemsize + 8) + 2 * inner * itemsize)
    columns = max((shape[1] for shape in plan.shapes.values()), default=0)
    held = min(tokens, HELD_TOKENS)
    inputs = held * (hidden + 3 * arch.moe_intermediate_size)
    if ranks > 1:  # what is sent, what arrives, and that in one piece; all may want a step's inputs from one rank
        inputs = max(inputs, hidden * max(3 * held, (ranks + 2) * min(held, CHUNK_TOKENS)))
    largest = _largest_weight_bytes(plan)
    solving = inputs * itemsize + 5 * 4 * columns**2 + 16 * largest
    unquantized = 2 * arch.hidden_size * (4 * widest + arch.n_routed_experts) * itemsize
    return plan.largest_layer_bytes + unquantized + AHEAD * largest + max(attention, experts, solving)
