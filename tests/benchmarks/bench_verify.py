"""How fast ``verify`` computes SHA-256 and looks at values, beside ``sha256sum`` and plain hashlib.

    python tests/benchmarks/bench_verify.py --dir /data --gib 4

Writes --gib of random safetensors files into --dir, with a lock, and removes them afterwards. Each way reads all of
them, with the page cache warm and, where the kernel may be told to drop the files' pages (a file's own writer may),
cold. Ways are shuffled within each round, because disks of virtual machines drift; the median over the rounds counts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import struct
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import weightkit as wk
from weightkit.checkpoint.lock import Lock, LockedFile
from weightkit.errors import ChecksumError, ValuesError

POOL_BYTES = 64 << 20
READ_BYTES = 4 << 20


def write_files(folder: Path, total_bytes: int, count: int) -> list[Path]:
    """``count`` files of one F8_E4M3 tensor each, contents cut from a pool of random finite codes, and their lock."""
    pool = (np.frombuffer(os.urandom(POOL_BYTES), np.uint8) & 0xF7).tobytes()
    paths, locked, weight_map = [], {}, {}
    for number in range(count):
        size = total_bytes // count
        path = folder / f"model-{number + 1:05}-of-{count:06}.safetensors"
        name = f"tensor.{number}"
        entry = {"dtype": "F8_E4M3", "shape": [size], "data_offsets": [0, size]}
        fields = {"__metadata__": {"format": "pt"}, name: entry}
        header = json.dumps(fields).encode()
        digest = hashlib.sha256()
        with path.open("wb") as file:
            for block in [struct.pack("<Q", len(header)) + header, *_blocks(pool, size)]:
                file.write(block)
                digest.update(block)
            file.flush()
            os.fsync(file.fileno())
        locked[path.name] = LockedFile(path.stat().st_size, digest.hexdigest())
        weight_map[name] = path.name
        paths.append(path)
    index = {"metadata": {"total_size": total_bytes // count * count}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "weightkit.lock.json").write_bytes(Lock(locked).to_bytes())
    return paths


def _blocks(pool: bytes, size: int) -> list[memoryview]:
    view = memoryview(pool)
    return [view[: min(POOL_BYTES, size - start)] for start in range(0, size, POOL_BYTES)]


def hash_file(path: Path) -> None:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])


def hash_files(paths: list[Path], threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(hash_file, paths))


def run_verify(folder: Path, jobs: int, *, quick: bool = False, values: bool = False) -> None:
    report = wk.verify(folder, jobs=jobs, quick=quick, values=values, progress=False)
    bad = any(isinstance(problem, (ChecksumError, ValuesError)) for problem in report.problems)
    if bad or (not report.hashed_bytes and not quick):
        raise SystemExit(report.render())


def drop_cache(paths: list[Path]) -> None:
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="where to write; a new folder inside is used")
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    folder = arguments.dir / "bench_verify"
    folder.mkdir(parents=True)
    try:
        paths = write_files(folder, int(arguments.gib * (1 << 30)), arguments.files)
        total, jobs = sum(path.stat().st_size for path in paths), arguments.jobs
        ways: dict[str, Callable[[], object]] = {
            "sha256sum": lambda: subprocess.run(["sha256sum", *paths], check=True, stdout=subprocess.DEVNULL),
            f"sha256sum x{jobs}": lambda: subprocess.run(
                ["xargs", "-P", str(jobs), "-n", "1", "sha256sum"],
                input="\n".join(map(str, paths)).encode(),
                check=True,
                stdout=subprocess.DEVNULL,
            ),
            "hashlib, 1 thread": lambda: hash_files(paths, 1),
            f"hashlib, {jobs} threads": lambda: hash_files(paths, jobs),
            "read only, 1 thread": lambda: subprocess.run(["cat", *paths], check=True, stdout=subprocess.DEVNULL),
            "verify, 1 job": lambda: run_verify(folder, 1),
            f"verify, {jobs} jobs": lambda: run_verify(folder, jobs),
            "values alone, 1 job": lambda: run_verify(folder, 1, quick=True, values=True),
            f"both, {jobs} jobs": lambda: run_verify(folder, jobs, values=True),
        }
        rates: dict[tuple[str, str], list[float]] = {}
        for _ in range(arguments.rounds):
            for cache in ("cold", "warm"):
                for name in random.sample(list(ways), len(ways)):
                    if cache == "cold":
                        drop_cache(paths)
                    started = time.perf_counter()
                    ways[name]()
                    rates.setdefault((name, cache), []).append(total / (time.perf_counter() - started) / 1e9)
        print(f"{total / 1e9:.1f} GB in {len(paths)} files, {arguments.rounds} rounds, median GB/s (lowest, highest)")
        for name in ways:
            cells = []
            for cache in ("cold", "warm"):
                found = rates[name, cache]
                cells.append(f"{cache} {statistics.median(found):5.2f} ({min(found):.2f}, {max(found):.2f})")
            print(f"{name:22}  {'   '.join(cells)}")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
