"""Generation from a checkpoint larger than its memory: the same tokens, and at what share of the disk's speed.

    python tests/benchmarks/bench_stream.py --dir /data/stream [--gpu-memory 4GiB] [--host-memory 2GiB]
    python tests/benchmarks/bench_stream.py --dir /tmp/stream --quick --device cpu        # the script itself, 2 GB

Writes a random full-width checkpoint into ``--dir`` (13 GB; kept, and taken if it is there), then generates greedily
from it twice: with all the memory there is, and with the budgets named. Files are dropped from the page cache before
each, and streamed reads go past it. Both a prompt by itself and several that share passes are compared, token by
token; random weights have close logits, so that any wrong byte shows. In BF16 the results of shared passes may differ
from those of one prompt at a time, so each is compared with its own kind.

The streaming rate is what a prompt's pass reads over the time it takes; beside it stand plain reads of the same files:
all of them from front to back, and the random places that the plan measures. Last, what the 671B model would read in
each format, from its blueprint, and how long that takes at the streaming rate.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from full_width import write_checkpoint
from measured import set_cache

from weightkit import manifests
from weightkit.checkpoint.direct import DirectReader, measure_read_rate
from weightkit.family import Architecture, Role, blueprint
from weightkit.generation import Generation, Runtime
from weightkit.generation.memory import Budget
from weightkit.generation.plan import estimate
from weightkit.model import LatentCache
from weightkit.model.checkpoint_weights import WeightSizes
from weightkit.sizing.forms import quantized
from weightkit.units import human_bytes, human_seconds, parse_bytes

LAYERS, DENSE, EXPERTS, VOCAB = 3, 1, 96, 129280
QUICK = {"layers": 2, "dense": 1, "experts": 16, "vocab": 264}
PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class Row:
    """One run: a prompt by itself, then all of them in shared passes."""

    name: str
    alone: Generation
    together: list[Generation]
    prompt_bytes: int
    token_bytes: int
    peak_bytes: int

    @property
    def rate(self) -> float:
        """Bytes a second while the first prompt was read."""
        return self.prompt_bytes / self.alone.prefill_s

    def render(self) -> str:
        cache = self.alone.cache
        asked = max(1, cache.device_hits + cache.host_hits + cache.misses)
        hits = f"{cache.device_hits / asked:.0%} + {cache.host_hits / asked:.0%}"
        token_s = self.alone.decode_s / max(1, len(self.alone.token_ids) - 1)
        return (
            f"| {self.name} | {human_bytes(self.prompt_bytes)} | {self.alone.prefill_s:.2f} | {self.rate / 1e9:.2f} | "
            f"{human_bytes(self.token_bytes)} | {token_s:.3f} | {hits} | {human_bytes(self.peak_bytes)} |"
        )


class Watched(Runtime):
    """Notes how much was read when the first prompt was through."""

    prompt_bytes = 0

    def prefill(self, ids: Sequence[int], cache: LatentCache, *, progress: bool = False) -> torch.Tensor:
        logits = super().prefill(ids, cache, progress=progress)
        self.prompt_bytes = self.prompt_bytes or self.weights.bytes_read
        return logits


def run(name: str, path: Path, args: argparse.Namespace, **budgets: int | bool) -> Row:
    """Generate in one way, from cold files."""
    set_cache(path, "cold")
    prompts = [list(range(40 + 7 * n, 40 + 7 * n + args.prompt_tokens + n)) for n in range(args.prompts)]
    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with Watched(path, device=args.device, **budgets) as runtime:  # type: ignore[arg-type]
        runtime.eos_ids = frozenset()  # random weights stop at random
        alone = runtime.generate(prompts[0], max_new_tokens=args.new_tokens)
        token_bytes = (runtime.weights.bytes_read - runtime.prompt_bytes) // max(1, args.new_tokens - 1)
        kept = runtime.weights.kept_bytes
    with Runtime(path, device=args.device, **budgets) as several:  # type: ignore[arg-type]
        several.eos_ids = frozenset()  # opened anew: memory is divided once, and then for more tokens
        together = several.generate_many(prompts, max_new_tokens=args.new_tokens)
        peak = torch.cuda.max_memory_allocated() if on_gpu else max(kept, several.weights.kept_bytes)
    return Row(name, alone, together, runtime.prompt_bytes, token_bytes, peak)


def weight_files(path: Path) -> dict[str, int]:
    return {str(file): file.stat().st_size for file in sorted(path.glob("*.safetensors"))}


def read_all(path: Path, threads: int) -> float:
    """Bytes a second of reading all files once in large pieces, past the page cache."""
    files = weight_files(path)
    pieces = [(file, start) for file, size in files.items() for start in range(0, size, PIECE_BYTES)]
    started = time.perf_counter()
    with DirectReader() as reader, ThreadPoolExecutor(threads) as pool:

        def read(piece: tuple[str, int]) -> None:
            file, start = piece
            reader.read_range(file, start, np.empty(min(PIECE_BYTES, files[file] - start), np.uint8))

        list(pool.map(read, pieces))
    return sum(files.values()) / (time.perf_counter() - started)


def sizes_of(arch: Architecture) -> WeightSizes:
    """The sizes of a whole model, from its blueprint."""
    records = [record for record in blueprint(arch).values() if not record.mtp and not record.optional]
    experts = sum(record.size_bytes for record in records if record.role is Role.ROUTED_EXPERT)
    embedding = sum(record.size_bytes for record in records if record.role is Role.EMBEDDING)
    always = sum(record.size_bytes for record in records) - experts - embedding
    dense = 2 * sum(record.parameters for record in records)
    layers = arch.num_hidden_layers - arch.first_k_dense_replace
    return WeightSizes(always, experts, dense, layers, 0, 0, 0, 0, 2 * arch.hidden_size)


def project(rate: float, gpu_memory: int, host_memory: int) -> list[str]:
    """A table of what DeepSeek-V3 (671B) reads in each format, and how long that takes at ``rate``."""
    arch = Architecture.from_config(manifests.load("deepseek-v3").config)
    rows = [
        f"| 671B as | bytes | prompt of 1 token | of 1,000 | a new token | with {human_bytes(gpu_memory)} of GPU and "
        f"{human_bytes(host_memory)} of host memory |",
        "|---|---|---|---|---|---|",
    ]
    forms = {"fp8": arch, "bf16": replace(arch, quantization=None), "int4": quantized(arch, 128)}
    for name, form in forms.items():
        sizes = sizes_of(form)
        cells = [name, human_bytes(sizes.total)]
        for tokens, room in ((1, 0), (1000, 0), (0, 0), (0, gpu_memory + host_memory)):
            budget = Budget(room, 0, room, 0)
            plan = estimate(form, sizes, budget, [[max(1, tokens)]], dtype="bf16", device="cuda", is_streamed=True)
            needed = plan.prompt_bytes if tokens else plan.token_read_bytes
            cells.append(f"{human_bytes(needed)}, {human_seconds(needed / rate)}")
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def compare(rows: Sequence[Row]) -> list[str]:
    """What the runs differ in from the first; empty if in nothing."""
    wrong = []
    for row in rows[1:]:
        if row.alone.token_ids != rows[0].alone.token_ids:
            wrong.append(f"{row.name}: {row.alone.token_ids} is not {rows[0].alone.token_ids}")
        for number, (one, other) in enumerate(zip(row.together, rows[0].together, strict=True), start=1):
            if one.token_ids != other.token_ids:
                wrong.append(f"{row.name}, prompt {number} of several: {one.token_ids} is not {other.token_ids}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="where the checkpoint is, or is written")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--dense", type=int, default=DENSE)
    parser.add_argument("--experts", type=int, default=EXPERTS)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    parser.add_argument("--quick", action="store_true", help="a checkpoint of 2 GB")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--gpu-memory", type=parse_bytes, default=4 << 30)
    parser.add_argument("--host-memory", type=parse_bytes, default=2 << 30)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=8)
    args = parser.parse_args()
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args()
    if not weight_files(args.dir):
        shape = {"layers": args.layers, "dense": args.dense, "experts": args.experts, "vocab": args.vocab}
        write_checkpoint(args.dir, **shape, mtp=0, shard_bytes=int(4.3e9))
    size = sum(weight_files(args.dir).values())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and args.device != "cpu" else "cpu"
    print(f"{human_bytes(size)}, {device}, torch {torch.__version__}, {os.cpu_count()} cores\n", flush=True)
    rows = [run("all memory", args.dir, args)]
    low = {"gpu_memory": args.gpu_memory, "host_memory": args.host_memory, "jobs": args.jobs}
    name = f"{human_bytes(args.gpu_memory)} GPU, {human_bytes(args.host_memory)} host"
    rows.append(run(name if device != "cpu" else f"{human_bytes(args.host_memory)}", args.dir, args, **low))
    set_cache(args.dir, "cold")
    whole, places = read_all(args.dir, args.jobs), measure_read_rate(weight_files(args.dir), jobs=args.jobs)
    print(
        "| memory | prompt reads | s | GB/s | a token reads | s | experts on the device + host | most on the device |"
    )
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(row.render() for row in rows))
    how = "past the page cache" if places.direct else "through the page cache"
    in_order, at_random = f"{whole / 1e9:.2f} GB/s in order", f"{places.bytes_per_s / 1e9:.2f} at random places"
    print(f"\nPlain reads ({how}, {args.jobs} threads): {in_order}, {at_random}.")
    print(f"Streaming a prompt: {rows[1].rate / whole:.0%} of that in order.")
    budget = args.gpu_memory if device != "cpu" else args.host_memory
    print(f"Most on the device: {human_bytes(rows[1].peak_bytes)} of {human_bytes(budget)} allowed.\n")
    on_gpu = device != "cpu"  # a CPU computes more slowly than it reads
    rate = rows[1].rate if on_gpu else whole
    print(f"At {rate / 1e9:.2f} GB/s, {'the rate of streaming' if on_gpu else 'plain reads in order'}:\n")
    print("\n".join(project(rate, 80 * 10**9, 100 * 10**9)))
    wrong = compare(rows)
    if wrong or (device != "cpu" and rows[1].peak_bytes > budget):
        raise SystemExit("\n".join(["", *wrong]) or "the budget was not held to")
    print(f"\nSame tokens in all runs: {len(rows[0].alone.token_ids)} of one prompt, and of {args.prompts} together.")


if __name__ == "__main__":
    main()
