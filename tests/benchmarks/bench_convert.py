"""Measure strip, shard, merge, verify and cast beside the machine's ceiling and the tools that others use.

    python tests/benchmarks/bench_convert.py --work /data/work --gb 6 --peers PEERS/inference --ct-python PYTHON
    python tests/benchmarks/bench_convert.py --work /data/work --growth 3 6 12 24

A random checkpoint of DeepSeek-V3's full width with an MTP layer is written; the rest are our own outputs:

    strip      that checkpoint without its MTP layer, --gb        shard      the stripped one, for 8 ranks
    merge      those ranks                                        verify     what was merged, by its lock's SHA-256
    cast       the stripped one to BF16                           cast-fp8   back

Every contender runs in a process of its own, ours as its command line, so that start-up and imports count; in each
round in an order shuffled anew; what it wrote is synced (which counts) and deleted (which does not). Before its rounds
each command of ours runs once unmeasured: what is compiled once for a machine is then compiled, and its output is what
the next command reads and, with ``--compare``, what every tensor of the others' outputs is held against, bit by bit.
``--cache warm`` reads the input before a run unless it is cached, ``cold`` drops it from the page cache.

The ceiling of a conversion is the larger of two times, both measured in the same rounds on as many bytes:
  - reading the bytes that it needs and writing those that it leaves, by plain_io.py with as many threads as ours has
    jobs, through the page cache or with O_DIRECT (cold: for reading too), whichever is fastest;
  - SHA-256 of what it writes on all cores at once, from memory, as every conversion hashes what it writes.
So it is what the disk alone, or the cores alone, would allow. On few cores, which hashing shares with the kernel's work
for I/O, it may be out of reach: the table shows the CPU seconds of both. The ceiling of verify is ``sha256sum`` or
``openssl dgst``, whichever is faster, as many processes at once as there are files.

    wall            seconds from start to exit, and until every file it wrote is on the disk; the median
    GB/s            bytes needed and written over that (cp before strip copies the MTP layer too)
    RSS             peak of the process, highest of all rounds; anon: of it without mapped files
    beyond torch    RSS less that of ``import torch`` alone, in the same run
    CPU             seconds, user and system, with those of children; the median

Peers run ``--peer-rounds`` times after a command's rounds: DeepSeek's convert.py and fp8_cast_bf16.py (which needs
CUDA) from ``--peers``, compressed-tensors' convert_checkpoint in the interpreter ``--ct-python``. ``--limit-s`` is
kept: each command has its share of what is left, what would end later is left out or stopped, and the report names it.
On disk is at most about 5 times --gb at once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import compare
import growth
from measured import (
    CORES,
    ENVIRONMENT,
    Run,
    RunError,
    cuda_is_there,
    folder_bytes,
    hash_rate,
    machine,
    measure,
    resident_share,
    set_cache,
    torch_bytes,
)

HERE = Path(__file__).resolve().parent
OURS = "weightkit"
CP = "cp -r"
FOLDER = "bench_convert"
#: Seconds at the end in which nothing runs any more.
RESERVE_S = 10
PLAIN = ("plain I/O", "plain I/O, O_DIRECT", "plain I/O, O_DIRECT both ways")
SUMS = ("sha256sum", "openssl dgst")

CT_CODE = """
import sys
from compressed_tensors.entrypoints.convert import FP8BlockDequantizer, convert_checkpoint
source, target, device = sys.argv[1:4]
convert_checkpoint(source, target, FP8BlockDequantizer.from_pretrained(source), device=device)
"""


@dataclass(frozen=True)
class Task:
    """A command of ours: what it reads, what its unmeasured output is called, and what that must have the bits of."""

    name: str
    arguments: tuple[str, ...]
    source: str
    output: str | None
    equals: str | None
    share: int = 1
    computes: bool = False


TASKS = (
    Task("strip", ("strip",), "mtp", "fp8", None),
    Task("shard", ("shard", "--mp", "8"), "fp8", "ranks", "ranks", 2),
    Task("merge", ("merge",), "ranks", "merged", "fp8"),
    Task("verify", ("verify",), "merged", None, None),
    Task("cast", ("cast", "--to", "bf16"), "fp8", "bf16", "bf16", 4, True),
    Task("cast-fp8", ("cast", "--to", "fp8"), "bf16", "again", "again", 3, True),
)


@dataclass(frozen=True)
class Contender:
    """A command line; ``{out}`` in it is the folder it is to write."""

    name: str
    command: tuple[str, ...]

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)

    @property
    def bound(self) -> bool:
        """Whether it only moves or hashes bytes."""
        return self.name in (*PLAIN, *SUMS, CP)

    def line(self, out: Path) -> list[str]:
        return [part.replace("{out}", str(out)) for part in self.command]


@dataclass
class Results:
    """Of one task: bytes that it needs and writes, and what each contender took."""

    read_bytes: int
    written_bytes: int
    runs: dict[str, list[Run]] = field(default_factory=dict)
    hash_rates: list[float] = field(default_factory=list)

    def wall_s(self, name: str) -> float | None:
        runs = self.runs.get(name)
        return statistics.median(run.wall_s for run in runs) if runs else None

    def fastest_s(self, names: tuple[str, ...]) -> float | None:
        return min((wall for name in names if (wall := self.wall_s(name)) is not None), default=None)

    def hash_s(self) -> float | None:
        """Least seconds for the SHA-256 of what is written; None where nothing is."""
        written = self.written_bytes
        return written / statistics.median(self.hash_rates) if written and self.hash_rates else None

    def ceiling_s(self) -> float | None:
        if not self.written_bytes:
            return self.fastest_s(SUMS)
        plain_s = self.fastest_s(PLAIN)
        return None if plain_s is None else max(plain_s, self.hash_s() or 0)


class Bench:
    """All tasks in turn, within a number of seconds."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.deadline = time.monotonic() + args.limit_s
        self.work: Path = args.work / FOLDER
        self.log = self.work / "log"
        self.results: dict[str, Results] = {}
        self.notes: list[str] = []
        self.failed = False
        self.unwritable: dict[str, str] = {}

    def left_s(self) -> float:
        return float(self.deadline - time.monotonic())

    def is_over(self) -> bool:
        """Whether what was stopped just now was for want of time."""
        return self.left_s() <= RESERVE_S + 1

    def note(self, line: str, *, failed: bool = False) -> None:
        print(line, flush=True)
        self.notes.append(line)
        self.failed |= failed

    def run(self) -> None:
        tasks = [task for task in TASKS if task.name in self.args.only]
        for position, task in enumerate(tasks):
            share = task.share / sum(later.share for later in tasks[position:])
            try:
                self.one(task, share)
            except RunError as exc:
                self.note(f"{task.name}: {exc}", failed=not self.is_over())
            wanted = {name for later in tasks[position + 1 :] for name in sources_of(later)}
            for name in {"mtp", *(task.output for task in TASKS if task.output)} - wanted:
                shutil.rmtree(self.work / name, ignore_errors=True)

    def need(self, name: str) -> Path:
        """The folder of this name, written now unless it is there. Raises ``RunError``."""
        folder = self.work / name
        if folder.is_dir():
            return folder
        if name in self.unwritable:
            raise RunError(self.unwritable[name])
        made = next((task for task in TASKS if task.output == name), None)
        if made is None:
            size = ["--gb", str(self.args.gb), "--mtp", "1", "--shard-gb", str(self.args.shard_gb)]
            command = [sys.executable, str(HERE / "full_width.py"), "--dir", str(folder), *size]
        else:
            command = ours(made, self.need(made.source), folder, self.args.device[0], self.args.jobs)
        try:
            run = measure(command, folder, self.log, max(1, self.left_s() - RESERVE_S))
        except RunError as exc:
            shutil.rmtree(folder, ignore_errors=True)
            self.unwritable[name] = f"{name} could not be written: {exc}"
            raise RunError(self.unwritable[name]) from exc
        print(f"{name}: {folder_bytes(folder) / 1e9:.2f} GB in {run.wall_s:.1f} s, unmeasured", flush=True)
        return folder

    def one(self, task: Task, share: float) -> None:
        """The rounds of one task, in this share of the time that is left once its input is there.

        Raises ``RunError`` where there is nothing to measure it on.
        """
        source = self.need(task.source)
        if task.output:
            self.need(task.output)
        until = time.monotonic() + (self.left_s() - RESERVE_S) * share
        reads, writes = self.planned(task, source)
        results = self.results[task.name] = Results(reads, writes)
        everyone = list(self.contenders(task, source, results))
        for contender in everyone:
            if contender.ours and contender.name.endswith("(cuda)") and self.args.device[0] != "cuda":
                self.once(task, contender, source)  # compiles
        shuffle = random.Random(self.args.seed)
        for number in range(self.args.rounds):
            results.hash_rates.append(hash_rate())
            shuffle.shuffle(everyone)
            self.round(task, everyone, source, number, until if number else self.deadline - RESERVE_S)
        for number in range(self.args.peer_rounds):
            self.round(task, list(self.peers(task, source)), source, number, until)

    def round(self, task: Task, everyone: list[Contender], source: Path, number: int, until: float) -> None:
        """A run of each, but of those that would not end in time or failed in an earlier round."""
        late = []
        for contender in everyone:
            runs = self.results[task.name].runs.setdefault(contender.name, [])
            left_s = until - time.monotonic()
            if left_s < max((run.wall_s for run in runs), default=5) * 1.2:
                late.append(contender.name)
            elif runs or not number:
                run = self.once(task, contender, source, check=number == 0, limit_s=left_s)
                runs += [run] if run else []
        if late:
            self.note(f"NOT RUN, no time: {task.name}, round {number + 1}: {', '.join(late)}")

    def once(
        self, task: Task, contender: Contender, source: Path, *, check: bool = False, limit_s: float = float("inf")
    ) -> Run | None:
        """One run, its output compared where asked for, then deleted. None, and a note, where it failed."""
        out = self.work / "out"
        set_cache(source, self.args.cache)
        cached = resident_share(source)
        limit_s = max(1, min(limit_s, self.left_s() - RESERVE_S))
        try:
            run = measure(contender.line(out), out if task.output else None, self.log, limit_s)
            if check and self.args.compare and task.equals and not contender.bound:
                self.hold_against(task, contender, out)
        except RunError as exc:
            self.note(f"{task.name}: {contender.name} FAILED: {exc}", failed=contender.ours and not self.is_over())
            return None
        finally:
            shutil.rmtree(out, ignore_errors=True)
        print(
            f"{task.name:9} {contender.name:24} {run.wall_s:7.2f} s  cpu {run.cpu_s:6.1f} s  "
            f"rss {run.rss_bytes / 2**20:7.0f} MiB  input cached {cached:.0%}  load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        return run

    def hold_against(self, task: Task, contender: Contender, out: Path) -> None:
        assert task.equals is not None
        count, problems = compare.compare(self.need(task.equals), out, min(16, CORES))
        verdict = "equal bits" if not problems else f"{len(problems)} DIFFERENCES, the first: {problems[0]}"
        self.note(
            f"{task.name}: {contender.name} against our {task.equals}: {count:,} tensors, {verdict}",
            failed=bool(problems),
        )

    def planned(self, task: Task, source: Path) -> tuple[int, int]:
        """Bytes of the input that are needed, each counted once, and bytes written."""
        size = folder_bytes(source)
        if task.output is None:
            return size, 0
        command = [*ours(task, source, self.work / "planned", "cpu", 0), "--dry-run", "--json"]
        command.remove("--quiet")
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
        if done.returncode != 0:
            raise RunError(f"no plan of ours: {done.stderr}")
        plan = json.loads(done.stdout)
        return min(size, plan["read_bytes"]), plan["write_bytes"]

    def contenders(self, task: Task, source: Path, results: Results) -> Iterator[Contender]:
        for device in self.args.device if task.computes else [None]:
            line = ours(task, source, "{out}", device, self.args.jobs)
            yield Contender(f"{OURS} ({device})" if device else OURS, tuple(line))
        if task.output is None:
            yield Contender(f"{OURS} --values", (*ours(task, source, "", None, self.args.jobs), "--values"))
            files = f"ls {shlex.quote(str(source))}/*.safetensors"
            count = len(list(source.glob("*.safetensors")))
            for name, program in zip(SUMS, ("sha256sum", "openssl dgst -sha256"), strict=True):
                yield Contender(name, ("sh", "-c", f"{files} | xargs -P {count} -n 1 {program}"))
            return
        threads = ("--threads", str(self.args.jobs)) if self.args.jobs else ()
        sizes = (str(results.read_bytes), str(results.written_bytes), *threads)
        plain = (sys.executable, str(HERE / "plain_io.py"), str(source), "{out}", *sizes)
        yield Contender(PLAIN[0], plain)
        yield Contender(PLAIN[1], (*plain, "--direct"))
        if self.args.cache == "cold":
            yield Contender(PLAIN[2], (*plain, "--direct", "--direct-reads"))
        if not task.computes:
            yield Contender(CP, ("cp", "-r", str(source), "{out}"))

    def peers(self, task: Task, source: Path) -> Iterator[Contender]:
        scripts, python, folder = self.args.peers, self.args.peers_python, str(source)
        line: tuple[str, ...]
        if scripts and task.name == "shard":
            experts = str(json.loads((source / "config.json").read_text())["n_routed_experts"])
            line = (python, str(scripts / "convert.py"), "--hf-ckpt-path", folder, "--save-path", "{out}")
            yield Contender("convert.py", (*line, "--n-experts", experts, "--model-parallel", "8"))
        if scripts and task.name == "cast" and cuda_is_there(python):
            line = (python, str(scripts / "fp8_cast_bf16.py"), "--input-fp8-hf-path", folder)
            yield Contender("fp8_cast_bf16.py", (*line, "--output-bf16-hf-path", "{out}"))
        if self.args.ct_python and task.name == "cast":
            device = "cuda" if cuda_is_there(self.args.ct_python) else "cpu"
            line = (self.args.ct_python, "-c", CT_CODE, folder, "{out}", device)
            yield Contender(f"compressed-tensors ({device})", line)


def sources_of(task: Task) -> list[str]:
    """The folder that a task reads, the one that this is made from, and so on."""
    made = next((other for other in TASKS if other.output == task.source), None)
    return [task.source, *(sources_of(made) if made else [])]


def ours(task: Task, source: Path, target: Path | str, device: str | None, jobs: int) -> list[str]:
    """A command line of ours."""
    command = [sys.executable, "-m", "weightkit", *task.arguments, str(source), *([str(target)] if task.output else [])]
    command += ["--device", device] if task.computes and device else []
    return [*command, *(["--jobs", str(jobs)] if jobs else []), "--quiet"]


def ceilings(everything: dict[str, Results]) -> str:
    """What bounds each task, and how it is made up."""
    lines = [
        "| | reads GB | writes GB | plain I/O s | SHA-256 s, at GB/s | ceiling s |",
        "|---|---|---|---|---|---|",
    ]
    for task, results in everything.items():
        hashing = (
            f"{results.hash_s():.2f}, {statistics.median(results.hash_rates) / 1e9:.2f}" if results.hash_s() else ""
        )
        lines.append(
            f"| {task} | {results.read_bytes / 1e9:.2f} | {results.written_bytes / 1e9:.2f} | "
            f"{shown(results.fastest_s(PLAIN))} | {hashing} | {shown(results.ceiling_s())} |"
        )
    return "\n".join(lines)


def table(everything: dict[str, Results], torch: int) -> str:
    lines = [
        "| | | wall s (each round) | GB/s | x ceiling | RSS MiB | beyond torch | anon MiB | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for task, results in everything.items():
        for name in sorted(filter(results.runs.get, results.runs), key=lambda name: results.wall_s(name) or 0):
            lines.append(f"| {task} | {name} | {row(name, results, torch)} |")
    return "\n".join(lines)


def row(name: str, results: Results, torch: int) -> str:
    runs, wall, ceiling = results.runs[name], results.wall_s(name), results.ceiling_s()
    assert wall is not None
    each = ", ".join(f"{run.wall_s:.2f}" for run in runs)
    rate = (results.read_bytes + results.written_bytes) / wall / 1e9
    rss, anon = (max(getattr(run, key) for run in runs) for key in ("rss_bytes", "anonymous_bytes"))
    cpu = statistics.median(run.cpu_s for run in runs)
    memory = [f"{size / 2**20:,.0f}" for size in (rss, rss - torch, anon)]
    if name in SUMS:
        memory = ["", "", ""]  # of the shell alone
    return " | ".join(
        [f"**{wall:.2f}** ({each})", f"{rate:.2f}", shown(ceiling and wall / ceiling), *memory, f"{cpu:.1f}"]
    )


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure weightkit beside the machine's ceiling and other tools.")
    names = [task.name for task in TASKS]
    parser.add_argument("--work", type=Path, required=True, help="folder on the disk that is meant")
    parser.add_argument("--gb", type=float, default=6, help="of the checkpoint without MTP layer, at least 1.8")
    parser.add_argument("--shard-gb", type=float, default=0.5, help="its shards; small, for a real one has many")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="TASK", help=", ".join(names))
    parser.add_argument("--growth", nargs="+", type=float, metavar="GB", help="shard and cast at these sizes instead")
    parser.add_argument("--peers", type=Path, help="DeepSeek's inference folder")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter for DeepSeek's scripts")
    parser.add_argument("--ct-python", help="interpreter that has compressed-tensors")
    parser.add_argument("--rounds", type=int, help="default 3, for --growth 2")
    parser.add_argument("--peer-rounds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=0, help="0: the default")
    parser.add_argument(
        "--device", nargs="+", choices=("cuda", "cpu"), help="rows of cast; default cpu, and cuda if any"
    )
    parser.add_argument("--cache", choices=("warm", "cold"), help="default warm, for --growth cold")
    parser.add_argument("--compare", action="store_true", help="hold the outputs against each other")
    parser.add_argument("--limit-s", type=float, default=3600, help="seconds for all of it")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--out", type=Path, help="append the report to this file too")
    args = parser.parse_args()
    args.device = args.device or (["cpu", "cuda"] if cuda_is_there() else ["cpu"])
    args.rounds = args.rounds or (2 if args.growth else 3)
    args.cache = args.cache or ("cold" if args.growth else "warm")
    args.work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(args.work).free
    if not args.growth and free < 5 * args.gb * 1e9:
        parser.error(f"--gb {args.gb:g} needs {5 * args.gb:.0f} GB of disk, and {free / 1e9:.0f} are free")
    if (args.work / FOLDER).exists():
        parser.error(f"{args.work / FOLDER} is there, of another run: delete it")
    return args


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    bench = Bench(args)
    bench.work.mkdir()
    try:
        described = machine()
        torch, command = torch_bytes(bench.log, "cpu"), shlex.join(["bench_convert.py", *sys.argv[1:]])
        header = f"{described}. `import torch`: {torch / 2**20:,.0f} MiB"
        if "cuda" in args.device:
            header += f", {torch_bytes(bench.log, 'cuda') / 2**20:,.0f} with a CUDA context"
        if args.growth:
            tables = growth.report(growth.measure_sizes(bench, args.growth), torch)
        else:
            bench.run()
            tables = f"{ceilings(bench.results)}\n\n{table(bench.results, torch)}"
    finally:
        shutil.rmtree(bench.work)
    notes = "\n".join(f"- {note}" for note in bench.notes)
    text = f"{header}. {args.cache} cache.\n\n    {command}\n\n{tables}\n\n{notes}\n"
    print("\n" + text, flush=True)
    if args.out:
        with args.out.open("a") as file:
            file.write(text + "\n")
    sys.exit(1 if bench.failed else 0)


if __name__ == "__main__":
    main()
