"""Tiny checkpoints of the family, written byte by byte: names and shapes stand here by hand, independent of weightkit.

``write_tiny(folder)`` writes a V3 checkpoint as the hubs publish it: FP8 with block scales, several shards, a scale
apart from its weight, config, index, tokenizer files, an MTP layer. Keyword arguments vary it; ``V2_LITE`` and
``MOONLIGHT`` are other members, and ``V3_INT4`` has its experts in GPTQ of 4 bits.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Gptq:
    """GPTQ as a tiny model has it: routed and shared experts, or all linear layers, of all layers but MTP layers.

    ``act_order`` deals inputs to groups in a shuffled order, as ``desc_act`` allows.
    """

    bits: int = 4
    group_size: int = 16
    sym: bool = True
    act_order: bool = False
    checkpoint_format: str = "gptq"
    everything: bool = False

    def config(self, model: Tiny) -> dict[str, object]:
        kept = (
            []
            if self.everything
            else [r".*self_attn\..*", *[rf".*layers\.{n}\.mlp\..*" for n in range(model.dense_layers)]]
        )
        kept += [rf"model\.layers\.{model.layers + n}\..*" for n in range(model.mtp_layers)]
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "desc_act": self.act_order,
            "sym": self.sym,
            "lm_head": False,
            "quant_method": "gptq",
            "checkpoint_format": self.checkpoint_format,
            "pack_dtype": "int32",
            "dynamic": {f"-:{pattern}": {} for pattern in kept},
            "meta": {"quantizer": ["by hand"]},
        }

    def groups(self, columns: int) -> int:
        return 1 if self.group_size == -1 else -(-columns // self.group_size)

    def tensors(self, module: str, rows: int, columns: int) -> dict[str, tuple[str, Shape]]:
        """The four tensors in place of the weight [rows, columns] of ``module``."""
        per_word, groups = 32 // self.bits, self.groups(columns)
        return {
            f"{module}.qweight": ("I32", (columns // per_word, rows)),
            f"{module}.qzeros": ("I32", (groups, rows // per_word)),
            f"{module}.scales": ("F16", (groups, rows)),
            f"{module}.g_idx": ("I32", (columns,)),
        }

    def random(self, rng: np.random.Generator, leaf: str, shape: Shape) -> bytes:
        """Content of one of the four tensors; what they mean is in ``gptq_weight``."""
        zero = 1 << (self.bits - 1)
        stored = zero - (self.checkpoint_format == "gptq")
        if leaf == "qweight":
            codes = rng.integers(0, 1 << self.bits, (shape[0] * 32 // self.bits, shape[1]))
            return pack_columns(codes, self.bits).tobytes()
        if leaf == "qzeros":
            zeros = np.full((shape[1] * 32 // self.bits, shape[0]), stored)
            if not self.sym:
                zeros = rng.integers(0, 1 << self.bits, zeros.shape)
            return np.ascontiguousarray(pack_columns(zeros, self.bits).T).tobytes()
        if leaf == "scales":
            return rng.uniform(0.001, 0.1, shape).astype("<f2").tobytes()
        groups = np.arange(shape[0]) // (shape[0] if self.group_size == -1 else self.group_size)
        return (rng.permutation(groups) if self.act_order else groups).astype("<i4").tobytes()


def pack_columns(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [K, N] to words [K * bits / 32, N]: the lowest bits of a word hold the first of its rows."""
    per_word = 32 // bits
    words = np.zeros((codes.shape[0] // per_word, codes.shape[1]), np.uint32)
    for place in range(per_word):
        words |= codes[place::per_word].astype(np.uint32) << np.uint32(bits * place)
    return words.view("<i4")


def gptq_weight(contents: dict[str, tuple[str, Shape, bytes]], module: str, gptq: Gptq) -> np.ndarray:
    """By hand, the weight [out, in] in float32 that the four tensors of ``module`` stand for."""
    words, columns = (np.frombuffer(contents[f"{module}.{leaf}"][2], "<u4") for leaf in ("qweight", "qzeros"))
    shape, (groups, packed) = contents[f"{module}.qweight"][1], contents[f"{module}.qzeros"][1]
    per_word, mask = 32 // gptq.bits, (1 << gptq.bits) - 1
    words, columns = words.reshape(shape), columns.reshape(groups, packed)
    scales = np.frombuffer(contents[f"{module}.scales"][2], "<f2").reshape(groups, shape[1]).astype(np.float32)
    g_idx = np.frombuffer(contents[f"{module}.g_idx"][2], "<i4")
    weight = np.zeros((shape[1], shape[0] * per_word), np.float32)
    for k in range(weight.shape[1]):
        code = words[k // per_word] >> np.uint32(gptq.bits * (k % per_word)) & np.uint32(mask)
        n = np.arange(shape[1])
        zero = columns[g_idx[k], n // per_word] >> (gptq.bits * (n % per_word)).astype(np.uint32) & np.uint32(mask)
        zero = (zero + (gptq.checkpoint_format == "gptq")) & np.uint32(mask)
        weight[:, k] = (code.astype(np.float32) - zero.astype(np.float32)) * scales[g_idx[k]]
    return weight


@dataclass(frozen=True)
class Tiny:
    """A model small enough for tests, whose widths are the awkward ones: no multiples of 128 where the format allows
    it."""

    model_type: str = "deepseek_v3"
    architecture: str = "DeepseekV3ForCausalLM"
    hidden: int = 144
    vocab: int = 64
    layers: int = 3
    dense_layers: int = 1
    mtp_layers: int = 1
    heads: int = 16
    q_lora: int | None = 96
    kv_lora: int = 64
    nope: int = 32
    rope: int = 32
    v: int = 32
    intermediate: int = 512
    moe: int = 128
    experts: int = 8
    shared: int = 4
    groups: int = 2
    top_groups: int = 1
    top_k: int = 2
    fp8: bool = True
    sigmoid: bool = True
    inv_freq: bool = False
    gptq: Gptq | None = None
    extra_config: dict[str, object] = field(default_factory=dict)

    def config(self) -> dict[str, object]:
        config: dict[str, object] = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "torch_dtype": "bfloat16",
            "hidden_size": self.hidden,
            "vocab_size": self.vocab,
            "num_hidden_layers": self.layers,
            "first_k_dense_replace": self.dense_layers,
            "moe_layer_freq": 1,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "q_lora_rank": self.q_lora,
            "kv_lora_rank": self.kv_lora,
            "qk_nope_head_dim": self.nope,
            "qk_rope_head_dim": self.rope,
            "v_head_dim": self.v,
            "intermediate_size": self.intermediate,
            "moe_intermediate_size": self.moe,
            "n_routed_experts": self.experts,
            "n_shared_experts": self.shared,
            "num_experts_per_tok": self.top_k,
            "n_group": self.groups,
            "topk_group": self.top_groups,
            "scoring_func": "sigmoid" if self.sigmoid else "softmax",
            "topk_method": "noaux_tc" if self.sigmoid else "group_limited_greedy",
            "norm_topk_prob": self.sigmoid,
            "routed_scaling_factor": 2.5,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "max_position_embeddings": 512,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "hidden_act": "silu",
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        if self.mtp_layers or self.sigmoid:
            config["num_nextn_predict_layers"] = self.mtp_layers
        if self.fp8:
            config["quantization_config"] = {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
            }
        if self.gptq is not None:
            config["quantization_config"] = self.gptq.config(self)
        return config | self.extra_config

    def tensors(self) -> dict[str, tuple[str, Shape]]:
        """Published name to dtype and shape, scales included."""
        found: dict[str, tuple[str, Shape]] = {"model.embed_tokens.weight": ("BF16", (self.vocab, self.hidden))}
        for layer in range(self.layers + self.mtp_layers):
            found |= self._layer(layer)
        found["model.norm.weight"] = ("BF16", (self.hidden,))
        found["lm_head.weight"] = ("BF16", (self.vocab, self.hidden))
        return found

    def _layer(self, layer: int) -> dict[str, tuple[str, Shape]]:
        at, h = f"model.layers.{layer}", self.hidden
        found: dict[str, tuple[str, Shape]] = {}
        qk = self.heads * (self.nope + self.rope)
        if self.q_lora is None:
            found |= self._linear(f"{at}.self_attn.q_proj.weight", qk, h)
        else:
            found |= self._linear(f"{at}.self_attn.q_a_proj.weight", self.q_lora, h)
            found[f"{at}.self_attn.q_a_layernorm.weight"] = ("BF16", (self.q_lora,))
            found |= self._linear(f"{at}.self_attn.q_b_proj.weight", qk, self.q_lora)
        found |= self._linear(f"{at}.self_attn.kv_a_proj_with_mqa.weight", self.kv_lora + self.rope, h)
        found[f"{at}.self_attn.kv_a_layernorm.weight"] = ("BF16", (self.kv_lora,))
        found |= self._linear(f"{at}.self_attn.kv_b_proj.weight", self.heads * (self.nope + self.v), self.kv_lora)
        found |= self._linear(f"{at}.self_attn.o_proj.weight", h, self.heads * self.v)
        if self.inv_freq and layer < self.layers:
            found[f"{at}.self_attn.rotary_emb.inv_freq"] = ("F32", (max(1, h // self.heads // 2),))
        if layer < self.dense_layers:
            found |= self._mlp(f"{at}.mlp", self.intermediate)
        else:
            found[f"{at}.mlp.gate.weight"] = ("BF16", (self.experts, h))
            if self.sigmoid:
                found[f"{at}.mlp.gate.e_score_correction_bias"] = ("F32", (self.experts,))
            for expert in range(self.experts):
                found |= self._mlp(f"{at}.mlp.experts.{expert}", self.moe)
            found |= self._mlp(f"{at}.mlp.shared_experts", self.moe * self.shared)
        found[f"{at}.input_layernorm.weight"] = ("BF16", (h,))
        found[f"{at}.post_attention_layernorm.weight"] = ("BF16", (h,))
        if layer >= self.layers:
            found[f"{at}.embed_tokens.weight"] = ("BF16", (self.vocab, h))
            found[f"{at}.enorm.weight"] = ("BF16", (h,))
            found[f"{at}.hnorm.weight"] = ("BF16", (h,))
            found[f"{at}.eh_proj.weight"] = ("BF16", (h, 2 * h))
            found[f"{at}.shared_head.norm.weight"] = ("BF16", (h,))
            found[f"{at}.shared_head.head.weight"] = ("BF16", (self.vocab, h))
        return found

    def _mlp(self, at: str, width: int) -> dict[str, tuple[str, Shape]]:
        return {
            **self._linear(f"{at}.gate_proj.weight", width, self.hidden),
            **self._linear(f"{at}.up_proj.weight", width, self.hidden),
            **self._linear(f"{at}.down_proj.weight", self.hidden, width),
        }

    def _linear(self, name: str, rows: int, columns: int) -> dict[str, tuple[str, Shape]]:
        if self.gptq is not None and self._is_int4(name):
            return self.gptq.tensors(name.removesuffix(".weight"), rows, columns)
        if not self.fp8:
            return {name: ("BF16", (rows, columns))}
        blocks = (-(-rows // 128), -(-columns // 128))
        return {name: ("F8_E4M3", (rows, columns)), f"{name}_scale_inv": ("F32", blocks)}

    def _is_int4(self, name: str) -> bool:
        in_scope = "experts" in name or (self.gptq is not None and self.gptq.everything)
        return in_scope and int(name.split(".")[2]) < self.layers


V3 = Tiny()
V2_LITE = Tiny(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    q_lora=None,
    mtp_layers=0,
    groups=1,
    fp8=False,
    sigmoid=False,
    extra_config={"topk_method": "greedy", "routed_scaling_factor": 1.0},
)
MOONLIGHT = replace(V3, q_lora=None, mtp_layers=0, groups=1, fp8=False, inv_freq=True)
KIMI = replace(V3, model_type="kimi_k2", mtp_layers=0, groups=1, heads=8, experts=12, inv_freq=True)
V3_BF16 = replace(V3, fp8=False)
V3_INT4 = replace(V3, fp8=False, gptq=Gptq())
V31 = replace(
    V3,
    extra_config={
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        }
    },
)


SHARD_NAME = "model-{number:05}-of-{count:06}.safetensors"


def random_bytes(rng: np.random.Generator, dtype: str, shape: Shape) -> bytes:
    """Finite values of about unit size."""
    count = int(np.prod(shape))
    if dtype == "F8_E4M3":
        codes = rng.integers(0, 256, count, dtype=np.uint8)
        return np.where((codes & 0x7F) == 0x7F, 0x38, codes).astype(np.uint8).tobytes()
    values = rng.standard_normal(count).astype(np.float32)
    if dtype == "F32":
        return (np.abs(values) * 0.01 + 1e-4).astype(np.float32).tobytes()
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # BF16 by truncation: any bits will do


def _content(model: Tiny, rng: np.random.Generator, name: str, dtype: str, shape: Shape) -> bytes:
    leaf = name.rpartition(".")[2]
    if model.gptq is not None and leaf in ("qweight", "qzeros", "scales", "g_idx"):
        return model.gptq.random(rng, leaf, shape)
    return random_bytes(rng, dtype, shape)


def write_safetensors(path: Path, tensors: dict[str, tuple[str, Shape, bytes]]) -> None:
    """A safetensors file, as the format's page says it is."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(data)]}
        position += len(data)
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(data for _, _, data in tensors.values()))


def write_tiny(
    folder: Path, model: Tiny = V3, *, shards: int = 3, seed: int = 0, pattern: str = SHARD_NAME
) -> dict[str, tuple[str, Shape, bytes]]:
    """Write the checkpoint; returns what was written by name."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    contents = {
        name: (dtype, shape, _content(model, rng, name, dtype, shape))
        for name, (dtype, shape) in model.tensors().items()
    }
    files: list[dict[str, tuple[str, Shape, bytes]]] = [{} for _ in range(shards)]
    for number, (name, content) in enumerate(contents.items()):
        at = number * shards // len(contents)
        if name in (
            "model.layers.1.mlp.experts.1.up_proj.weight_scale_inv",
            "model.layers.1.mlp.experts.1.up_proj.scales",
        ):
            at = (at + 1) % shards  # a weight and its scale in different files
        files[at][name] = content
    names = [pattern.format(number=number, count=shards) for number in range(1, shards + 1)]
    weight_map: dict[str, str] = {}
    for file, tensors in zip(names, files, strict=True):
        write_safetensors(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    total = sum(len(data) for _, _, data in contents.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(model.config(), indent=2))
    if model.gptq is not None:
        (folder / "quantize_config.json").write_text(json.dumps(model.gptq.config(model), indent=2))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<b>", "eos_token": "<e>"}))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return contents
