"""SHA-256 of several files at once: hashlib on a thread each, and ours, which hashes two on one core.

    python tests/benchmarks/bench_hash.py --files 1 2 3 4 8

Each file is a buffer of 4 MiB in memory, taken in ``--pieces`` times by a thread of its own; all digests are compared.
GB/s of all files together, and bytes a second of CPU time, medians of ``--rounds`` in turn.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import threading
import time
from collections.abc import Callable

import numpy as np

from weightkit.kernels.sha256_x86 import compiled
from weightkit.measure.bench import cpu_name
from weightkit.sha256 import Digest, Pairable

PIECE_BYTES = 4 << 20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--pieces", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    code = compiled()
    if code is None:
        raise SystemExit("this processor has no SHA instructions: hashlib is all there is")
    kinds: dict[str, Callable[[], Digest]] = {"hashlib": hashlib.sha256, "ours": lambda: Pairable(code)}
    print(f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}\n")
    print(
        "| files | hashlib GB/s | ours GB/s | ratio | hashlib GB a CPU s | ours GB a CPU s |\n|---|---|---|---|---|---|"
    )
    for files in args.files:
        pieces = [np.random.default_rng(number).integers(0, 256, PIECE_BYTES, np.uint8) for number in range(files)]
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
        for _ in range(args.rounds):
            digests = []
            for name, kind in kinds.items():
                found, wall_s, cpu_s = hash_all(kind, pieces, args.pieces)
                runs[name].append((wall_s, cpu_s))
                digests.append(found)
            if digests[0] != digests[1]:
                raise SystemExit("the digests differ")
        size = files * args.pieces * PIECE_BYTES / 1e9
        theirs, ours = ([size / statistics.median(times) for times in zip(*runs[name], strict=True)] for name in kinds)
        print(
            f"| {files} | {theirs[0]:.2f} | {ours[0]:.2f} | {ours[0] / theirs[0]:.2f} "
            f"| {theirs[1]:.2f} | {ours[1]:.2f} |"
        )


def hash_all(kind: Callable[[], Digest], pieces: list[np.ndarray], count: int) -> tuple[list[str], float, float]:
    """Digests, seconds and CPU seconds."""
    found = [""] * len(pieces)

    def work(number: int) -> None:
        digest = kind()
        for _ in range(count):
            digest.update(pieces[number].data)
        found[number] = digest.hexdigest()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(pieces))]
    wall, cpu = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
