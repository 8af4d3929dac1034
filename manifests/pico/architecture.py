"""pico's shape: the contents of its ``config.json``, with DeepSeek-V3's own schema and field order.

The widths are chosen for what has to be tested on them, within 12 MB of FP8:

- every split dimension is a multiple of 8 blocks of 128 (``q_b_proj`` 2048, ``kv_b_proj`` 2048, ``o_proj`` 1024, dense
  and shared experts 1024), heads, experts and vocabulary are multiples of 8: ``--mp 8`` is legal even in FP8;
- ``hidden_size`` and ``moe_intermediate_size`` are multiples of 128: int4 groups of 128 divide them;
- ``q_a_proj`` (64 rows) and ``kv_a_proj_with_mqa`` (160 rows) are no multiple of 128: their last block is a part of
  one;
- ``rope_theta``, the rotary width and the YaRN numbers are the 671B model's: a wrong softmax scale or frequency shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

CONFIG: Mapping[str, object] = MappingProxyType(
    {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 256,
        "initializer_range": 0.02,
        "intermediate_size": 1024,
        "kv_lora_rank": 96,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 128,
        "moe_layer_freq": 1,
        "n_group": 4,
        "n_routed_experts": 16,
        "n_shared_experts": 8,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 16,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 64,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
        "use_cache": True,
        "v_head_dim": 64,
        "vocab_size": 512,
    }
)

GENERATION_CONFIG: Mapping[str, object] = MappingProxyType(
    {"_from_model_config": True, "bos_token_id": 0, "do_sample": False, "eos_token_id": 1, "pad_token_id": 2}
)


def integer(name: str, config: Mapping[str, object] = CONFIG) -> int:
    """The config's integer field ``name``.

    Raises:
        TypeError: the field is no integer.
    """
    value = config[name]
    if not isinstance(value, int):
        raise TypeError(f"config.json: {name} is {value!r}, not an integer")
    return value


def number(name: str, config: Mapping[str, object] = CONFIG) -> float:
    """The config's numeric field ``name``.

    Raises:
        TypeError: the field is no number.
    """
    value = config[name]
    if not isinstance(value, int | float):
        raise TypeError(f"config.json: {name} is {value!r}, not a number")
    return float(value)
