"""Layers as engines fuse them: gate and up are ``gate_up_proj``, the first projections of attention one more, and all
routed experts of a layer ``mlp.experts``."""

from __future__ import annotations

from collections.abc import Iterator

from weightkit.family import Architecture, quantizable_modules

_MLP = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
_ATTENTION = ("q_a_proj", "kv_a_proj_with_mqa")
_FUSED_ATTENTION = {"vllm": "fused_qkv_a_proj", "sglang": "fused_qkv_a_proj_with_mqa"}


def fused_layers(arch: Architecture, *, engine: str, mtp: bool) -> Iterator[tuple[str, list[str]]]:
    """The name of each layer that a quantization may quantize, as the engine asks about it, and the modules of which it
    is made.

    Args:
        engine: ``vllm`` or ``sglang``.
        mtp: whether the engine loads the MTP layers too.
    """
    for layer in range(arch.total_layers if mtp else arch.num_hidden_layers):
        parts: dict[str, list[str]] = {}
        for module in quantizable_modules(arch, layer):
            parts.setdefault(_fused_name(module, arch, engine), []).append(module)
        yield from parts.items()


def _fused_name(module: str, arch: Architecture, engine: str) -> str:
    """``...mlp.up_proj`` is part of ``...mlp.gate_up_proj`` (``models/deepseek_v2.py`` of both)."""
    before, experts, _ = module.partition(".mlp.experts.")
    if experts:
        return f"{before}.mlp.experts"
    path, _, leaf = module.rpartition(".")
    in_one = arch.q_lora_rank is not None and leaf in _ATTENTION
    fused = _FUSED_ATTENTION[engine] if in_one else _MLP.get(leaf, leaf)
    return f"{path}.{fused}"
