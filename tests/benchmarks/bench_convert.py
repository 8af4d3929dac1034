"""Measure shard, cast, strip and merge beside ``cp``, plain I/O and the tools that others use.

    python tests/benchmarks/bench_convert.py shard --checkpoint /data/fp8 --work /data/work --peers PEERS/inference
    python tests/benchmarks/bench_convert.py cast  --checkpoint /data/fp8 --work /data/work --ct-python VENV/bin/python

Every contender runs in a process of its own, so that start-up and imports count; all of them in each round, in an
order shuffled anew; what a round wrote is synced (which counts) and deleted (which does not). ``--cache warm`` reads
the input once before each run, ``--cache cold`` drops it from the page cache. Of each contender the median is shown:

    wall       seconds from start to exit, and until every file it wrote is on the disk
    GB/s       input and output bytes over that
    x cp       over ``cp -r`` of the input
    x I/O      over plain_io.py, which reads the input and writes so many bytes, and does nothing else
    RSS        highest of all rounds, from wait4; anon: without mapped files, sampled
    CPU        seconds, user and system

With ``--compare`` every contender's tensors are hashed after its first run, and must be the same bits as ours. Peers:
DeepSeek's convert.py and fp8_cast_bf16.py are run from ``--peers``, compressed-tensors from the interpreter
``--ct-python``; without them their rows are left out, and it says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from compare import compare_digests, digest

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
OURS = "weightkit"
CP = "cp -r"
PLAIN, PLAIN_DIRECT = "plain I/O", "plain I/O, O_DIRECT"
#: Rows that only move bytes: their output is no checkpoint to compare.
BASELINES = (CP, PLAIN, PLAIN_DIRECT)

OURS_CODE = """
import sys, weightkit as wk
what, source, target, jobs, device = sys.argv[1:6]
opened = wk.open_checkpoint(source)
result = {
    "shard": lambda: wk.shard(opened, mp=int(sys.argv[6])),
    "cast": lambda: wk.cast(opened, "bf16"),
    "strip": lambda: wk.strip_mtp(opened),
    "merge": lambda: wk.merge(opened),
}[what]()
wk.write(result, target, jobs=int(jobs) or None, device=device, progress=False)
"""

PLANNED_CODE = """
from weightkit.layouts import lay_out_published
from weightkit.writer.plan import make_plan
files = lay_out_published(result) if isinstance(result, wk.Checkpoint) else result
print(make_plan(files, target).bytes_written)
"""

CT_CODE = """
import sys
from compressed_tensors.entrypoints.convert import FP8BlockDequantizer, convert_checkpoint
source, target, device = sys.argv[1:4]
convert_checkpoint(source, target, FP8BlockDequantizer.from_pretrained(source), device=device)
"""


@dataclass(frozen=True)
class Contender:
    """A command line; ``{out}`` in it is the folder it is to write."""

    name: str
    command: tuple[str, ...]

    def line(self, out: Path) -> list[str]:
        return [part.replace("{out}", str(out)) for part in self.command]


@dataclass(frozen=True)
class Run:
    """What one run took."""

    wall_s: float
    cpu_s: float
    rss_bytes: int
    anonymous_bytes: int
    written_bytes: int


@dataclass
class Results:
    runs: dict[str, list[Run]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    equality: dict[str, str] = field(default_factory=dict)
    digests: dict[str, dict] = field(default_factory=dict)  # type: ignore[type-arg]


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


def set_cache(folder: Path, cache: str) -> None:
    """Bring the input into the page cache, or out of it."""
    buffer = bytearray(8 << 20)
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        with path.open("rb", buffering=0) as file:
            if cache == "cold":
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.readinto(buffer):
                    pass


def resident_share(folder: Path) -> float:
    """About how much of the folder is in the page cache: one page of every 64 MiB is asked for, without waiting."""
    cached = asked = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            for start in range(0, path.stat().st_size - 4096, 64 << 20):
                asked += 1
                try:
                    cached += os.preadv(file.fileno(), [bytearray(4096)], start, os.RWF_NOWAIT) > 0
                except BlockingIOError:
                    continue
    return cached / max(1, asked)


def sample_anonymous(pid: int, stop: threading.Event, highest: list[int]) -> None:
    """The largest RssAnon of a process, looked at every 20 ms."""
    path = Path(f"/proc/{pid}/status")
    while not stop.wait(0.02):
        try:
            lines = path.read_text().splitlines()
        except OSError:
            return
        for line in lines:
            if line.startswith("RssAnon:"):
                highest[0] = max(highest[0], int(line.split()[1]) << 10)


def measure(contender: Contender, out: Path, log: Path, timeout_s: float) -> Run:
    """Run it once. Raises ``RuntimeError`` with the end of its output where it fails."""
    environment = os.environ | {"PYTHONPATH": str(REPO), "TOKENIZERS_PARALLELISM": "false"}
    highest, stop = [0], threading.Event()
    with log.open("wb") as output:
        started = time.monotonic()
        process = subprocess.Popen(
            contender.line(out), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
        killer = threading.Timer(timeout_s, process.kill)
        sampler = threading.Thread(target=sample_anonymous, args=(process.pid, stop, highest), daemon=True)
        killer.start()
        sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        killer.cancel()
        if process.returncode == 0 and out.exists():
            sync_files(out)
        wall_s = time.monotonic() - started
    stop.set()
    sampler.join()
    if process.returncode != 0 or not out.exists():
        tail = log.read_text(errors="replace").strip().splitlines()[-6:]
        raise RuntimeError(f"exit {process.returncode}: " + " | ".join(tail))
    return Run(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10, highest[0], folder_bytes(out))


def contenders(args: argparse.Namespace) -> Iterator[Contender]:
    source, python = str(args.checkpoint), sys.executable
    yield Contender(CP, ("cp", "-r", source, "{out}"))
    extra = (str(args.mp),) if args.what == "shard" else ()
    for device in args.device:
        line = (python, "-c", OURS_CODE, args.what, source, "{out}", str(args.jobs), device)
        yield Contender(OURS if len(args.device) == 1 else f"{OURS} ({device})", line + extra)
    if args.what == "shard":
        yield from deepseek_convert(args)
    if args.what == "cast":
        yield from deepseek_cast(args)
        yield from compressed_tensors(args)


def output_bytes(args: argparse.Namespace) -> int:
    """Bytes that ours will write, from its plan."""
    code = OURS_CODE.rsplit("wk.write", 1)[0] + PLANNED_CODE
    extra = [str(args.mp)] if args.what == "shard" else []
    line = [sys.executable, "-c", code, args.what, str(args.checkpoint), str(args.work / "out"), "0", "cpu", *extra]
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise SystemExit(f"no plan of ours: {done.stderr}")
    return int(done.stdout)


def plain(args: argparse.Namespace, write_bytes: int) -> Iterator[Contender]:
    """Plain I/O that reads the input and writes so many bytes."""
    line = (sys.executable, str(HERE / "plain_io.py"), str(args.checkpoint), "{out}", str(write_bytes))
    if args.jobs:
        line += ("--threads", str(args.jobs))
    if "buffered" in args.plain:
        yield Contender(PLAIN, line)
    if "direct" in args.plain:
        yield Contender(PLAIN_DIRECT, (*line, "--direct"))


def deepseek_convert(args: argparse.Namespace) -> Iterator[Contender]:
    script = args.peers and args.peers / "convert.py"
    if not script or not script.is_file():
        print("DeepSeek's convert.py left out: no --peers folder with it")
        return
    experts = json.loads((args.checkpoint / "config.json").read_text())["n_routed_experts"]
    line = (args.peers_python, str(script), "--hf-ckpt-path", str(args.checkpoint), "--save-path", "{out}")
    yield Contender("convert.py", (*line, "--n-experts", str(experts), "--model-parallel", str(args.mp)))


def deepseek_cast(args: argparse.Namespace) -> Iterator[Contender]:
    script = args.peers and args.peers / "fp8_cast_bf16.py"
    if not script or not script.is_file():
        print("DeepSeek's fp8_cast_bf16.py left out: no --peers folder with it")
    elif not cuda_is_there(args.peers_python):
        print("DeepSeek's fp8_cast_bf16.py left out: it needs a CUDA device")
    else:
        line = (args.peers_python, str(script), "--input-fp8-hf-path", str(args.checkpoint))
        yield Contender("fp8_cast_bf16.py", (*line, "--output-bf16-hf-path", "{out}"))


def compressed_tensors(args: argparse.Namespace) -> Iterator[Contender]:
    if args.ct_python is None:
        print("compressed-tensors left out: no --ct-python")
        return
    device = "cuda" if args.device != ["cpu"] and cuda_is_there(args.ct_python) else "cpu"
    yield Contender(
        f"compressed-tensors ({device})", (args.ct_python, "-c", CT_CODE, str(args.checkpoint), "{out}", device)
    )


def cuda_is_there(python: str) -> bool:
    code = "import torch; raise SystemExit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


class Bench:
    """Rounds of all contenders, within a budget of seconds."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.started = time.monotonic()
        self.results = Results()
        self.log = args.work / "bench.log"

    def left_s(self) -> float:
        return self.args.budget_s - (time.monotonic() - self.started)

    def run(self) -> Results:
        """All rounds. Before them ours, unmeasured, so that what is compiled once for a machine is compiled."""
        everyone = [*contenders(self.args), *plain(self.args, output_bytes(self.args))]
        shuffle = random.Random(self.args.seed)
        for contender in everyone:
            if contender.name.startswith(OURS) and not self.args.no_warm_up:
                self.once(contender, record=False)
        for number in range(self.args.rounds):
            shuffle.shuffle(everyone)
            for contender in everyone:
                if contender.name in self.results.failures or (number and contender.name in self.args.once):
                    continue
                expected = [run.wall_s for run in self.results.runs.get(contender.name, [])]
                if self.left_s() < (max(expected, default=0) * 1.2 if number else 0):
                    print(f"round {number + 1}: {contender.name} left out, the budget is spent", flush=True)
                    continue
                self.once(contender)
        self.compare()
        return self.results

    def once(self, contender: Contender, *, record: bool = True) -> None:
        """One run, its digest if it is the first, and the output deleted."""
        out = self.args.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        if self.args.cache == "cold" or resident_share(self.args.checkpoint) < 1:
            set_cache(self.args.checkpoint, self.args.cache)
        resident = resident_share(self.args.checkpoint)
        try:
            run = measure(contender, out, self.log, max(5.0, self.left_s()))
        except RuntimeError as exc:
            self.results.failures[contender.name] = str(exc)
            print(f"{contender.name} failed: {exc}", flush=True)
            return
        finally:
            if contender.name not in BASELINES and self.args.compare and contender.name not in self.results.digests:
                self.take_digest(contender.name, out)
            shutil.rmtree(out, ignore_errors=True)
        if record:
            self.results.runs.setdefault(contender.name, []).append(run)
            print(
                f"{contender.name:24} {run.wall_s:7.2f} s  cpu {run.cpu_s:6.1f} s  rss {run.rss_bytes / 2**20:7.0f} MiB"
                f"  input cached {resident:.0%}  load {os.getloadavg()[0]:.1f}",
                flush=True,
            )

    def take_digest(self, name: str, out: Path) -> None:
        if out.exists() and any(out.glob("*.safetensors")):
            self.results.digests[name] = digest(out, min(16, len(os.sched_getaffinity(0))))

    def compare(self) -> None:
        """Everyone's tensors against those of the first row of ours."""
        digests = self.results.digests
        ours = next((name for name in digests if name.startswith(OURS)), None)
        for name, theirs in digests.items():
            if name == ours or ours is None:
                continue
            count, problems = compare_digests(digests[ours], theirs)
            verdict = "equal bits" if not problems else f"{len(problems)} DIFFERENCES, the first: {problems[0]}"
            self.results.equality[f"{name} against {ours}"] = f"{count:,} tensors, {verdict}"


def table(results: Results, input_bytes: int) -> str:
    def wall(name: str) -> float | None:
        runs = results.runs.get(name)
        return statistics.median(run.wall_s for run in runs) if runs else None

    plain_walls = [value for name in (PLAIN, PLAIN_DIRECT) if (value := wall(name)) is not None]
    cp, machine = wall(CP), min(plain_walls, default=None)
    lines = [
        "| | wall s (each round) | GB/s | x cp | x I/O | RSS MiB | anon MiB | CPU s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in sorted(results.runs.items(), key=lambda item: statistics.median(run.wall_s for run in item[1])):
        median = statistics.median(run.wall_s for run in runs)
        each = ", ".join(f"{run.wall_s:.1f}" for run in runs)
        rate = (input_bytes + runs[0].written_bytes) / median / 1e9
        over = [f"{median / base:.2f}" if base else "" for base in (cp, machine)]
        rss, anon = (max(getattr(run, key) for run in runs) / 2**20 for key in ("rss_bytes", "anonymous_bytes"))
        cpu = statistics.median(run.cpu_s for run in runs)
        lines.append(
            f"| {name} | **{median:.2f}** ({each}) | {rate:.2f} | {over[0]} | {over[1]} | {rss:,.0f} | {anon:,.0f} |"
            f" {cpu:.1f} |"
        )
    return "\n".join(lines)


def machine(args: argparse.Namespace) -> str:
    described = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in described if "model name" in line), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = []
    for name in ("torch", "triton", "numba", "numpy", "safetensors"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    gpu = ""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        gpu = ", " + subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return (
        f"{time.strftime('%Y-%m-%d')}, {len(os.sched_getaffinity(0))} cores ({cpu}), {memory:.0f} GiB{gpu}, "
        f"Linux {platform.release()}, Python {platform.python_version()}, {', '.join(versions)}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure weightkit beside cp, plain I/O and other tools.")
    parser.add_argument("what", choices=("shard", "cast", "strip", "merge"))
    parser.add_argument("--checkpoint", type=Path, required=True, help="the input; rank files for merge")
    parser.add_argument("--work", type=Path, required=True, help="folder for outputs, on the disk that is meant")
    parser.add_argument("--peers", type=Path, help="DeepSeek's inference folder")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter for DeepSeek's scripts")
    parser.add_argument("--ct-python", help="interpreter that has compressed-tensors")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=0, help="0: the default")
    parser.add_argument("--mp", type=int, default=8)
    parser.add_argument("--device", nargs="+", choices=("auto", "cuda", "cpu"), default=["auto"], help="a row for each")
    parser.add_argument("--cache", choices=("warm", "cold"), default="warm")
    parser.add_argument("--plain", nargs="*", choices=("buffered", "direct"), default=["buffered", "direct"])
    parser.add_argument("--compare", action="store_true", help="hold the outputs against each other")
    parser.add_argument("--budget-s", type=float, default=3600, help="start no run that would end later")
    parser.add_argument("--once", nargs="*", default=[], metavar="NAME", help="contenders of the first round alone")
    parser.add_argument("--no-warm-up", action="store_true", help="no unmeasured run of ours before the rounds")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--out", type=Path, help="append the report to this file too")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def main() -> None:
    args = parse()
    results = Bench(args).run()
    input_bytes = folder_bytes(args.checkpoint)
    command = shlex.join(["bench_convert.py", *sys.argv[1:]])
    report = [
        f"### {args.what}, {input_bytes / 1e9:.2f} GB in, {args.cache} cache",
        machine(args),
        f"`{command}`",
        table(results, input_bytes),
        *(f"- {name}: {verdict}" for name, verdict in results.equality.items()),
        *(f"- {name} FAILED: {why}" for name, why in results.failures.items()),
    ]
    text = "\n\n".join(report[:4]) + "\n\n" + "\n".join(report[4:]) + "\n"
    print("\n" + text, flush=True)
    if args.out:
        with args.out.open("a") as file:
            file.write(text + "\n")
    differences = any("DIFFERENCES" in verdict for verdict in results.equality.values())
    failed = any(name.startswith(OURS) for name in results.failures)
    sys.exit(1 if differences or failed else 0)


if __name__ == "__main__":
    main()
