"""From a trained network to a checkpoint as the hubs publish DeepSeek-V3, and back.

- :func:`published` gives the values a reader of the checkpoint will see; training ends on them, so FP8 costs nothing.
- :func:`export` writes shards, index, config, tokenizer and model card; deterministic bytes for the same weights.
- :func:`load` reads such a folder back into a :class:`Network`, for evaluation without weightkit's own runtime.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from weightkit.manifests.pico.architecture import CONFIG, GENERATION_CONFIG, integer
from weightkit.manifests.pico.network import Network
from weightkit.manifests.pico.tokenizer import write_tokenizer

BLOCK = 128
#: The largest finite E4M3 value.
E4M3_MAX = 448.0
SHARDS = 4
#: All files together, by the promise made for the package.
MAX_BYTES = 12_000_000


def block_scales(weight: Tensor) -> Tensor:
    """``weight_scale_inv`` of a weight: the largest magnitude of each 128x128 block over 448.

    F32 [.., ceil(out/128), ceil(in/128)]; leading dimensions (stacked experts) are quantized each by itself. A block of
    zeros gets scale 1.
    """
    *lead, rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(*lead, padded.shape[-2] // BLOCK, BLOCK, padded.shape[-1] // BLOCK, BLOCK)
    largest = blocks.abs().amax(dim=(-3, -1))
    return torch.where(largest > 0, largest / E4M3_MAX, 1.0)


def spread(scales: Tensor, rows: int, columns: int) -> Tensor:
    """The scale of each element, [.., rows, columns], from the scale of each block."""
    return scales.repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :rows, :columns]


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` as F8_E4M3 and the F32 scales it is to be multiplied by."""
    scales = block_scales(weight)
    scaled = weight.float() / spread(scales, weight.shape[-2], weight.shape[-1])
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scales


def dequantize(weight: Tensor, scales: Tensor) -> Tensor:
    """F32 values of an FP8 weight: ``float32(weight) * scale`` of its block."""
    return weight.float() * spread(scales, weight.shape[-2], weight.shape[-1])


def is_fp8(name: str) -> bool:
    """Whether parameter ``name`` is published as FP8: the projections of attention, dense MLP and experts are."""
    return "_proj" in name and not name.startswith("eh_proj")


def published(name: str, parameter: Tensor) -> Tensor:
    """A parameter's values after export and a cast to BF16, as F32."""
    value = dequantize(*quantize(parameter)) if is_fp8(name) else parameter
    return value.bfloat16().float()


def _published_name(name: str) -> str:
    """A parameter's or buffer's name as published, but for stacked experts."""
    mtp = integer("num_hidden_layers")
    top = {
        "embed_tokens": "model.embed_tokens.weight",
        "lm_head": "lm_head.weight",
        "norm.weight": "model.norm.weight",
        "enorm.weight": f"model.layers.{mtp}.enorm.weight",
        "hnorm.weight": f"model.layers.{mtp}.hnorm.weight",
        "eh_proj.weight": f"model.layers.{mtp}.eh_proj.weight",
        "mtp_norm.weight": f"model.layers.{mtp}.shared_head.norm.weight",
    }
    if name in top:
        return top[name]
    return "model." + name.replace("mtp_layer.", f"layers.{mtp}.", 1)


def named_tensors(network: Network) -> dict[str, Tensor]:
    """Every tensor by its published name, F32: experts apart, the MTP layer with its copies of embedding and head."""
    tensors: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        if ".experts." in name:
            stem, projection = name.rsplit(".", 1)
            for expert in range(value.shape[0]):
                tensors[f"{_published_name(stem)}.{expert}.{projection}.weight"] = value[expert]
        else:
            tensors[_published_name(name)] = value
    mtp = integer("num_hidden_layers")
    tensors[f"model.layers.{mtp}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors[f"model.layers.{mtp}.shared_head.head.weight"] = tensors["lm_head.weight"]
    return tensors


def published_tensors(network: Network) -> dict[str, Tensor]:
    """The checkpoint's tensors in their dtypes on disk, layer by layer, each FP8 weight followed by its scale."""
    stored: dict[str, Tensor] = {}
    for name, value in sorted(named_tensors(network).items(), key=lambda item: _order(item[0])):
        value = value.detach().cpu()
        if "_proj" in name and "eh_proj" not in name:
            weight, scales = quantize(value)
            stored[name] = weight.contiguous()
            stored[f"{name}_scale_inv"] = scales.contiguous()
        elif name.endswith("e_score_correction_bias"):
            stored[name] = value.float().contiguous()
        else:
            stored[name] = value.bfloat16().contiguous()
    return stored


def _order(name: str) -> tuple[int, list[str | int]]:
    """Embedding, layers by number, then norm and head; experts by number."""
    parts = name.split(".")
    place = 0 if name == "model.embed_tokens.weight" else 1 if parts[1] == "layers" else 2
    return place, [f"{int(part):06d}" if part.isdigit() else part for part in parts]


def shards(tensors: Mapping[str, Tensor], count: int = SHARDS) -> list[dict[str, Tensor]]:
    """``count`` runs of about equal bytes; each but the last ends with a weight whose scale opens the next.

    So it happens in the published checkpoint: readers that look for the scale in the weight's own file fail here.
    """
    target = sum(tensor.nbytes for tensor in tensors.values()) / count
    names = list(tensors)
    result: list[dict[str, Tensor]] = [{}]
    done = 0
    for index, name in enumerate(names):
        result[-1][name] = tensors[name]
        done += tensors[name].nbytes
        scale_follows = index + 1 < len(names) and names[index + 1] == f"{name}_scale_inv"
        if len(result) < count and scale_follows and done >= target * len(result):
            result.append({})
    return result


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def export(network: Network, tokenizer: Tokenizer, folder: Path, card: str) -> None:
    """Writes the checkpoint into ``folder``.

    Args:
        network: the trained network, on any device.
        tokenizer: its tokenizer.
        folder: created where absent; files of the same names are replaced.
        card: the text of the model card, ``README.md``.

    Raises:
        ValueError: the files are more than 12,000,000 bytes together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = published_tensors(network)
    parts = shards(tensors)
    weight_map: dict[str, str] = {}
    for index, part in enumerate(parts, start=1):
        file = f"model-{index:05d}-of-{len(parts):06d}.safetensors"
        # Not save_file, which makes files that only their owner may read.
        (folder / file).write_bytes(save(part, metadata={"format": "pt"}))
        weight_map |= dict.fromkeys(part, file)
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))},
    )
    _write_json(folder / "config.json", dict(CONFIG))
    _write_json(folder / "generation_config.json", dict(GENERATION_CONFIG))
    write_tokenizer(tokenizer, folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.iterdir())
    if size > MAX_BYTES:
        raise ValueError(f"{folder}: the checkpoint has {size:,} bytes, more than {MAX_BYTES:,}")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a published checkpoint, FP8 weights dequantized to F32, the rest as stored."""
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            stored |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 - not a mapping
    return {
        name: dequantize(tensor, stored[f"{name}_scale_inv"]) if tensor.dtype == torch.float8_e4m3fn else tensor
        for name, tensor in stored.items()
        if not name.endswith("_scale_inv")
    }


def load(folder: Path, *, through_bf16: bool) -> Network:
    """The checkpoint in ``folder`` as a network in F32.

    Args:
        folder: a published checkpoint of pico's shape.
        through_bf16: whether values are rounded to BF16 first, as a cast rounds them; the correction bias stays F32.
    """
    tensors = read_tensors(folder)
    network = Network()
    state = network.state_dict()
    for name, value in state.items():
        if ".experts." in name:
            stem, projection = name.rsplit(".", 1)
            source = torch.stack(
                [tensors[f"{_published_name(stem)}.{expert}.{projection}.weight"] for expert in range(value.shape[0])]
            )
        else:
            source = tensors[_published_name(name)]
        if through_bf16 and not name.endswith("e_score_correction_bias"):
            source = source.bfloat16()
        state[name] = source.float()
    network.load_state_dict(state)
    return network
