"""The JSON that DeepSeek's inference demo reads, and what the demo cannot run.

Source of the argument names: ``ModelArgs`` in ``inference/model.py`` of DeepSeek-V3's repository. The demo hands the
JSON's keys to that class, so a key it does not have is a crash: only its names are written here. DeepSeek-V3.2 has a
demo of its own, with three arguments more (``inference/config_671B_v3.2.json`` there); only checkpoints with an indexer
get those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from weightkit.family.architecture import Architecture, rope_type
from weightkit.family.blueprint import Expected, Role

DemoValue = int | float | str
DEMO_DTYPES = ("bf16", "fp8")
"""What the demo's ``dtype`` may be."""

_CACHE_LENGTH = 4096 * 4
"""The demo allocates its cache for ``max_seq_len`` tokens at once; this is its own default."""
_BIAS_WIDTH = 7168
"""The demo's router has a bias only where ``dim`` is this."""
_RMS_NORM_EPS = 1e-6


def demo_arguments(arch: Architecture, *, dtype: Literal["bf16", "fp8"]) -> dict[str, DemoValue]:
    """The demo's arguments for a checkpoint of this architecture.

    Args:
        arch: the architecture, after any change of its expert count.
        dtype: what the linear weights of the shards are: ``fp8`` with block scales, or ``bf16``.
    """
    arguments: dict[str, DemoValue] = {
        "vocab_size": arch.vocab_size,
        "dim": arch.hidden_size,
        "inter_dim": arch.intermediate_size,
        "moe_inter_dim": arch.moe_intermediate_size,
        "n_layers": arch.num_hidden_layers,
        "n_dense_layers": arch.first_k_dense_replace,
        "n_heads": arch.num_attention_heads,
        "n_routed_experts": arch.n_routed_experts,
        "n_shared_experts": arch.n_shared_experts,
        "n_activated_experts": arch.num_experts_per_tok,
        **_groups(arch),
        "route_scale": arch.routed_scaling_factor,
        "score_func": arch.scoring_func,
        "q_lora_rank": arch.q_lora_rank or 0,
        "kv_lora_rank": arch.kv_lora_rank,
        "qk_nope_head_dim": arch.qk_nope_head_dim,
        "qk_rope_head_dim": arch.qk_rope_head_dim,
        "v_head_dim": arch.v_head_dim,
        "dtype": dtype,
        **_rope(arch),
        **_indexer(arch),
    }
    if dtype == "fp8" and arch.quantization is not None and arch.quantization.scale_fmt is not None:
        arguments["scale_fmt"] = arch.quantization.scale_fmt
    return arguments


def in_demo(record: Expected) -> bool:
    """Whether the demo's files hold this tensor: all but MTP layers and the stored ``inv_freq``.

    Its loader is strict: a tensor that its model does not declare makes it fail.
    """
    return not record.mtp and record.role is not Role.ROTARY


def demo_limits(arch: Architecture) -> list[str]:
    """Why DeepSeek-V3's demo would fail on shards of this architecture or compute something else; empty if it is right.

    The shards themselves are right whatever this says: they merge back, and weightkit reads them.
    """
    return [what for broken, what in _limits(arch) if broken]


def _limits(arch: Architecture) -> list[tuple[bool, str]]:
    normed = arch.scoring_func == "sigmoid"
    return [
        (
            arch.has_router_bias and arch.hidden_size != _BIAS_WIDTH,
            f"its router has a bias only where dim is {_BIAS_WIDTH}; here dim is {arch.hidden_size}",
        ),
        (
            not arch.has_router_bias and arch.hidden_size == _BIAS_WIDTH,
            f"its router expects a bias where dim is {_BIAS_WIDTH}, and this checkpoint has none",
        ),
        (
            arch.norm_topk_prob != normed,
            f"it normalizes the top-k weights exactly where score_func is sigmoid; here norm_topk_prob is "
            f"{str(arch.norm_topk_prob).lower()} with {arch.scoring_func}",
        ),
        (
            arch.rms_norm_eps != _RMS_NORM_EPS,
            f"its RMSNorm has epsilon {_RMS_NORM_EPS}; here it is {arch.rms_norm_eps}",
        ),
        (arch.is_gptq, "it reads no GPTQ: cast to bf16, or use an engine that does"),
        (bool(arch.indexer_layers), "it has no indexer: the demo of DeepSeek-V3.2 does"),
        (arch.moe_layer_freq != 1, f"it knows no moe_layer_freq; here it is {arch.moe_layer_freq}"),
        (arch.n_shared_experts == 0, "it always has shared experts, and this checkpoint has none"),
        (arch.tie_word_embeddings, "it has a head of its own, and here the embedding is the head"),
        (_unequal_mscale(arch), "it knows one mscale; here mscale and mscale_all_dim differ"),
        (_unknown_scaling(arch), "it knows YaRN alone for scaling RoPE"),
    ]


def _groups(arch: Architecture) -> dict[str, DemoValue]:
    """Groups count only where the selection is by groups: ``greedy`` (V2-Lite) looks at all experts."""
    if arch.topk_method == "greedy":
        return {"n_expert_groups": 1, "n_limited_groups": 1}
    return {"n_expert_groups": arch.n_group, "n_limited_groups": arch.topk_group}


def _indexer(arch: Architecture) -> dict[str, DemoValue]:
    """What V3.2's demo asks for beside V3's arguments."""
    sizes = {
        "index_n_heads": arch.index_n_heads,
        "index_head_dim": arch.index_head_dim,
        "index_topk": arch.index_topk,
    }
    return {name: size for name, size in sizes.items() if size is not None}


def _rope(arch: Architecture) -> dict[str, DemoValue]:
    """RoPE and YaRN. The demo applies YaRN where ``max_seq_len`` exceeds ``original_seq_len``, at every position."""
    longest = min(arch.max_position_embeddings, _CACHE_LENGTH)
    scaling = arch.rope_scaling
    if scaling is None:
        return {"rope_theta": arch.rope_theta, "max_seq_len": longest, "original_seq_len": longest}
    original = _integer(scaling, "original_max_position_embeddings", 4096)
    return {
        "max_seq_len": max(longest, original + 1),
        "original_seq_len": original,
        "rope_theta": arch.rope_theta,
        "rope_factor": _number(scaling, "factor", 1.0),
        "beta_fast": _integer(scaling, "beta_fast", 32),
        "beta_slow": _integer(scaling, "beta_slow", 1),
        # The demo scales the softmax by it, which the published model does with mscale_all_dim.
        "mscale": _number(scaling, "mscale_all_dim", 0.0),
    }


def _unequal_mscale(arch: Architecture) -> bool:
    scaling = arch.rope_scaling
    return scaling is not None and _number(scaling, "mscale", 1.0) != _number(scaling, "mscale_all_dim", 0.0)


def _unknown_scaling(arch: Architecture) -> bool:
    scaling = arch.rope_scaling
    return scaling is not None and rope_type(scaling) != "yarn"


def _number(scaling: Mapping[str, object], key: str, default: float) -> float:
    value = scaling.get(key, default)
    return float(value) if isinstance(value, (int, float)) else default


def _integer(scaling: Mapping[str, object], key: str, default: int) -> int:
    value = scaling.get(key, default)
    return int(value) if isinstance(value, (int, float)) else default
