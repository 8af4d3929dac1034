"""Tiny random models of transformers, their weights under the published names, and the config they were made from."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 64,
    "vocab_size": 160,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,  # not the 1e-6 of the norms inside attention, so that a mix-up shows
    "rope_theta": 10000,
    "rope_scaling": None,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
V2_LITE: dict[str, Any] = {
    **V3,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "q_lora_rank": None,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}
V2: dict[str, Any] = {
    **V2_LITE,
    "q_lora_rank": 24,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0,
}
INDEXER = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 32}
V32: dict[str, Any] = {**V3, "model_type": "deepseek_v32", "architectures": ["DeepseekV32ForCausalLM"], **INDEXER}
GLM5: dict[str, Any] = {
    **V3,
    "model_type": "glm_moe_dsa",
    "architectures": ["GlmMoeDsaForCausalLM"],
    **INDEXER,
    "n_group": 1,
    "topk_group": 1,
}
YARN: dict[str, Any] = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}


def transformers_model(config: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    """A random F32 model of ``config``, its weights large enough that routing, bias and attention show in logits."""
    own = AutoConfig.for_model(**{**config, "attn_implementation": "eager"})
    model: torch.nn.Module = AutoModelForCausalLM.from_config(own).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("norm.weight"):
                tensor.copy_(1 + 0.3 * noise)
            elif name.endswith("e_score_correction_bias"):
                tensor.copy_(0.2 * noise)
            elif name.endswith((".weight", "_proj")):
                tensor.copy_(noise * tensor.shape[-1] ** -0.5 * 1.5)
    return model


def published_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors as a published checkpoint names them: transformers fuses a layer's experts, hubs do not."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".gate_up_proj").removesuffix(".down_proj")
        if not stem.endswith(".experts"):
            tensors[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            if name.endswith("down_proj"):
                tensors[f"{stem}.{expert}.down_proj.weight"] = matrix
            else:
                gate, up = matrix.chunk(2)
                tensors[f"{stem}.{expert}.gate_proj.weight"] = gate
                tensors[f"{stem}.{expert}.up_proj.weight"] = up
    return tensors
