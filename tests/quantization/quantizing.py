"""Models to quantize in a fraction of a second, tokens to calibrate with, and what came out of it, read by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plain_reference
from folders import Contents, read_config, read_published
from tiny import V3, Gptq, Tiny, gptq_weight

from weightkit.quantization import QuantizationReport, Settings, quantize

SAMPLES, SEQ_LEN = 8, 64
GROUPS = Settings(group_size=16)


def small(model: Tiny, **changes: Any) -> Tiny:
    """The model with narrow layers: 54 matrices are quantized in a quarter of a second."""
    q_lora = None if model.q_lora is None else 32
    sizes = {"hidden": 64, "moe": 32, "intermediate": 64, "shared": 2, "heads": 4}
    latents = {"q_lora": q_lora, "kv_lora": 32, "nope": 16, "rope": 16, "v": 16}
    return replace(model, **{**sizes, **latents, **changes})


SMALL = small(V3)


def write_tokens(path: Path, samples: int = SAMPLES, seq_len: int = SEQ_LEN, *, vocab: int = 64, seed: int = 0) -> Path:
    """Token ids, some far more often than others."""
    share = 1.0 / (np.arange(vocab) + 3.0)
    tokens = np.random.default_rng(seed).choice(vocab, (samples, seq_len), p=share / share.sum())
    np.save(path, tokens.astype(np.int32))
    return path


def run(source: Path, target: Path, settings: Settings = GROUPS, **options: Any) -> QuantizationReport:
    """Quantize with ``tokens.npy`` beside the target, which is made where it is not there."""
    tokens = target.parent / "tokens.npy"
    if not tokens.exists():
        write_tokens(tokens)
    options = {"calibration": tokens, "samples": SAMPLES, "seq_len": SEQ_LEN, "device": "cpu", **options}
    report = quantize(source, target, settings, progress=False, **options)
    assert report is not None
    return report


def weight_files(folder: Path) -> dict[str, bytes]:
    """Name to content of the weight files."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def as_gptq(model: Tiny, settings: Settings) -> Tiny:
    """What the model is to be after a quantization with these settings."""
    form = Gptq(settings.bits, settings.group_size, everything=settings.scope == "all")
    return replace(model, fp8=False, gptq=form, mtp_layers=model.mtp_layers if settings.mtp else 0)


def exact_weights(source: Contents) -> dict[str, np.ndarray]:
    """The source's weights in F32, block scales multiplied in."""
    found = {}
    for name, (dtype, shape, data) in source.items():
        if dtype == "F8_E4M3":
            _, blocks, scales = source[f"{name}_scale_inv"]
            codes = np.frombuffer(data, np.uint8).reshape(shape)
            data = plain_reference.dequantized(codes, np.frombuffer(scales, "<f4").reshape(blocks), "F32")
            dtype = "F32"
        if not name.endswith("_scale_inv"):
            found[name] = plain_reference.widen(data, dtype).reshape(shape)
    return found


def integers(contents: Contents, module: str, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes [N, K] and scales [groups, N] F32 of a quantized weight."""
    words = np.frombuffer(contents[f"{module}.qweight"][2], "<u4").reshape(contents[f"{module}.qweight"][1])
    places = np.arange(0, 32, bits, dtype=np.uint32)
    codes = (words[:, None, :] >> places[None, :, None] & np.uint32((1 << bits) - 1)).reshape(-1, words.shape[1])
    scales = np.frombuffer(contents[f"{module}.scales"][2], "<f2").reshape(contents[f"{module}.scales"][1])
    return codes.T.astype(np.uint8), scales.astype(np.float32)


def check_output(source: Contents, target: Path, model: Tiny, settings: Settings) -> Contents:
    """Names, dtypes, shapes, what must not have changed, and what the config says, all against the model by hand."""
    found, expected = read_published(target), as_gptq(model, settings)
    assert {name: content[:2] for name, content in found.items()} == expected.tensors()
    assert not any(dtype.startswith("F8") for dtype, _, _ in found.values())
    zero = (1 << (settings.bits - 1)) - 1
    for name, (dtype, shape, data) in found.items():
        leaf = name.rpartition(".")[2]
        if leaf == "qzeros":
            assert set(data) == {zero | zero << 4 if settings.bits == 4 else zero}
        elif leaf == "g_idx":
            size = shape[0] if settings.group_size == -1 else settings.group_size
            assert (np.frombuffer(data, "<i4") == np.arange(shape[0]) // size).all()
        elif leaf == "scales":
            scales = np.frombuffer(data, "<f2")
            assert (scales > 0).all()
            assert np.isfinite(scales).all()
        elif leaf != "qweight" and source[name][0] == "F8_E4M3":
            _, blocks, scale = source[f"{name}_scale_inv"]
            codes = np.frombuffer(source[name][2], np.uint8).reshape(shape)
            exact = np.frombuffer(scale, "<f4").reshape(blocks)
            assert data == plain_reference.dequantized(codes, exact, "BF16"), name
        elif leaf != "qweight":
            assert (dtype, shape, data) == source[name], name
    check_config(target, expected, settings)
    return found


def check_config(target: Path, expected: Tiny, settings: Settings) -> None:
    """Both configs say the same, and by their rules engines quantize just what is quantized."""
    config = read_config(target)
    declared = config["quantization_config"]
    assert isinstance(declared, dict)
    assert json.loads((target / "quantize_config.json").read_text()) == declared
    fixed = {"bits": settings.bits, "group_size": settings.group_size, "desc_act": False, "sym": True, "lm_head": False}
    assert {key: declared[key] for key in fixed} == fixed
    assert (declared["quant_method"], declared["checkpoint_format"]) == ("gptq", "gptq")
    assert config.get("num_nextn_predict_layers", 0) == expected.mtp_layers
    assert config["torch_dtype"] == "bfloat16"
    assert all(rule.startswith("-:") for rule in declared["dynamic"])
    kept = [re.compile(rule[2:]) for rule in declared["dynamic"]]
    tensors = expected.tensors()
    modules = {name.rpartition(".")[0] for name, (_, shape) in tensors.items() if len(shape) == 2}
    never = ("lm_head", "embed_tokens", "mlp.gate", "eh_proj", "shared_head.head")
    for module in modules:
        quantized = not any(pattern.match(module) for pattern in kept) and not module.endswith(never)
        assert quantized == (f"{module}.qweight" in tensors), module


def dequantized(contents: Contents, model: Tiny, settings: Settings) -> dict[str, np.ndarray]:
    """Every weight of an output in F32, quantized ones not rounded to BF16."""
    form = as_gptq(model, settings).gptq
    assert form is not None
    found = {}
    for name, (dtype, shape, data) in contents.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            found[f"{module}.weight"] = gptq_weight(contents, module, form)
        elif leaf not in ("qzeros", "scales", "g_idx"):
            found[name] = plain_reference.widen(data, dtype).reshape(shape)
    return found
