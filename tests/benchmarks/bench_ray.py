"""Measure writes by tasks of a Ray cluster beside threads of one process, and say what follows for several nodes.

    python tests/benchmarks/bench_ray.py --dir /data --gb 3 --rounds 3

A checkpoint of DeepSeek-V3's full width is written to ``--dir`` (random, about ``--gb``), then cast to BF16 and sharded
for 4 ranks by each contender in each round, in an order shuffled anew: 1, 2 and 4 threads, and clusters of one raylet
that gives 1, 2 and 4 CPUs. The input is read once before each run (``--cache warm``) or dropped from the page cache
(``--cache cold``); outputs are deleted. A cluster's workers have written a tiny checkpoint before, so that they are
started and have imported what they need: what that takes is measured apart, as is what a file costs that has next to
no bytes, and what is sent for a file of a trillion parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent / "cluster")]

import clusters  # noqa: E402
from full_width import write_checkpoint  # noqa: E402
from measured import set_cache  # noqa: E402
from sparse import write_known  # noqa: E402
from tiny import write_tiny  # noqa: E402

import weightkit as wk  # noqa: E402
from weightkit.checkpoint import Checkpoint  # noqa: E402
from weightkit.layouts import FileSet, lay_out_published  # noqa: E402
from weightkit.writer import make_plan  # noqa: E402

KINDS: dict[str, Callable[[Checkpoint], Checkpoint | FileSet]] = {
    "cast": lambda checkpoint: wk.cast(checkpoint, "bf16"),
    "shard": lambda checkpoint: wk.shard(checkpoint, mp=4),
}
WORKERS = (1, 2, 4)
#: An expert's three matrices at the real width, in FP8.
EXPERT_BYTES = 3 * 7168 * 2048
OTHER_BYTES = 830_000_000


@contextmanager
def cluster(cpus: int) -> Iterator[str]:
    """A cluster of one node, which this process has joined."""
    from weightkit.cluster.connection import connect

    with clusters.head(cpus) as address:
        ray = connect(address)
        try:
            yield address
        finally:
            ray.shutdown()  # before its cluster ends, or Ray ends this process


def one(source: Path, target: Path, kind: str, where: str, workers: int, cache: str, tiny: Path) -> dict[str, float]:
    """One run, in the process that is to be measured."""
    what = KINDS[kind](wk.open_checkpoint(source))
    warm = KINDS[kind](wk.open_checkpoint(tiny))
    if where == "threads":
        wk.write(warm, target / "tiny", jobs=workers, device="cpu", progress=False)
        set_cache(source, cache)
        written = wk.write(what, target / "out", jobs=workers, device="cpu", progress=False)
        return {"wall_s": written.wall_s, "bytes": written.read_bytes + written.size_bytes}
    began = time.monotonic()
    with cluster(workers) as address:
        started = time.monotonic()
        executor = wk.RayExecutor(address, jobs=workers, device="cpu")
        wk.write(warm, target / "tiny", executor=executor, progress=False)
        wk.write(warm, target / "again", executor=executor, progress=False)  # until all workers have had one
        ready = time.monotonic()
        set_cache(source, cache)
        written = wk.write(what, target / "out", executor=executor, progress=False)
    return {
        "wall_s": written.wall_s,
        "bytes": written.read_bytes + written.size_bytes,
        "cluster_s": started - began,
        "workers_s": ready - started,
    }


def run_one(arguments: list[str]) -> dict[str, float]:
    environment = clusters.environment() | {"RAY_DEDUP_LOGS_SKIP_REGEX": ".*"}
    del environment["OMP_NUM_THREADS"]
    done = subprocess.run(
        [sys.executable, __file__, "--one", *arguments], capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(source: Path, work: Path, tiny: Path, rounds: int, cache: str) -> None:
    results: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    contenders = [(kind, where, n) for kind in KINDS for where in ("threads", "ray") for n in WORKERS]
    for number in range(rounds):
        for kind, where, workers in random.sample(contenders, len(contenders)):
            target = work / "target"
            found = run_one([str(source), str(target), kind, where, str(workers), cache, str(tiny)])
            shutil.rmtree(target)
            results.setdefault((kind, where, workers), []).append(found)
            print(f"round {number + 1}: {kind} {where} {workers}: {found['wall_s']:.2f} s", file=sys.stderr, flush=True)
    print(f"\n{cache} cache, medians of {rounds}\n\n| | wall s (each round) | GB/s in and out |\n|---|---|---|")
    for kind, where, workers in contenders:
        runs = results[kind, where, workers]
        wall = statistics.median(run["wall_s"] for run in runs)
        each = ", ".join(f"{run['wall_s']:.1f}" for run in runs)
        print(f"| {kind}, {workers} {where} | **{wall:.2f}** ({each}) | {runs[0]['bytes'] / wall / 1e9:.2f} |")
    starts = [run for found in results.values() for run in found if "cluster_s" in run]
    for name in ("cluster_s", "workers_s"):
        print(f"\n{name}: median {statistics.median(run[name] for run in starts):.1f}")


def small_files(work: Path, count: int = 163) -> None:
    """What a file costs that has next to no bytes."""
    write_tiny(work / "many", shards=count)
    plan = wk.strip_mtp(wk.open_checkpoint(work / "many"))
    here = wk.write(plan, work / "here", jobs=2, progress=False)
    with cluster(2) as address:
        executor = wk.RayExecutor(address)
        wk.write(wk.strip_mtp(wk.open_checkpoint(work / "many")), work / "first", executor=executor, progress=False)
        there = wk.write(plan, work / "there", executor=executor, progress=False)
    for name, run in (("2 threads", here), ("2 workers", there)):
        print(f"\n{here.files} tiny files, {name}: {run.wall_s:.2f} s, {run.wall_s / run.files * 1e3:.1f} ms a file")
    for name in ("many", "here", "first", "there"):
        shutil.rmtree(work / name)


def orders(work: Path) -> None:
    """What is sent for each file of the largest models, without writing any."""
    from weightkit.cluster.filling import Place
    from weightkit.cluster.writing import _Writing, absolute

    class Stub:
        history: dict[str, object] = {}  # noqa: RUF012

        def __init__(self, plan: object) -> None:
            self.plan = plan

        def partial(self, file: object) -> Path:
            return work / "x"

    for name, kind in (("deepseek-v3", "cast"), ("deepseek-v3", "shard"), ("kimi-k2", "cast")):
        folder = work / name
        if not folder.exists():
            write_known(folder, name)
        began = time.monotonic()
        checkpoint = wk.open_checkpoint(folder)
        what = wk.strip_mtp(checkpoint) if kind == "shard" else checkpoint
        made = wk.shard(what, mp=8) if kind == "shard" else lay_out_published(wk.cast(what, "bf16"))
        plan = make_plan(made, work / "never")
        planned = time.monotonic()
        paths = {path: absolute(path) for path in plan.stamps}
        sizes = []
        for file in plan.files:
            errand = _Writing(Stub(plan), file, Place(work, "x"), paths)  # type: ignore[arg-type]
            sizes.append(len(pickle.dumps(errand.order("cpu"))))
        took = time.monotonic() - planned
        print(
            f"\n{name} {kind}: {len(plan.files)} files, {plan.tensors:,} tensors,"
            f" {plan.bytes_read / 1e9:.0f} GB in, {plan.bytes_written / 1e9:.0f} GB out;"
            f" planned in {planned - began:.1f} s; {sum(sizes) / 1e6:.1f} MB of orders,"
            f" {max(sizes) / 1e6:.2f} MB at most, made in {took:.1f} s"
        )
    for name in ("deepseek-v3", "kimi-k2"):
        shutil.rmtree(work / name)


def main() -> None:
    if "--one" in sys.argv:
        source, target, kind, where, workers, cache, tiny = sys.argv[2:]
        print(json.dumps(one(Path(source), Path(target), kind, where, int(workers), cache, Path(tiny))))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--dir", type=Path, required=True, help="a folder on the disk to measure")
    parser.add_argument("--gb", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", choices=["warm", "cold"], default="warm")
    parser.add_argument("--only", choices=["compare", "files", "orders"])
    args = parser.parse_args()
    os.environ.update({k: v for k, v in clusters.environment().items() if k.startswith("RAY_")})
    work = args.dir / "bench_ray"
    work.mkdir(parents=True)
    try:
        if args.only in (None, "orders"):
            orders(work)
        if args.only in (None, "files"):
            small_files(work)
        if args.only in (None, "compare"):
            experts = max(8, int((args.gb * 1e9 - OTHER_BYTES) / EXPERT_BYTES) // 8 * 8)
            shape = {"layers": 2, "dense": 1, "experts": experts, "vocab": 8192, "mtp": 0}
            size = write_checkpoint(work / "source", **shape, shard_bytes=int(args.gb * 1e9 / 8))
            write_tiny(work / "tiny", shards=8)
            print(f"\nsource: {size / 1e9:.2f} GB in {len(list((work / 'source').glob('*.safetensors')))} files")
            compare(work / "source", work, work / "tiny", args.rounds, args.cache)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
