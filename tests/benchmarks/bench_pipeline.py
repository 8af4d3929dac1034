"""Where the time of a cast goes, on the CPU and on a GPU, beside what the machine allows.

    python tests/benchmarks/bench_pipeline.py --dir /dev/shm/bench --gb 6      # no disk in the way; 20 GB of memory
    python tests/benchmarks/bench_pipeline.py --dir /data/bench --gb 6 --direct

A random checkpoint of DeepSeek-V3's full width is written to ``--dir`` (``full_width.py``), cast to BF16, and that back
to FP8. Every run is a process of its own; the contenders take turns, in each round in another order:

    plain       plain_io.py: as many bytes read and written by as many threads, and nothing else
    cpu         --device cpu
    cuda        --device cuda: the CPU until the GPUs are ready, strips on a GPU while the next one is read
    cuda-wait   the GPUs are waited for before anything is written
    cuda-serial as cuda-wait, and no strip is begun before the one before it is written

    wall        seconds from start to exit of the process; of write: of the writing alone; medians
    GB/s        bytes read and written over the first
    CPU         seconds, user and system
    ready       seconds until the first strip is computed on a GPU, after the writing began; share of strips computed so
    start       of that, seconds until torch is imported and has found its GPUs; in which the CPU computes what they are
                tried with; in which they do, kernels loaded
    read ...    seconds of all workers, in percent of the time that they are at work: reading; computing on the CPU, or
                starting strips on a GPU; waiting for results of a GPU; copying those of the CPU into the file's
                buffers; waiting for buffers that are not yet hashed and written; reserving space for the file.
                hash: of the time that a worker is at work, how long its file's hashing thread is busy.

The SHA-256 ceiling is of so many threads as there are jobs, from memory. A file is hashed by one thread: jobs times one
thread's rate bounds any cast. ``--small-gb`` is cast once more, to show what starting costs. All contenders' files must
have the same SHA-256. ``--limit-s``: runs that would end later are left out, and named.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
MODES = ("cpu", "cuda", "cuda-wait", "cuda-serial", "auto")
HASH_SECONDS = 1.0
STARTER = "weightkit-gpu-start"


# --- the child: one cast, timed from within ---------------------------------------------------------------------------


class Clock:
    """Seconds by category, each without those of what it calls; threads may share it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.first: dict[str, float] = {}
        self._local = threading.local()
        self._lock = threading.Lock()

    def wrap(self, owner: object, name: str, category: str) -> None:
        """Count the time of a method."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            if threading.current_thread().name == STARTER:
                return inner(*args, **options)  # warming up is none of the workers' time
            stack: list[float] = self._local.__dict__.setdefault("stack", [])
            started = time.perf_counter()
            stack.append(0.0)
            try:
                return inner(*args, **options)
            finally:
                took = time.perf_counter() - started
                own = took - stack.pop()
                if stack:
                    stack[-1] += took
                with self._lock:
                    self.seconds[category] += own
                    self.calls[category] += 1
                    self.first.setdefault(category, started)

        setattr(owner, name, timed)

    def span(self, owner: object, name: str) -> None:
        """Keep when a method was first called, and when it then ended, on whatever thread."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            self.first.setdefault(f"{name} begins", time.perf_counter())
            try:
                return inner(*args, **options)
            finally:
                self.first.setdefault(f"{name} ends", time.perf_counter())

        setattr(owner, name, timed)

    def between(self, first: str, then: str) -> float | None:
        """Seconds, if both happened."""
        return self.first[then] - self.first[first] if {first, then} <= self.first.keys() else None


def child(kind: str, mode: str, source: Path, target: Path, jobs: int) -> None:
    """Cast, and print as JSON what it took."""
    import weightkit as wk
    from weightkit import sha256
    from weightkit.checkpoint import Reader
    from weightkit.checkpoint.folder import LOCK_NAME
    from weightkit.compute import CpuEngine, CudaEngine, StartingEngine, engines, start_engine, starting, trial
    from weightkit.layouts import lay_out_published
    from weightkit.transforms import cast_to_fp8
    from weightkit.writer import execute, files, make_plan, stream
    from weightkit.writer.stream import AppendStream

    clock = Clock()
    clock.wrap(Reader, "read_range", "read")
    for name in ("start_dequantize", "start_quantize_blocks", "start_dequantize_groups"):
        clock.wrap(CpuEngine, name, "compute")
        clock.wrap(CudaEngine, name, "launch")
    clock.wrap(CpuEngine, "quantize_blocks", "compute-inner")
    clock.wrap(engines._OnDevice, "copy_to", "gpu")
    clock.wrap(engines._Lane, "turn", "gpu-slot")
    clock.wrap(AppendStream, "append", "copy")
    clock.wrap(stream, "_reserve", "reserve")
    clock.wrap(AppendStream, "_submit", "buffers")
    clock.wrap(sha256, "_hash", "hash")
    clock.wrap(AppendStream, "_write_block", "write")
    clock.wrap(AppendStream, "finish", "finish")
    clock.wrap(files.FileWriter, "fill", "rest")
    clock.span(starting, "_open")
    clock.span(trial.Trial, "__init__")
    clock.span(trial.Trial, "require")
    opened = wk.open_checkpoint(source)
    plan = make_plan(lay_out_published(cast_to_fp8(opened) if kind == "fp8" else wk.cast(opened, "bf16")), target)
    engine = start_engine("cuda" if mode.startswith("cuda") else mode, plan.computed)  # type: ignore[arg-type]
    if mode in ("cuda-wait", "cuda-serial") and isinstance(engine, StartingEngine):
        engine.wait()
    if mode == "cuda-serial":
        files.STARTED = 0
    started = time.perf_counter()
    execute(plan, engine=engine, jobs=jobs, progress=False)
    write_s = time.perf_counter() - started
    on_gpu, on_cpu = clock.calls["launch"], clock.calls["compute"]
    usage = resource.getrusage(resource.RUSAGE_SELF)
    seconds = dict(clock.seconds)
    worker_s = sum(value for key, value in seconds.items() if key not in ("hash", "write"))
    lock = json.loads((target / LOCK_NAME).read_text())
    print(
        json.dumps(
            {
                "write_s": write_s,
                "cpu_s": usage.ru_utime + usage.ru_stime,
                "read": seconds.get("read", 0) / worker_s,
                "compute": sum(seconds.get(key, 0) for key in ("compute", "compute-inner", "launch")) / worker_s,
                "gpu": (seconds.get("gpu", 0) + seconds.get("gpu-slot", 0)) / worker_s,
                "buffers": (seconds.get("buffers", 0) + seconds.get("finish", 0)) / worker_s,
                "copy": seconds.get("copy", 0) / worker_s,
                "reserve": seconds.get("reserve", 0) / worker_s,
                "rest": seconds.get("rest", 0) / worker_s,
                "hash": seconds.get("hash", 0) / worker_s,
                "gpu_share": on_gpu / max(1, on_gpu + on_cpu),
                "ready_s": clock.first["launch"] - started if on_gpu else None,
                "torch_s": clock.between("_open begins", "__init__ begins"),
                "samples_s": clock.between("__init__ begins", "__init__ ends"),
                "kernels_s": clock.between("require begins", "require ends"),
                "written": plan.bytes_written,
                "needed": plan.bytes_read,
                "lock": lock,
            }
        )
    )


# --- the parent -------------------------------------------------------------------------------------------------------


def hash_rate(threads: int) -> float:
    """Bytes a second of SHA-256, ``threads`` at once."""
    data = os.urandom(4 << 20)

    def work(_: int) -> int:
        digest, count, end = hashlib.sha256(), 0, time.perf_counter() + HASH_SECONDS
        while time.perf_counter() < end:
            digest.update(data)
            count += len(data)
        return count

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, range(threads))) / HASH_SECONDS


def run(command: list[str], limit_s: float) -> tuple[float, dict[str, Any]]:
    """Seconds until it has ended, and what its last line says."""
    started = time.perf_counter()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=max(1.0, limit_s),
        check=False,
        env=os.environ | {"PYTHONPATH": str(REPO)},
    )
    wall_s = time.perf_counter() - started
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stderr or done.stdout).strip()[-800:]}")
    lines = done.stdout.strip().splitlines()
    return wall_s, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}


class Bench:
    """The runs, and what they took: by kind of cast and contender."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.deadline = time.monotonic() + args.limit_s
        self.results: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self.notes: list[str] = []
        self.sums: dict[str, tuple[str, str]] = {}

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def write_source(self, name: str, gigabytes: float) -> Path:
        folder: Path = self.args.dir / name
        if not folder.exists():
            shard = gigabytes / (2 * self.args.jobs)
            command = [sys.executable, str(HERE / "full_width.py"), "--dir", str(folder)]
            wall_s, _ = run([*command, "--gb", str(gigabytes), "--shard-gb", f"{shard:.3f}"], self.left_s())
            print(f"{folder}: written in {wall_s:.1f} s", file=sys.stderr, flush=True)
        return folder

    def cast(self, what: str, kind: str, mode: str, source: Path, target: Path) -> bool:
        """One run; whether it was made and succeeded. Its files stay."""
        longest = max((each["wall_s"] for each in self.results.get((what, mode), [])), default=0.0)
        if self.left_s() < 1.2 * longest + 2:
            self.note(f"{what}, {mode}: left out for want of time")
            return False
        command = [sys.executable, str(Path(__file__).resolve()), "--child", kind, mode, str(source), str(target)]
        return self.measure(what, mode, [*command, str(self.args.jobs)])

    def plain(self, what: str, source: Path, needed: int, written: int, target: Path) -> None:
        command = [sys.executable, str(HERE / "plain_io.py"), str(source), str(target), str(needed), str(written)]
        direct = ["--direct"] if self.args.direct else []
        self.measure(what, "plain", [*command, "--threads", str(self.args.jobs), *direct])
        shutil.rmtree(target, ignore_errors=True)

    def measure(self, what: str, mode: str, command: list[str]) -> bool:
        try:
            wall_s, found = run(command, self.left_s())
        except (RuntimeError, subprocess.TimeoutExpired) as exc:
            self.note(f"{what}, {mode}: FAILED: {exc}")
            return False
        lock = found.pop("lock", None)
        if lock is not None:
            self.compare(what, mode, json.dumps(lock["files"], sort_keys=True))
        self.results.setdefault((what, mode), []).append({"wall_s": wall_s, **found})
        print(f"{what}, {mode}: {wall_s:.2f} s", file=sys.stderr, flush=True)
        return True

    def compare(self, what: str, mode: str, files: str) -> None:
        first, expected = self.sums.setdefault(what, (mode, files))
        if files != expected:
            self.note(f"{what}: DIFFERENT FILES by {mode} and {first}")

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def rounds(self, what: str, kind: str, source: Path, modes: list[str], rounds: int, keep: Path | None) -> None:
        """``keep``: where the last output is to stay."""
        for number in range(rounds):
            for mode in modes[number % len(modes) :] + modes[: number % len(modes)]:
                target = self.args.dir / "out"
                made = self.cast(what, kind, mode, source, target)
                if made and number == 0 and mode == modes[0]:
                    one = self.results[what, mode][0]
                    self.plain(what, source, one["needed"], one["written"], self.args.dir / "plain")
                if made and keep is not None and not keep.exists():
                    target.rename(keep)
                shutil.rmtree(target, ignore_errors=True)

    def all(self) -> None:
        args = self.args
        args.dir.mkdir(parents=True, exist_ok=True)
        source = self.write_source("fp8", args.gb)
        self.rounds("FP8 to BF16", "bf16", source, args.modes, args.rounds, args.dir / "bf16")
        if (args.dir / "bf16").exists():
            self.rounds("BF16 to FP8", "fp8", args.dir / "bf16", args.modes, args.rounds, None)
        if args.small_gb:
            small = self.write_source("small", args.small_gb)
            modes = [mode for mode in (*args.modes, "auto") if mode in ("cpu", "cuda", "cuda-wait", "auto")]
            self.rounds(f"{args.small_gb:g} GB of FP8 to BF16", "bf16", small, modes, 2, None)


def table(bench: Bench, jobs: int) -> str:
    """Markdown."""
    columns = ("cast", "device", "wall s", "of write", "GB/s", "CPU s", "ready s", "start s", "on GPU", "runs")
    shares = ("read", "compute", "gpu", "copy", "buffers", "reserve", "rest", "hash")
    lines = ["| " + " | ".join([*columns, *(f"{share} %" for share in shares)]) + " |"]
    lines.append("|" + " --- |" * (len(columns) + len(shares)))
    sizes = {what: runs[0] for (what, mode), runs in bench.results.items() if mode != "plain"}
    for (what, mode), runs in bench.results.items():

        def median(key: str, runs: list[dict[str, Any]] = runs) -> float | None:
            values = [each[key] for each in runs if each.get(key) is not None]
            return statistics.median(values) if values else None

        def shown(key: str, scale: float = 1, digits: int = 2) -> str:
            value = median(key)
            return "" if value is None else f"{value * scale:.{digits}f}"

        moved = sizes[what]["needed"] + sizes[what]["written"] if what in sizes else 0
        rate = f"{moved / 1e9 / (median('wall_s') or 1):.2f}"
        row = [what, mode, shown("wall_s"), shown("write_s"), rate, shown("cpu_s", digits=1), shown("ready_s")]
        row.append(" + ".join(filter(None, (shown(f"{part}_s", digits=1) for part in ("torch", "samples", "kernels")))))
        row += ["" if mode == "plain" else f"{shown('gpu_share', 100, 0)} %", str(len(runs))]
        lines.append("| " + " | ".join([*row, *(shown(share, 100, 0) for share in shares)]) + " |")
    one, many = hash_rate(1), hash_rate(jobs)
    lines += ["", f"SHA-256: one thread {one / 1e9:.2f} GB/s, {jobs} threads {many / 1e9:.2f} GB/s."]
    for what, size in sizes.items():
        need = f"{size['needed'] / 1e9:.2f} GB in, {size['written'] / 1e9:.2f} GB out"
        lines.append(f"{what}: {need}; hashing alone takes {size['written'] / many:.2f} s with {jobs} threads.")
    return "\n".join([*lines, "", *(f"- {note}" for note in bench.notes)])


def machine() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = ", ".join(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:-1])
    except (OSError, subprocess.CalledProcessError):
        gpus = "no GPU"
    return (
        f"{gpus}; {len(os.sched_getaffinity(0))} cores; Linux {platform.release()}; Python {platform.python_version()}"
    )


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        kind, mode, source, target, jobs = sys.argv[2:]
        return child(kind, mode, Path(source), Path(target), int(jobs))
    parser = argparse.ArgumentParser(description="Where the time of a cast goes, on the CPU and on a GPU.")
    parser.add_argument("--dir", type=Path, required=True, help="where it reads and writes; sources are kept there")
    parser.add_argument("--gb", type=float, default=6.0)
    parser.add_argument("--small-gb", type=float, default=1.5, help="0: leave it out")
    parser.add_argument("--jobs", type=int, default=min(8, len(os.sched_getaffinity(0))))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=MODES, help="default: all that this machine can")
    parser.add_argument("--direct", action="store_true", help="plain I/O with O_DIRECT, as weightkit writes to disks")
    parser.add_argument("--limit-s", type=float, default=150)
    parser.add_argument("--out", type=Path, help="append the report to this file too")
    args = parser.parse_args()
    has_gpu = any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))
    args.modes = args.modes or (["cpu", "cuda", "cuda-wait", "cuda-serial"] if has_gpu else ["cpu"])
    bench = Bench(args)
    bench.all()
    title = f"### Pipeline of cast, {args.gb:g} GB, {args.jobs} jobs, {args.dir}"
    text = f"{title}\n\n{machine()}\n\n{table(bench, args.jobs)}\n"
    print(text, flush=True)
    if args.out:
        with args.out.open("a") as file:
            file.write(text + "\n")
    sys.exit(1 if any("FAILED" in note or "DIFFERENT" in note for note in bench.notes) else 0)


if __name__ == "__main__":
    main()
