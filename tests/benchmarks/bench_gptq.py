"""One expert of DeepSeek-V3, from its tokens to packed integers: weightkit, the textbook's loop, and a peer if named.

Weights are random, inputs correlated with columns of very different size. Every contender gets the same tokens and
weights; the errors are ||X (W - Q)|| / ||X W|| over all tokens, of what would be stored.

    python tests/benchmarks/bench_gptq.py
    python tests/benchmarks/bench_gptq.py --peer PEER.py   # a module with gptqmodel_solve(weight, rows, ...)
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import triton

from weightkit.kernels import gptq_solve
from weightkit.quantization.clock import Clock
from weightkit.quantization.packed import Packed
from weightkit.quantization.settings import Settings
from weightkit.quantization.solver import Hessian, Solver

HIDDEN, INTER, GROUP, BITS = 7168, 2048, 128, 4
DAMPING = 0.01


def inputs(tokens: int, width: int, seed: int) -> torch.Tensor:
    """[tokens, width] BF16: mixed columns, log-normal in size."""
    generator = torch.Generator("cuda").manual_seed(seed)
    mix = torch.randn(width, width, device="cuda", generator=generator) / width**0.5 * 0.6
    mix += torch.eye(width, device="cuda")
    size = torch.exp(0.8 * torch.randn(width, device="cuda", generator=generator))
    return (torch.randn(tokens, width, device="cuda", generator=generator) @ mix * size).bfloat16()


def error(x: torch.Tensor, weight: torch.Tensor, stored: torch.Tensor) -> float:
    """Relative output error of ``stored`` [N, K] in place of ``weight``."""
    off, whole = 0.0, 0.0
    for rows in x.split(8192):
        rows = rows.float()
        off += float((rows @ (weight - stored).T).square().sum())
        whole += float((rows @ weight.T).square().sum())
    return (off / whole) ** 0.5


def ours(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, settings: Settings) -> dict:
    """What ``weightkit.quantization.layer`` does for an expert; stages in milliseconds, and the stored weights."""
    clock = Clock(x.device)
    solver = Solver(settings, clock)

    def solve(names: list[str], weights: list[torch.Tensor], rows: torch.Tensor) -> list[torch.Tensor]:
        hessian = Hessian(rows.shape[1], len(rows), rows.device)
        with clock.stage("hessian"):
            hessian.add(rows)
        solved = solver.solve(names, weights, hessian)
        with clock.stage("pack"):
            packed = [Packed.of(s.codes, s.scales, group_size=GROUP, bits=BITS) for s in solved]
        return [part.weight(torch.bfloat16) for part in packed]

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    first = solve(["gate", "up"], [gate, up], x)
    with clock.stage("inner"):
        inner = torch.nn.functional.silu(x @ first[0].T, inplace=True).mul_(x @ first[1].T)
    last = solve(["down"], [down], inner)
    end.record()
    stages = {name: 1000 * seconds for name, seconds in clock.seconds().items()}
    return {"total": begin.elapsed_time(end), "stages": stages, "weights": [*first, *last], "inner": inner}


def textbook(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[N, K] F32: GPTQ as its paper's code goes about it, a column at a time, without act-order."""
    n, k = weight.shape
    hessian = torch.zeros(k, k, device=x.device)
    for rows in x.split(8192):
        hessian.addmm_(rows.float().T, rows.float())
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    spread = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    left, stored = weight.clone(), torch.empty_like(weight)
    for start in range(0, k, 128):
        end = min(start + 128, k)
        errors = torch.zeros(n, end - start, device=x.device)
        for i in range(start, end):
            if i % GROUP == 0:
                scale = (left[:, i : i + GROUP].abs().amax(dim=1) * (2 / 15)).half().float()
            code = torch.clamp(torch.round(left[:, i] / scale) + 8, 0, 15)
            stored[:, i] = (code - 8) * scale
            wrong = (left[:, i] - stored[:, i]) / spread[i, i]
            left[:, i:end] -= wrong[:, None] * spread[i, i:end]
            errors[:, i - start] = wrong
        left[:, end:] -= errors @ spread[start:end, end:]
    return stored


def timed(work: Callable[[], object]) -> tuple[float, object]:
    """Milliseconds of the device, and the result."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    result = work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end), result


def load_peer(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("peer", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["peer"] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantize one expert, by several means.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[65536, 8192])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--no-textbook", action="store_true")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    peer = load_peer(args.peer) if args.peer else None
    if peer is not None:
        print("peer:", peer.prepare())
    generator = torch.Generator("cuda").manual_seed(7)
    gate, up, down = (
        torch.randn(shape, device="cuda", generator=generator) * 0.02
        for shape in ((INTER, HIDDEN), (INTER, HIDDEN), (HIDDEN, INTER))
    )
    for tokens in args.tokens:
        x = inputs(tokens, HIDDEN, seed=tokens)
        print(
            f"\n== {tokens:,} tokens; gate, up {INTER} x {HIDDEN}, down {HIDDEN} x {INTER}, int4 in groups of {GROUP}"
        )
        for settings in (Settings(), Settings(scales="largest"), Settings(scales="largest", order="none")):
            ours(x, gate, up, down, settings)
            runs = [ours(x, gate, up, down, settings) for _ in range(args.repeat)]
            total = statistics.median(run["total"] for run in runs)
            stages = {name: statistics.median(run["stages"][name] for run in runs) for name in runs[0]["stages"]}
            inner, weights = runs[0]["inner"], runs[0]["weights"]
            losses = [error(x, gate, weights[0].float()), error(x, up, weights[1].float())]
            losses.append(error(inner, down, weights[2].float()))
            print(f"weightkit, scales {settings.scales}, order {settings.order}: {total:.1f} ms an expert")
            print("   ", ", ".join(f"{name} {value:.2f}" for name, value in stages.items()))
            print(f"    errors: gate {losses[0]:.5f}, up {losses[1]:.5f}, down {losses[2]:.5f}")
        grid = {"group_size": GROUP, "bits": BITS}
        scales = gptq_solve.largest_scales(gate.T.contiguous(), **grid)
        rounded = gptq_solve.values(gptq_solve.round_to_nearest(gate.T.contiguous(), scales, **grid), scales, **grid)
        print(f"rounding to nearest: gate {error(x, gate, rounded.T):.5f}")
        if peer is not None:
            for order in (False, True):
                options = {"group_size": GROUP, "bits": BITS, "damp": DAMPING, "act_order": order}
                peer.gptqmodel_solve_shared([down], inner, **options)
                results = peer.gptqmodel_solve_shared([gate, up], x, **options)
                results += peer.gptqmodel_solve_shared([down], inner, **options)
                total = 1000 * sum(sum(result.seconds.values()) for result in results)
                print(f"peer, act-order {order}: {total:.1f} ms an expert, the Hessian of gate and up made once")
                for name, weight, rows, result in zip(
                    ("gate", "up", "down"), (gate, up, down), (x, x, inner), results, strict=True
                ):
                    stages = ", ".join(f"{key} {1000 * value:.1f}" for key, value in result.seconds.items())
                    print(f"    {name}: {stages} ms; error {error(rows, weight, result.dequantized.float()):.5f}")
        if not args.no_textbook:
            total = 0.0
            for name, weight, rows in (("gate", gate, x), ("up", up, x), ("down", down, inner)):
                spent, stored = timed(lambda weight=weight, rows=rows: textbook(weight, rows))
                total += spent
                print(f"textbook: {name} {spent:.0f} ms, error {error(rows, weight, stored):.5f}")
            print(f"textbook: {total:.0f} ms an expert")


if __name__ == "__main__":
    main()
