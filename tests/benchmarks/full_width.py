"""Write a random checkpoint of DeepSeek-V3's full width, as the hubs publish it: something to measure with.

    python tests/benchmarks/full_width.py --dir /data/fp8 --layers 2 --experts 256        # 12 GB
    python tests/benchmarks/full_width.py --dir /data/fp8 --gb 12                         # about as much

Hidden size 7168 and every other width of the real model; layers, experts and vocabulary as asked for. FP8 with block
scales (all finite E4M3 codes, uniformly; dequantized weights have a standard deviation of 0.02), norms of ones, index,
config, a byte-level tokenizer with its chat template in ``tokenizer_config.json``. Tensors lie in the files as
safetensors' own ``save_file`` orders them: wider dtypes first, then by name. Shards are cut wherever they are full, so
that a weight and its scale can lie in different files.

Contents are cut at random offsets from pools of random bytes, so that writing takes as long as the disk does; memory
stays under 600 MB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from weightkit import manifests
from weightkit.family import Architecture, Expected, blueprint

#: Standard deviation of the dequantized weights, the initializer_range of the published config.
STD = 0.02
POOL_BYTES = 128 << 20
CHUNK_BYTES = 8 << 20
DTYPE_BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Pools:
    """Random bytes by what they are for; a tensor's content is cut from one of them."""

    fp8: Bytes
    weights: Bytes
    scales: Bytes
    ones: Bytes

    def of(self, tensor: Expected) -> Bytes:
        if tensor.dtype == "F8_E4M3":
            return self.fp8
        if tensor.dtype == "F32":
            return self.scales
        return self.ones if "norm" in tensor.name else self.weights


def make_pools(rng: np.random.Generator) -> Pools:
    """Pools of E4M3 codes without NaN, BF16 normals, F32 scales, BF16 ones."""
    codes = rng.integers(0, 256, POOL_BYTES, dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x38
    normals = (rng.standard_normal(POOL_BYTES // 8, dtype=np.float32) * STD).view(np.uint32) >> 16
    scales = rng.uniform(0.5, 1.5, 1 << 20).astype(np.float32) * np.float32(STD / e4m3_std())
    ones = np.full(1 << 20, 0x3F80, np.uint16)
    return Pools(codes, normals.astype(np.uint16).view(np.uint8), scales.view(np.uint8), ones.view(np.uint8))


def e4m3_std() -> float:
    """Standard deviation of a uniformly drawn finite E4M3 code."""
    codes = np.arange(0x7F)
    exponent, mantissa = codes >> 3, codes & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))
    return float(np.sqrt(np.mean(values**2)))


def config_of(layers: int, dense: int, experts: int, vocab: int, mtp: int) -> dict[str, object]:
    """DeepSeek-V3's ``config.json`` with other counts."""
    published = dict(manifests.load("deepseek-v3").config)
    return published | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_hidden_layers": layers,
        "first_k_dense_replace": dense,
        "n_routed_experts": experts,
        "n_group": min(8, experts // 2),  # a group's score is that of its best two
        "vocab_size": vocab,
        "num_nextn_predict_layers": mtp,
        "initializer_range": STD,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def shape_of(size_bytes: int, vocab: int = 8192) -> dict[str, int]:
    """``layers``, ``dense``, ``experts`` and ``vocab`` of a checkpoint without MTP layers, of about so many bytes.

    One dense layer; of MoE layers as many as come within 4 % of the size, at most 4 unless all have 256 experts; never
    fewer than 16 experts, which is 1.8 GB.
    """

    def measured(moe: int, experts: int) -> int:
        config = config_of(moe + 1, 1, experts, vocab, 0)
        return sum(tensor.size_bytes for tensor in blueprint(Architecture.from_config(config)).values())

    smallest = measured(1, 16)
    expert = (measured(1, 24) - smallest) / 8
    layer = measured(2, 16) - smallest - 16 * expert
    rest = size_bytes - (smallest - layer - 16 * expert)
    most = max(4, -int(-rest // (layer + 256 * expert)))

    def experts_of(moe: int) -> int:
        return min(256, max(16, 8 * round((rest / moe - layer) / expert / 8)))

    def error(moe: int) -> float:
        return abs(moe * (layer + experts_of(moe) * expert) - rest)

    moe = next(
        (moe for moe in range(most, 0, -1) if error(moe) < 0.04 * size_bytes), min(range(1, most + 1), key=error)
    )
    return {"layers": moe + 1, "dense": 1, "experts": experts_of(moe), "vocab": vocab}


def pack(tensors: list[Expected], shard_bytes: int) -> list[list[Expected]]:
    """Tensors in order into shards, each as safetensors' ``save_file`` would order it."""
    shards: list[list[Expected]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size_bytes
    return [sorted(shard, key=lambda tensor: (-DTYPE_BYTES[tensor.dtype], tensor.name)) for shard in shards]


def header_of(tensors: list[Expected]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.size_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def content(tensor: Expected, pools: Pools, rng: np.random.Generator) -> Iterator[memoryview]:
    pool, width = pools.of(tensor), DTYPE_BYTES[tensor.dtype]
    left = tensor.size_bytes
    while left:
        count = min(left, CHUNK_BYTES, len(pool))
        start = int(rng.integers(0, (len(pool) - count) // width + 1)) * width
        yield pool[start : start + count].data
        left -= count


def write_shard(path: Path, tensors: list[Expected], pools: Pools, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with path.open("wb", buffering=0) as file:
        file.write(header_of(tensors))
        for tensor in tensors:
            for piece in content(tensor, pools, rng):
                while len(piece):
                    piece = piece[file.write(piece) :]


def write_side_files(folder: Path, config: dict[str, object], tokenizer: Path | None) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generation = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    if tokenizer is not None:
        for path in tokenizer.glob("*token*"):
            shutil.copyfile(path, folder / path.name)
        return
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "model_max_length": 4096,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer(), ensure_ascii=False))


def byte_tokenizer() -> dict[str, object]:
    """A ``tokenizer.json`` of the two special tokens and the 256 bytes, as byte-level BPE spells them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]
    special = ["<|begin|>", "<|end|>"]
    added = [
        {"id": number, "content": name, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False}
        for number, name in enumerate(special)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocab = {token: number for number, token in enumerate([*special, *spelled])}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "ignore_merges": False, "byte_fallback": False}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": model | {"fuse_unk": False},
    }


def write_checkpoint(
    folder: Path,
    *,
    layers: int,
    dense: int,
    experts: int,
    vocab: int,
    mtp: int,
    shard_bytes: int,
    tokenizer: Path | None = None,
    seed: int = 0,
    threads: int = 4,
) -> int:
    """Write it; returns the bytes of its weight files."""
    config = config_of(layers, dense, experts, vocab, mtp)
    tensors = list(blueprint(Architecture.from_config(config)).values())
    shards = pack(tensors, shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model-{number:05}-of-{len(shards):06}.safetensors" for number in range(1, len(shards) + 1)]
    pools = make_pools(np.random.default_rng(seed))
    with ThreadPoolExecutor(threads) as pool:
        jobs = zip(names, shards, strict=True)
        written = [
            pool.submit(write_shard, folder / name, shard, pools, seed + number)
            for number, (name, shard) in enumerate(jobs)
        ]
        for future in written:
            future.result()
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    total = sum(prod(tensor.shape) * DTYPE_BYTES[tensor.dtype] for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    write_side_files(folder, config, tokenizer)
    return sum((folder / name).stat().st_size for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a random full-width DeepSeek-V3 checkpoint.")
    parser.add_argument("--dir", type=Path, required=True, help="folder to write, which must not hold anything")
    parser.add_argument("--gb", type=float, help="size without MTP layers; chooses layers, experts and vocabulary")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dense", type=int, default=1, help="dense ones among the layers")
    parser.add_argument("--experts", type=int, default=256, help="a multiple of 8, the number of groups")
    parser.add_argument("--vocab", type=int, default=129280)
    parser.add_argument("--mtp", type=int, default=0, help="multi-token-prediction layers")
    parser.add_argument("--shard-gb", type=float, default=4.3)
    parser.add_argument("--tokenizer", type=Path, help="folder whose tokenizer files are taken")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.dir.exists() and any(args.dir.iterdir()):
        parser.error(f"{args.dir} is not empty")
    started = time.monotonic()
    shape = {"layers": args.layers, "dense": args.dense, "experts": args.experts, "vocab": args.vocab}
    if args.gb:
        shape = shape_of(int(args.gb * 1e9))
    size = write_checkpoint(
        args.dir,
        **shape,
        mtp=args.mtp,
        shard_bytes=int(args.shard_gb * 1e9),
        tokenizer=args.tokenizer,
        seed=args.seed,
    )
    print(f"{args.dir}: {size / 1e9:.2f} GB, {shape}, in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
