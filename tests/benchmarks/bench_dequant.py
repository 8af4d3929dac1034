"""How fast FP8 blocks are dequantized and made, and int4 dequantized, beside the machine's own copy. Run by hand:

    python tests/benchmarks/bench_dequant.py [--sweep] [--peer DIR] [--cpu]

On a GPU: GB/s of memory traffic against a device copy of as many bytes in the same run. For FP8 3 bytes an element (1
read and 2 written, or the reverse), for int4 2.5 and scales, zeros and g_idx. Inputs and outputs are larger than the L2
cache or rotate through sets that together are; launches are replayed from a CUDA graph, so that the host's time is not
measured. ``--peer DIR`` measures ``weight_dequant`` of a folder with DeepSeek's ``inference/kernel.py`` in the same
run, and compares bits. ``--sweep`` tries tile shapes.

On a CPU (``--cpu``, or where there is no GPU): GB/s of FP8 read, one thread and all, beside plain torch; and GB/s of
BF16 made FP8, one thread.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from weightkit.kernels import gptq_format
from weightkit.kernels.fp8_dequant import DEFAULT_CONFIG, TileConfig, dequant, dequant_many, dequant_reference
from weightkit.kernels.fp8_quant import quantize

EXPERT_SHAPES = [(2048, 7168), (7168, 2048)]
STACK = 32
"""Experts in a stack: 470 MB of FP8, ten times an H200's L2."""

Rows = list[tuple[str, float, float]]
Peer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


# --- GPU --------------------------------------------------------------------------------------------------------------


def graph_seconds(launch: Callable[[], object], repeats: int = 15, bursts: int = 3) -> float:
    """Median seconds of a replay of what ``launch`` puts on the stream, in bursts a moment apart: all replays of one
    may fall into something that the machine does for some milliseconds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which may still be writing what is launched on
    with torch.cuda.stream(stream):
        launch()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        launch()
    times = []
    for _ in range(bursts):
        time.sleep(0.05)
        for _ in range(3):
            graph.replay()
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def eager_seconds(launch: Callable[[], object], repeats: int = 15) -> float:
    """Median seconds on the device of one long launch, made while the device still sleeps."""
    times = []
    for _ in range(3 + repeats):
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(20_000_000)  # about 10 ms, in which the host gets ahead
        start.record()
        launch()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times[3:])


def random_stack(count: int, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes without NaN, [E, M, N], and scales of the size that checkpoints have."""
    weight = torch.randint(0, 256, (count, rows, cols), dtype=torch.uint8, device="cuda")
    weight.masked_fill_((weight & 0x7F) == 0x7F, 0)
    scale = torch.rand(count, -(-rows // 128), -(-cols // 128), dtype=torch.float32, device="cuda") * 4e-4
    return weight, scale


def copy_ceiling() -> float:
    """GB/s of a device copy, read and written bytes counted, of as many bytes as a stack moves."""
    size_bytes = STACK * 2048 * 7168 * 3 // 2
    source = torch.empty(size_bytes, dtype=torch.uint8, device="cuda").fill_(1)
    target = torch.empty_like(source)
    return 2 * size_bytes / eager_seconds(lambda: target.copy_(source)) * 1e-9


def write_ceiling() -> float:
    """GB/s of zeros that are written, and nothing read."""
    target = torch.empty(STACK * 2048 * 7168, dtype=torch.int16, device="cuda")
    return target.numel() * 2 / eager_seconds(lambda: target.zero_()) * 1e-9


def stacked_rate(
    weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, config: TileConfig = DEFAULT_CONFIG
) -> float:
    traffic = weight.numel() * (1 + out.element_size())
    return traffic / graph_seconds(lambda: dequant(weight, scale, out.dtype, out=out, config=config)) * 1e-9


def bench_gpu(peer: Peer | None) -> Rows:
    ceiling = copy_ceiling()
    rows: Rows = [("device copy", ceiling, 1.0)]

    def add(name: str, rate: float) -> None:
        rows.append((name, rate, rate / ceiling))

    add("set to zero: written only", write_ceiling())
    for shape in EXPERT_SHAPES:
        name = f"{shape[0]}x{shape[1]}"
        weight, scale = random_stack(STACK, *shape)
        out = torch.empty(weight.shape, dtype=torch.bfloat16, device="cuda")
        traffic = weight.numel() * 3
        add(f"{STACK} x {name}, one launch", stacked_rate(weight, scale, out))

        def singly(weight: torch.Tensor = weight, scale: torch.Tensor = scale, out: torch.Tensor = out) -> None:
            for i in range(STACK):
                dequant(weight[i], scale[i], out=out[i])

        add(f"{name}, a launch each", traffic / graph_seconds(singly) * 1e-9)
        if peer is not None:
            add_peer(rows, ceiling, name, weight, scale, out, peer)
        for dtype in (torch.float16, torch.float32) if shape == EXPERT_SHAPES[0] else ():
            other = torch.empty(weight.shape, dtype=dtype, device="cuda")
            add(f"{STACK} x {name} to {dtype}", stacked_rate(weight, scale, other))
    add("a layer's list of mixed shapes, one launch", list_rate())
    for shape in EXPERT_SHAPES:
        name = f"{STACK} x {shape[0]}x{shape[1]}"
        came = dequant(*random_stack(STACK, *shape)).flatten(0, 1)
        add(f"BF16 to FP8: {name}, values that came from FP8", quantize_rate(came))
        add(f"BF16 to FP8: {name}, normal values", quantize_rate(came.normal_(std=0.02)))
        del came
        add(f"int4 to BF16: {name}, a launch each", int4_rate(*shape))
    return rows


def quantize_rate(values: torch.Tensor) -> float:
    codes = torch.empty(values.shape, dtype=torch.uint8, device="cuda")
    scales = torch.empty(-(-values.shape[0] // 128), -(-values.shape[1] // 128), device="cuda")
    seconds = graph_seconds(lambda: quantize(values, out=(codes, scales)))
    return values.numel() * (values.element_size() + 1) / seconds * 1e-9


def int4_rate(n: int, k: int, group_size: int = 128) -> float:
    """Random weights [N, K], in groups without activation order."""
    g_idx = (torch.arange(k, device="cuda") // group_size).int()
    weights = [
        (
            torch.randint(-(2**31), 2**31, (k // 8, n), device="cuda").int(),
            torch.randint(-(2**31), 2**31, (k // group_size, n // 8), device="cuda").int(),
            (torch.rand(k // group_size, n, device="cuda") * 0.01).half(),
            g_idx,
        )
        for _ in range(STACK)
    ]
    outs = [torch.empty((n, k), dtype=torch.bfloat16, device="cuda") for _ in weights]

    def launch() -> None:
        for weight, out in zip(weights, outs, strict=True):
            gptq_format.dequant(*weight, out=out)

    operands = sum(part.numel() * part.element_size() for part in weights[0])
    return STACK * (operands + n * k * 2) / graph_seconds(launch) * 1e-9


def add_peer(
    rows: Rows, ceiling: float, name: str, weight: torch.Tensor, scale: torch.Tensor, out: torch.Tensor, peer: Peer
) -> None:
    codes = weight.view(torch.float8_e4m3fn)
    flat, flat_scale = codes.flatten(0, 1), scale.flatten(0, 1)
    traffic = weight.numel() * 3
    with default_dtype(torch.bfloat16):
        rate = traffic / graph_seconds(lambda: peer(flat, flat_scale)) * 1e-9
        rows.append((f"peer: {STACK} x {name}, one launch", rate, rate / ceiling))
        rate = traffic / graph_seconds(lambda: [peer(codes[i], scale[i]) for i in range(STACK)]) * 1e-9
        rows.append((f"peer: {name}, a launch each", rate, rate / ceiling))
        same = torch.equal(
            peer(flat, flat_scale).view(torch.int16), dequant(weight, scale, out=out).flatten(0, 1).view(torch.int16)
        )
    print(f"{name}: bits equal the peer's: {same}")


def list_rate() -> float:
    """Attention, shared and 24 routed experts of one layer, as separate tensors."""
    shapes = [(1536, 7168), (24576, 1536), (576, 7168), (32768, 512), (7168, 16384), *EXPERT_SHAPES * 24]
    pairs = [random_stack(1, *shape) for shape in shapes]
    weights, scales = [weight[0] for weight, _ in pairs], [scale[0] for _, scale in pairs]
    outs = [torch.empty(weight.shape, dtype=torch.bfloat16, device="cuda") for weight in weights]
    # The table of addresses is copied from the host, which a graph cannot hold.
    seconds = eager_seconds(lambda: dequant_many(weights, scales, outs=outs))
    return sum(weight.numel() for weight in weights) * 3 / seconds * 1e-9


def sweep() -> None:
    """Tile shapes first, then the switches for the three best."""
    stacks = [random_stack(STACK, *shape) for shape in EXPERT_SHAPES]
    outs = [torch.empty(weight.shape, dtype=torch.bfloat16, device="cuda") for weight, _ in stacks]

    def measure(config: TileConfig) -> list[float]:
        return [stacked_rate(*stack, out, config) for stack, out in zip(stacks, outs, strict=True)]

    shapes = [
        TileConfig(rows=rows, col_blocks=col_blocks, num_warps=warps)
        for rows in (4, 8, 16, 32, 64, 128)
        for col_blocks in (1, 2, 4, 8, 16)
        for warps in (4, 8)
        if 32 <= rows * col_blocks * 128 // (warps * 32) <= 128 and (rows <= 32 or col_blocks <= 2)
    ]
    results = {config: measure(config) for config in shapes}
    best = sorted(results, key=lambda config: -min(results[config]))[:3]
    switches = ({"wide_loads": True}, {"streaming": False}, {"wide_loads": True, "streaming": False})
    for config in best:
        for switch in switches:
            changed = replace(config, **switch)  # type: ignore[arg-type]
            results[changed] = measure(changed)
    print("\n| rows | col_blocks | num_warps | switches | " + " | ".join(f"{m}x{n}" for m, n in EXPERT_SHAPES) + " |")
    print("|" + "---|" * (4 + len(EXPERT_SHAPES)))
    for config, rates in sorted(results.items(), key=lambda item: -min(item[1])):
        names = ("wide_loads", "streaming", "hardware_rounding")
        changed_names = [n for n in names if getattr(config, n) != getattr(TileConfig(), n)]
        figures = " | ".join(f"{rate:.0f}" for rate in rates)
        print(f"| {config.rows} | {config.col_blocks} | {config.num_warps} | {', '.join(changed_names)} | {figures} |")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def load_peer(folder: Path) -> Peer:
    spec = importlib.util.spec_from_file_location("peer_kernel", folder / "kernel.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{folder}: no kernel.py")
    module = sys.modules["peer_kernel"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    peer: Peer = module.weight_dequant
    return peer


# --- CPU --------------------------------------------------------------------------------------------------------------


def bench_cpu(jobs: int) -> Rows:
    """GB/s of FP8; the ratio is to the copy of that many bytes there and back again, on one thread."""
    from weightkit.kernels.fp8_dequant_cpu import dequant_cpu

    torch.set_num_threads(1)
    rows: Rows = []
    for m, n in EXPERT_SHAPES:
        random = np.random.default_rng(0)
        weight = random.integers(0, 256, (m, n), dtype=np.uint8)
        scale = random.random((m // 128, n // 128), dtype=np.float32) * np.float32(4e-4)
        copy, outs = (
            np.empty_like(weight),
            {d: np.empty((m, n), u) for d, u in (("BF16", "u2"), ("F16", "u2"), ("F32", "u4"))},
        )
        codes, factors = torch.from_numpy(weight), torch.from_numpy(scale)

        def strips(weight=weight, scale=scale, out=outs["BF16"]) -> None:  # type: ignore[no-untyped-def]
            step = -(-weight.shape[0] // (jobs * 128)) * 128
            with ThreadPoolExecutor(jobs) as pool:
                for first in range(0, weight.shape[0], step):
                    strip = slice(first, first + step)
                    pool.submit(dequant_cpu, weight[strip], scale, out[strip], dtype="BF16", first_row=first)

        cases: list[tuple[str, Callable[[], object], int]] = [
            ("two copies of the input", lambda w=weight, c=copy: (np.copyto(c, w), np.copyto(c, w)), 9),
            *[
                (f"weightkit to {d}", lambda w=weight, s=scale, o=o, d=d: dequant_cpu(w, s, o, dtype=d), 15)
                for d, o in outs.items()
            ],
            (f"weightkit to BF16, {jobs} threads", strips, 15),
            ("torch, plain", lambda c=codes, f=factors: plain_torch(c, f), 3),
        ]
        ceiling = 0.0
        for name, run, repeats in cases:
            best, median = host_seconds(run, repeats)
            ceiling = ceiling or weight.size / best
            print(
                f"{m}x{n} {name}: best {weight.size / best * 1e-9:.2f}, median {weight.size / median * 1e-9:.2f} GB/s"
            )
            rows.append((f"{m}x{n} {name}", weight.size / median * 1e-9, weight.size / median / ceiling))
        same = bool((outs["BF16"].view(np.int16) == dequant_reference(codes, factors).view(torch.int16).numpy()).all())
        print(f"{m}x{n}: bits equal the reference's: {same}")
    return rows


def bench_quantize_cpu() -> Rows:
    """GB/s of BF16 made FP8 on one thread; the ratio is to a copy of it."""
    from weightkit.kernels.fp8_quant_cpu import quantize_cpu

    rows: Rows = []
    for m, n in EXPERT_SHAPES:
        normal = torch.randn(m, n, generator=torch.Generator().manual_seed(0)) * 0.02
        blocks = normal.view(m // 128, 128, n // 128, 128)
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        came = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
        out = np.empty((m, n), np.uint8)
        for name, values in (("normal values", normal), ("values that came from FP8", came.view(m, n))):
            raw = values.bfloat16().view(torch.uint8).numpy().reshape(-1)
            copy = np.empty_like(raw)
            copied = raw.size / host_seconds(lambda raw=raw, copy=copy: np.copyto(copy, raw), 9)[1] * 1e-9
            for power_of_two in (False, True):

                def run(raw=raw, out=out, shape=(m, n), power=power_of_two) -> None:  # type: ignore[no-untyped-def]
                    quantize_cpu(raw, shape, "BF16", power_of_two=power, out=out)

                rate = raw.size / host_seconds(run, 15)[1] * 1e-9
                kind = ", scales powers of two" if power_of_two else ""
                rows.append((f"BF16 to FP8: {m}x{n}, {name}{kind}", rate, rate / copied))
    return rows


def plain_torch(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    factor = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (codes.view(torch.float8_e4m3fn).to(torch.float32) * factor).to(torch.bfloat16)


def host_seconds(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Best and median; a run before them is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times), statistics.median(times)


# --- report -----------------------------------------------------------------------------------------------------------


def print_machine() -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    print(f"{device}; {platform.machine()}, {os.cpu_count()} CPUs; Python {platform.python_version()}")
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "triton", "numba", "numpy")))


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def print_table(rows: Rows, unit: str) -> None:
    print(f"\n| | {unit} | of the copy |\n|---|---|---|")
    for name, rate, ratio in rows:
        print(f"| {name} | {rate:.2f} | {ratio:.2f} |" if rate < 100 else f"| {name} | {rate:.0f} | {ratio:.3f} |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="try tile shapes on the GPU")
    parser.add_argument("--peer", type=Path, metavar="DIR", help="folder with DeepSeek's inference/kernel.py")
    parser.add_argument("--cpu", action="store_true", help="measure the CPU even where there is a GPU")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="threads on the CPU")
    options = parser.parse_args(arguments)
    print_machine()
    if torch.cuda.is_available():
        print_table(bench_gpu(load_peer(options.peer) if options.peer else None), "GB/s, read + written")
        if options.sweep:
            sweep()
    if options.cpu or not torch.cuda.is_available():
        print_table(bench_cpu(options.jobs), "GB/s of FP8 (median)")
        print_table(bench_quantize_cpu(), "GB/s of BF16, one thread (median)")


if __name__ == "__main__":
    main()
