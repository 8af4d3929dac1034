"""A small checkpoint with weights of a sane size: what it generates is finite and compares with transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers_oracle import V3, published_tensors, transformers_model

BOS, EOS = "<begin>", "<end>"
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
CONFIG: dict[str, Any] = {**V3, "vocab_size": 264, "torch_dtype": "bfloat16", "eos_token_id": 257, "hidden_size": 160}
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """F8_E4M3 codes and F32 scales of 128 x 128 blocks."""
    codes, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), []
    for row in range(0, weight.shape[0], 128):
        scales.append([])
        for column in range(0, weight.shape[1], 128):
            block = weight[row : row + 128, column : column + 128]
            scale = block.abs().max() / 448
            codes[row : row + 128, column : column + 128] = (block / scale).to(torch.float8_e4m3fn)
            scales[-1].append(scale)
    return codes, torch.tensor(scales)


def dequantize(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What the two stand for, in BF16."""
    rows = torch.arange(codes.shape[0])[:, None] // 128
    columns = torch.arange(codes.shape[1]) // 128
    return (codes.float() * scale[rows, columns]).bfloat16()


def stored_tensors(config: dict[str, Any], *, fp8: bool) -> dict[str, torch.Tensor]:
    """The tensors as hubs publish them: projections in FP8 with scales, the bias in F32, the rest in BF16."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in published_tensors(transformers_model(config)).items():
        if fp8 and "_proj" in name:
            stored[name], stored[f"{name}_scale_inv"] = quantize(tensor)
        else:
            stored[name] = tensor if name.endswith("_bias") else tensor.bfloat16()
    return stored


def computed_tensors(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The F32 values that a forward pass should see."""
    scaled = {name for name in stored if f"{name}_scale_inv" in stored}
    return {
        name: dequantize(tensor, stored[f"{name}_scale_inv"]).float() if name in scaled else tensor.float()
        for name, tensor in stored.items()
        if not name.endswith("_scale_inv")
    }


def byte_tokenizer() -> Tokenizer:
    """One token a byte, so that every Chinese character takes three."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])  # ids 256 and 257
    return tokenizer


def write_small(
    folder: Path, *, fp8: bool = True, stored: dict[str, torch.Tensor] | None = None, **config: Any
) -> dict[str, torch.Tensor]:
    """Write a checkpoint in two shards, a third of the scales apart from their weights. Returns what is stored."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {**CONFIG, **config}
    stored = stored_tensors(whole, fp8=fp8) if stored is None else stored
    if fp8:
        whole["quantization_config"] = QUANTIZATION
    weight_map = {
        name: f"model-{1 + i % 2:05}-of-000002.safetensors" for i, name in enumerate(sorted(stored, reverse=True))
    }
    for file in set(weight_map.values()):
        part = {name: stored[name].contiguous() for name in stored if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in stored.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(whole))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257]}))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    special = {"bos_token": {"content": BOS}, "eos_token": EOS, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, "chat_template": TEMPLATE}))
    return stored
