"""Products with int4 and FP8 weights as they are stored, beside BF16 and what the machine allows. By hand, on a GPU:

    python tests/benchmarks/bench_gemm.py            # the table, under 100 s
    python tests/benchmarks/bench_gemm.py --sweep    # tile shapes instead, the best of each case

Shapes [N, K] are DeepSeek-V3's: an expert's gate (or up) and down, a dense layer's gate, o_proj, q_b_proj, lm_head.
Contenders give [T, N] of the same x [T, K] BF16:

- ``bf16``: ``F.linear`` with the dequantized weight; ``int4``, ``fp8``: ours, as they choose their own tiles
- ``int4 + bf16``, ``fp8 + bf16``: dequantized to memory by ours, then ``F.linear``

A run is timed by events around launches that were queued before it began; the L2 is overwritten before each. The
ceiling is the larger of two times: the bytes that must move (weight as stored, x, output; for ``+ bf16`` too, although
that moves more) over a device copy's rate, and 2 T N K over the rate of a large BF16 product, both measured here.
GB/s and TFLOP/s count the same bytes and operations.

The last table is a token's experts: 8 of them with one row each, in one launch, in one for each, and in BF16.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch.nn.functional import linear

from weightkit.kernels import fp8_dequant, fp8_gemm, int4_gemm
from weightkit.kernels.gemm_plan import TileConfig

SHAPES = [(2048, 7168), (7168, 2048), (18432, 7168), (7168, 16384), (24576, 1536), (129280, 7168)]
TOKENS = [1, 4, 16, 64, 4096]
KERNELS = ["int4", "fp8"]
SWEEP_SHAPES = [(2048, 7168), (7168, 2048), (7168, 16384)]
GROUP = 128
EXPERTS = 8
FLUSH_BYTES = 256 << 20  # several times any L2
COMPILERS = 12
"""Processes that compile at the same time; what they compile lies in Triton's cache on disk."""

Launch = Callable[[], object]


# --- measuring --------------------------------------------------------------------------------------------------------


class Timer:
    """Median seconds on the device, caches cold."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, launch: Launch, repeats: int = 11, *, sleep_cycles: int = 2_000_000) -> float:
        launch()  # compiles
        times = []
        for _ in range(2 + repeats):
            torch.cuda.synchronize()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.flush.zero_()
            torch.cuda._sleep(sleep_cycles)  # about 1 ms, in which the host gets ahead
            start.record()
            launch()
            end.record()
            end.synchronize()
            times.append(float(start.elapsed_time(end)) * 1e-3)
        return statistics.median(times[2:])


@dataclass(frozen=True)
class Ceilings:
    """Bytes and operations a second."""

    copy: float
    bf16: float

    @classmethod
    def measured(cls, timer: Timer) -> Ceilings:
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").fill_(1)
        copy = 2 * source.numel() / timer(partial(torch.empty_like(source).copy_, source))
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        bf16 = 2.0 * 8192**3 / timer(lambda: a @ b.T)
        return cls(copy, bf16)

    def seconds(self, size_bytes: float, operations: float) -> float:
        return max(size_bytes / self.copy, operations / self.bf16)


# --- operands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """One matrix [N, K] in the three forms."""

    qweight: torch.Tensor
    scales: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    bf16: torch.Tensor

    @classmethod
    def random(cls, n: int, k: int) -> Weights:
        qweight = torch.randint(-(2**31), 2**31, (k // 8, n), dtype=torch.int32, device="cuda")
        scales = (torch.rand(k // GROUP, n, device="cuda") * 4e-3).half()
        codes = torch.randint(0, 256, (n, k), dtype=torch.uint8, device="cuda")
        codes.masked_fill_((codes & 0x7F) == 0x7F, 0)
        scale = torch.rand(-(-n // 128), k // 128, device="cuda") * 4e-4
        return cls(qweight, scales, codes, scale, fp8_dequant.dequant(codes, scale, torch.bfloat16))

    def launches(self, x: torch.Tensor) -> dict[str, tuple[Launch, int]]:
        """Name -> what to run, and the bytes of the weight that it must read."""
        return {
            "bf16": (lambda: linear(x, self.bf16), _size(self.bf16)),
            "int4": (lambda: int4_gemm.int4_linear(x, self.qweight, self.scales, group_size=GROUP), self.int4_bytes),
            "int4 + bf16": (
                lambda: linear(x, int4_gemm._dequantized(self.qweight, self.scales, GROUP, 4, 8)),
                self.int4_bytes,
            ),
            "fp8": (lambda: fp8_gemm.fp8_linear(x, self.codes, self.scale), self.fp8_bytes),
            "fp8 + bf16": (
                lambda: linear(x, fp8_dequant.dequant(self.codes, self.scale, torch.bfloat16)),
                self.fp8_bytes,
            ),
        }

    def run(self, kernel: str, x: torch.Tensor, config: TileConfig) -> object:
        """One of ours with these tiles."""
        if kernel == "int4":
            return int4_gemm.int4_linear(x, self.qweight, self.scales, group_size=GROUP, config=config)
        return fp8_gemm.fp8_linear(x, self.codes, self.scale, config=config)

    @property
    def int4_bytes(self) -> int:
        return _size(self.qweight) + _size(self.scales)

    @property
    def fp8_bytes(self) -> int:
        return _size(self.codes) + _size(self.scale)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def activations(tokens: int, k: int) -> torch.Tensor:
    return torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)


def choose(kernel: str, tokens: int) -> TileConfig:
    chosen = {"int4": int4_gemm.choose_config, "fp8": fp8_gemm.choose_config}[kernel]
    return chosen(tokens)


# --- compiling --------------------------------------------------------------------------------------------------------

Case = tuple[str, int, TileConfig | None]


def compile_cases(cases: Sequence[Case]) -> None:
    """Compile what ``cases`` (kernel, tokens, config) need, in several processes, into the cache that all share."""
    started = time.perf_counter()
    workers = min(COMPILERS, os.cpu_count() or 1, max(1, len(cases) // 2))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        failed = [error for error in pool.map(_compile_one, cases, chunksize=1) if error]
    print(f"{len(cases)} cases compiled by {workers} processes in {time.perf_counter() - started:.0f} s")
    for error in failed:
        print(f"does not compile: {error}")


_compiler_weights: dict[tuple[int, int], Weights] = {}


def _compile_one(case: Case) -> str:
    """What went wrong. A kernel is the same for all shapes but for whether it writes parts of a sum or the result."""
    kernel, tokens, config = case
    shapes = [(256, 8192), (256, 256)]
    try:
        for shape in shapes:
            weights = _compiler_weights.setdefault(shape, Weights.random(*shape))
            weights.run(kernel, activations(tokens, shape[1]), config or choose(kernel, tokens))
        torch.cuda.synchronize()
    except Exception as error:
        return f"{case}: {type(error).__name__}: {str(error)[:200]}"
    return ""


# --- the tables -------------------------------------------------------------------------------------------------------


def bench(timer: Timer, ceilings: Ceilings) -> None:
    compile_cases([(kernel, tokens, None) for kernel in KERNELS for tokens in TOKENS])
    print(
        "\n| N x K | T | | us | GB/s | TFLOP/s | of the ceiling | of bf16's time |\n|---|---|---|---|---|---|---|---|"
    )
    for n, k in SHAPES:
        weights = Weights.random(n, k)
        for tokens in TOKENS:
            print_case(timer, ceilings, weights, activations(tokens, k))
        del weights
    print()
    bench_experts(timer, ceilings)


def print_case(timer: Timer, ceilings: Ceilings, weights: Weights, x: torch.Tensor) -> None:
    tokens, (n, k) = len(x), weights.bf16.shape
    reference_s = 0.0
    for name, (launch, weight_bytes) in weights.launches(x).items():
        seconds = timer(launch, 5 if tokens * n * k > 1e12 else 11)
        reference_s = reference_s or seconds
        size_bytes, operations = weight_bytes + 2 * tokens * (n + k), 2.0 * tokens * n * k
        print(
            f"| {n} x {k} | {tokens} | {name} | {seconds * 1e6:.1f} | {size_bytes / seconds * 1e-9:.0f} | "
            f"{operations / seconds * 1e-12:.1f} | {ceilings.seconds(size_bytes, operations) / seconds:.2f} | "
            f"{seconds / reference_s:.2f} |",
            flush=True,
        )


def bench_experts(timer: Timer, ceilings: Ceilings) -> None:
    """8 experts with a token each: gate and up, then down."""
    print(f"| {EXPERTS} experts, a row each | | us | GB/s | of the ceiling |\n|---|---|---|---|---|")
    for label, matrices, (n, k) in [("gate and up", 2 * EXPERTS, (2048, 7168)), ("down", EXPERTS, (7168, 2048))]:
        weights = [Weights.random(n, k) for _ in range(matrices)]
        x = activations(EXPERTS, k)
        for name, launch, size_bytes in expert_cases(weights, x):
            seconds = timer(launch, sleep_cycles=20_000_000)
            size_bytes += 2 * EXPERTS * k + 2 * matrices * n
            print(
                f"| {label} | {name} | {seconds * 1e6:.1f} | {size_bytes / seconds * 1e-9:.0f} | "
                f"{size_bytes / ceilings.copy / seconds:.2f} |",
                flush=True,
            )


def expert_cases(weights: list[Weights], x: torch.Tensor) -> Iterator[tuple[str, Launch, int]]:
    starts, counts = [i % EXPERTS for i in range(len(weights))], [1] * len(weights)
    rows = [x[start : start + 1] for start in starts]
    qweights, scales = [w.qweight for w in weights], [w.scales for w in weights]
    codes, factors = [w.codes for w in weights], [w.scale for w in weights]
    int4_bytes, fp8_bytes = sum(w.int4_bytes for w in weights), sum(w.fp8_bytes for w in weights)

    def each(run: Callable[[Weights, torch.Tensor], object]) -> Launch:
        return lambda: [run(w, row) for w, row in zip(weights, rows, strict=True)]

    yield "bf16, each", each(lambda w, row: linear(row, w.bf16)), sum(_size(w.bf16) for w in weights)
    yield (
        "int4, one launch",
        lambda: int4_gemm.int4_experts(x, qweights, scales, counts, starts=starts, group_size=GROUP),
        int4_bytes,
    )
    yield (
        "int4, each",
        each(lambda w, row: int4_gemm.int4_linear(row, w.qweight, w.scales, group_size=GROUP)),
        int4_bytes,
    )
    yield (
        "fp8, one launch",
        lambda: fp8_gemm.fp8_experts(x, codes, factors, counts, starts=starts),
        fp8_bytes,
    )
    yield "fp8, each", each(lambda w, row: fp8_gemm.fp8_linear(row, w.codes, w.scale)), fp8_bytes


# --- the sweep --------------------------------------------------------------------------------------------------------


def sweep_configs(kernel: str, tokens: int) -> list[TileConfig]:
    """Tiles worth trying; ours by default is the first."""
    depths = {"int4": (16, 32), "fp8": (64, 128)}[kernel]
    found = [choose(kernel, tokens)]
    if tokens <= 32:
        rows = max(16, tokens)
        for columns, depth, stages in product((32, 64, 128), depths, (3, 4, 6)):
            found.append(TileConfig(rows, columns, depth, num_stages=stages))
        found += [TileConfig(rows, 64, depth, num_stages=4, weights_left=True) for depth in depths]
        found += [replace(found[0], splits=splits) for splits in (2, 4, 8, 16, 32)]
    elif tokens <= 64:
        for columns, depth, left in product((64, 128), depths, (False, True)):
            found += [TileConfig(64, columns, depth, num_stages=stages, weights_left=left) for stages in (3, 4)]
        found += [TileConfig(32, columns, depths[0], num_stages=4) for columns in (64, 128)]
        found += [replace(found[0], splits=splits) for splits in (1, 2, 4, 8)]
    else:
        widest = {"int4": 256, "fp8": 128}[kernel]
        for rows, columns, warps, stages in product((128, 256), (64, 128, 256), (4, 8), (3, 4)):
            if columns <= widest and 8192 <= rows * columns <= 32768:
                for depth in depths:
                    found.append(TileConfig(rows, columns, depth, 1, warps, stages, weights_left=True))
    return list(dict.fromkeys(found))


def sweep(timer: Timer, ceilings: Ceilings, only: Sequence[str], token_counts: Sequence[int]) -> None:
    cases = [
        (kernel, tokens, config)
        for kernel in only
        for tokens in token_counts
        for config in sweep_configs(kernel, tokens)
    ]
    compile_cases(cases)
    print("\n| N x K | T | kernel | tiles | us | of the ceiling |\n|---|---|---|---|---|---|")
    for n, k in SWEEP_SHAPES:
        weights = Weights.random(n, k)
        for kernel, tokens in product(only, token_counts):
            x = activations(tokens, k)
            weight_bytes = weights.int4_bytes if kernel == "int4" else weights.fp8_bytes
            least = ceilings.seconds(weight_bytes + 2 * tokens * (n + k), 2.0 * tokens * n * k)
            times: dict[TileConfig, float] = {}
            for config in sweep_configs(kernel, tokens):
                try:
                    times[config] = timer(partial(weights.run, kernel, x, config), 5)
                except Exception as error:  # a tile that a device cannot hold
                    print(f"{kernel} {config}: {type(error).__name__}: {str(error)[:100]}")
            ranked = sorted(times.items(), key=lambda item: item[1])
            default = choose(kernel, tokens)
            shown = ranked[:3] + [item for item in ranked[3:] if item[0] == default]
            for config, seconds in shown:
                name = describe(config) + (" (default)" if config == default else "")
                print(f"| {n} x {k} | {tokens} | {kernel} | {name} | {seconds * 1e6:.1f} | {least / seconds:.2f} |")


def describe(config: TileConfig) -> str:
    side = "left" if config.weights_left else "right"
    return (
        f"tokens {config.tokens}, columns {config.columns}, depth {config.depth}, splits {config.splits or 'auto'}, "
        f"warps {config.num_warps}, stages {config.num_stages}, weights {side}"
    )


# --- report -----------------------------------------------------------------------------------------------------------


def print_machine(ceilings: Ceilings) -> None:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "triton"))
    print(f"{torch.cuda.get_device_name()}; {versions}; Python {platform.python_version()}")
    print(f"copy {ceilings.copy * 1e-9:.0f} GB/s (read and written), BF16 product {ceilings.bf16 * 1e-12:.0f} TFLOP/s")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="try tile shapes, and print the best three of each case")
    parser.add_argument("--kernels", default=",".join(KERNELS), help="which to sweep (default: %(default)s)")
    parser.add_argument("--tokens", default="1,16,64,4096", help="token counts to sweep (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("bench_gemm.py needs a GPU")
    timer = Timer()
    ceilings = Ceilings.measured(timer)
    print_machine(ceilings)
    if options.sweep:
        sweep(timer, ceilings, options.kernels.split(","), [int(count) for count in options.tokens.split(",")])
    else:
        bench(timer, ceilings)


if __name__ == "__main__":
    main()
