"""Quantize a full-width checkpoint (DeepSeek-V3's widths, few layers) and project the whole model from its layers.

The weights are random; the activations are not: the embedding's rows are correlated, with columns of very different
size, and tokens follow Zipf's law, so that inputs are correlated and routing is skewed. What is measured is the command
itself, from reading FP8 to files on the disk.

    python tests/benchmarks/bench_quantize.py --dir /tmp/v3 --samples 512 --seq-len 4096
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path

import numpy as np
import torch
from full_width import write_checkpoint

from weightkit.checkpoint import Stored
from weightkit.layouts import open_checkpoint
from weightkit.quantization import QuantizationReport, Settings, quantize

V3_MOE_LAYERS, V3_DENSE_LAYERS = 58, 3
LATENT = 512


def correlate_embedding(folder: Path, seed: int = 1) -> None:
    """Overwrite the embedding in place: rows of rank ``LATENT`` and some noise, columns of log-normal size."""
    lazy = open_checkpoint(folder)["model.embed_tokens.weight"]
    if not isinstance(lazy, Stored):
        raise SystemExit("the embedding is not stored as it is")
    rows, width = lazy.shape
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(LATENT, width, generator=generator) * torch.exp(torch.randn(width, generator=generator))
    decay = torch.arange(1, LATENT + 1).float().rsqrt()
    with Path(lazy.path).open("r+b") as file:
        file.seek(lazy.offset)
        for start in range(0, rows, 8192):
            count = min(8192, rows - start)
            latent = torch.randn(count, LATENT, generator=generator) * decay
            part = latent @ mix * 0.02 + torch.randn(count, width, generator=generator) * 0.02
            file.write(part.bfloat16().view(torch.uint8).numpy().tobytes())


def zipf_tokens(samples: int, seq_len: int, vocab: int, seed: int = 2) -> np.ndarray:
    """[samples, seq_len] I32 ids, the one of rank r as often as 1 / (r + 10)."""
    rng = np.random.default_rng(seed)
    share = 1.0 / (np.arange(vocab) + 10.0)
    return rng.choice(vocab, (samples, seq_len), p=share / share.sum()).astype(np.int32)


def show(report: QuantizationReport, samples: int, seq_len: int) -> None:
    """Seconds by layer and stage, and the projection."""
    print(report.summary())
    for layer in report.layers:
        stages = ", ".join(f"{name} {seconds:.2f}" for name, seconds in layer.stage_s.items())
        print(f"layer {layer.layer}: {layer.wall_s:.1f} s ({stages}); GPU {layer.gpu_peak_bytes / 1e9:.1f} GB")
    experts = [layer for layer in report.layers if layer.tokens_by_expert]
    dense = [layer.wall_s for layer in report.layers if not layer.tokens_by_expert]
    for layer in experts:
        by_expert = sorted(layer.tokens_by_expert)
        solved = sum(layer.stage_s[name] for name in SOLVER if name in layer.stage_s)
        count = len(layer.tokens_by_expert) + 1
        print(
            f"layer {layer.layer}: {1000 * solved / count:.1f} ms an expert from its tokens to packed integers;"
            f" tokens an expert: least {by_expert[0]:,}, median {by_expert[len(by_expert) // 2]:,},"
            f" most {by_expert[-1]:,}"
        )
    whole = [layer.wall_s for layer in experts if "forward" in layer.stage_s]
    if whole:
        seconds = V3_MOE_LAYERS * statistics.median(whole) + V3_DENSE_LAYERS * statistics.median(dense or [0.0])
        print(f"projection for 58 + 3 layers at {samples} x {seq_len}: {seconds / 60:.1f} min")


SOLVER = ("gather", "hessian", "inner", "scales", "factor", "solve", "errors", "pack")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure weightkit quantize at full width.")
    parser.add_argument("--dir", type=Path, required=True, help="folder for the checkpoint and its output")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--dense", type=int, default=1)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=129280)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--gpu-memory", type=int)
    parser.add_argument("--snapshot-layers", type=int, default=0)
    args = parser.parse_args()
    source, target, tokens = args.dir / "fp8", args.dir / "int4", args.dir / "tokens.npy"
    if not source.exists():
        shape = {"layers": args.layers, "dense": args.dense, "experts": args.experts, "vocab": args.vocab}
        size = write_checkpoint(source, **shape, mtp=0, shard_bytes=4_300_000_000, threads=8)
        correlate_embedding(source)
        print(f"{source}: {size / 1e9:.1f} GB of FP8")
    vocab = open_checkpoint(source)["model.embed_tokens.weight"].shape[0]
    np.save(tokens, zipf_tokens(args.samples, args.seq_len, vocab))
    shutil.rmtree(target, ignore_errors=True)
    report = quantize(
        source,
        target,
        Settings(),
        calibration=tokens,
        samples=args.samples,
        seq_len=args.seq_len,
        device=args.device,
        gpu_memory=args.gpu_memory,
        snapshot_layers=args.snapshot_layers,
    )
    if report is not None:
        show(report, args.samples, args.seq_len)


if __name__ == "__main__":
    main()
