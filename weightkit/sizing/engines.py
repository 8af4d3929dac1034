"""What vLLM and SGLang are known not to load, beyond degrees (``family.tp_problems``).

Not a promise that the rest loads: rules as read, and what was seen with vLLM 0.25.1 on an H200.
"""

from __future__ import annotations

from collections.abc import Iterator

from weightkit.family import Architecture, quantizable_modules

ENGINES = ("vLLM", "SGLang")
#: Group sizes that GPTQ-Marlin has kernels for; of hidden sizes it wants multiples.
MARLIN_GROUPS = (-1, 32, 64, 128)
MARLIN_HIDDEN = 128
#: Latent and rotary width that vLLM's kernels for MLA are made for.
MLA_WIDTHS = (512, 64)


def obstacles(arch: Architecture, engine: str) -> tuple[str, ...]:
    """Why ``engine`` (of ``ENGINES``) does not load a checkpoint of this architecture; empty where nothing is known."""
    return tuple(_vllm(arch) if engine == "vLLM" else _sglang(arch))


def _vllm(arch: Architecture) -> Iterator[str]:
    if (arch.kv_lora_rank, arch.qk_rope_head_dim) != MLA_WIDTHS:
        latent, rope = MLA_WIDTHS
        yield f"its MLA kernels take a latent of {latent} + {rope}, not {arch.kv_lora_rank} + {arch.qk_rope_head_dim}"
    quantization = arch.quantization
    if quantization is None or not quantization.is_gptq:
        return
    if quantization.group_size not in MARLIN_GROUPS:
        yield f"groups of {quantization.group_size}: Marlin has {', '.join(map(str, MARLIN_GROUPS))}"
    if arch.hidden_size % MARLIN_HIDDEN:
        yield f"hidden size {arch.hidden_size}: Marlin wants multiples of {MARLIN_HIDDEN}"
    if not quantization.sym:
        yield "asymmetric zero points, which Marlin's MoE does not read"


def _sglang(arch: Architecture) -> Iterator[str]:
    quantization = arch.quantization
    if quantization is None or not quantization.is_gptq:
        return
    attention = (name for name in quantizable_modules(arch, 0) if ".self_attn." in name)
    if any(map(quantization.quantizes, attention)):
        yield "quantized attention, which its GPTQ path mislays: use quantize --scope experts"
