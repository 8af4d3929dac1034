"""``weightkit fetch`` beside ``hf download`` and ``modelscope download``, from one server on loopback.

    python tests/benchmarks/bench_fetch.py --dir /data --gib 4

Writes --gib of random files into a new folder in --dir, serves them with ``weightkit mirror``, and removes all
afterwards. Each client runs as its users start it, with its own defaults, in a process of its own; clients are shuffled
within each round, and medians over the rounds count.

    wall s       until the command ends
    on disk s    until a following ``sync`` ends, too: who leaves the writing to the kernel has not finished before
    CPU s        of the client alone, user and system
    RSS MiB      its peak; page cache counts in it where a client maps its file
    rerun s      the same command again, all being there
    a wrong byte what becomes of one flipped bit on the way (of 32 MiB, from the tests' hub, before the rounds):
                 the file right in the end, a failure, or the wrong file accepted
"""

from __future__ import annotations

import argparse
import filecmp
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))

from faulty_hub import Flip, spawn_hub

from weightkit.checkpoint.lock import Lock, LockedFile

NAME = "bench/model"
POOL_BYTES = 32 << 20
FIRST = "model-00001.safetensors"
BIN = Path(sys.executable).parent


#: Stands for the target folder in a command.
TARGET = "{target}"


@dataclass(frozen=True)
class Client:
    """A command as its users type it."""

    name: str
    command: Sequence[str]


def fetch_from(hub: str) -> Client:
    command = [sys.executable, "-m", "weightkit", "fetch", NAME, TARGET, "--hub", hub, "--quiet"]
    return Client(f"weightkit fetch --hub {hub}", command)


CLIENTS = (
    fetch_from("huggingface"),
    fetch_from("modelscope"),
    Client("hf download", [str(BIN / "hf"), "download", NAME, "--quiet", "--local-dir", TARGET]),
    Client("modelscope download", [str(BIN / "modelscope"), "download", NAME, "--local-dir", TARGET]),
)


@dataclass(frozen=True)
class Run:
    """One command's cost; times in seconds."""

    code: int
    wall_s: float
    on_disk_s: float
    cpu_s: float
    rss_mib: float


@dataclass
class Results:
    """All rounds of one client."""

    first: list[Run] = field(default_factory=list)
    again: list[Run] = field(default_factory=list)
    wrong_byte: str = ""


def write_repository(folder: Path, total_bytes: int, count: int) -> None:
    """``count`` files of equal size, no two alike, none compressible, and two small ones, with a lock."""
    folder.mkdir(parents=True)
    locked: dict[str, LockedFile] = {}
    pool = bytearray(os.urandom(POOL_BYTES))
    for number in range(1, count + 1):
        digest, left = hashlib.sha256(), total_bytes // count
        path = folder / f"model-{number:05}.safetensors"
        with path.open("wb") as file:
            while left:
                pool[:64] = os.urandom(64)  # each block differs from all others
                block = pool[: min(left, POOL_BYTES)]
                file.write(block)
                digest.update(block)
                left -= len(block)
        locked[path.name] = LockedFile(path.stat().st_size, digest.hexdigest())
    for name in ("config.json", "tokenizer.json"):
        content = json.dumps({"file": name}).encode()
        (folder / name).write_bytes(content)
        locked[name] = LockedFile(len(content), hashlib.sha256(content).hexdigest())
    (folder / "weightkit.lock.json").write_bytes(Lock(locked).to_bytes())


@contextmanager
def mirror(folder: Path) -> Iterator[str]:
    """``weightkit mirror`` in a process of its own; its endpoint."""
    command = [sys.executable, "-m", "weightkit", "mirror", "--name", f"{NAME}={folder}", "--port", "0", "--json", "-q"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            if process.stdout is None or not (said := process.stdout.readline()):
                raise SystemExit("the mirror did not start")
            yield json.loads(said)["endpoint"]
        finally:
            process.terminate()


def run(client: Client, endpoint: str, target: Path, home: Path) -> Run:
    """Run a client to its end."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "HF_ENDPOINT": endpoint,
        "MODELSCOPE_ENDPOINT": endpoint,
        "MODELSCOPE_CACHE": str(home / "modelscope"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [str(target) if word == TARGET else word for word in client.command]
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment, cwd=home, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - started
        os.sync()
        on_disk_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    cpu_s = usage.ru_utime + usage.ru_stime
    return Run(process.returncode, wall_s, on_disk_s, cpu_s, usage.ru_maxrss / 1024)


def is_right(folder: Path, target: Path) -> bool:
    """Whether every file of the repository arrived byte for byte."""
    names = [path.name for path in folder.iterdir() if path.name != "weightkit.lock.json"]
    _, wrong, missing = filecmp.cmpfiles(folder, target, names, shallow=False)
    return not wrong and not missing


def what_becomes_of_a_wrong_byte(client: Client, work: Path) -> str:
    folder, target, home = work / "small", work / "target", work / "home"
    home.mkdir(exist_ok=True)
    with spawn_hub({NAME: folder}) as hub:
        hub.fail(Flip(at=1_000_000), path=FIRST)
        code = run(client, hub.endpoint, target, home).code
    right = target.is_dir() and is_right(folder, target)
    shutil.rmtree(target, ignore_errors=True)
    shutil.rmtree(home)
    return "mended" if right else "accepted" if code == 0 else "an error"


def measure(work: Path, rounds: int, clients: Sequence[Client]) -> dict[str, Results]:
    folder, target, home = work / "repository", work / "target", work / "home"
    results = {client.name: Results() for client in clients}
    for client in clients:
        results[client.name].wrong_byte = what_becomes_of_a_wrong_byte(client, work)
    with mirror(folder) as endpoint:
        for number in range(rounds):
            for client in random.sample(list(clients), len(clients)):
                home.mkdir()
                first = run(client, endpoint, target, home)
                if first.code or (number == 0 and not is_right(folder, target)):
                    raise SystemExit(f"{client.name}: exit code {first.code}, files not right")
                results[client.name].first.append(first)
                results[client.name].again.append(run(client, endpoint, target, home))
                for path in (target, home):
                    shutil.rmtree(path)
                os.sync()
    return results


def table(results: Mapping[str, Results], total_bytes: int) -> str:
    """Markdown."""
    lines = [
        "| client | wall s (each round) | GB/s | on disk s | CPU s | RSS MiB | a wrong byte | rerun s | rerun CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def median(runs: Sequence[Run], key: str) -> float:
        return float(statistics.median(getattr(run, key) for run in runs))

    for name, found in results.items():
        wall_s = median(found.first, "wall_s")
        each = ", ".join(f"{run.wall_s:.1f}" for run in found.first)
        cells = [
            name,
            f"**{wall_s:.2f}** ({each})",
            f"{total_bytes / wall_s / 1e9:.2f}",
            f"{median(found.first, 'on_disk_s'):.2f}",
            f"{median(found.first, 'cpu_s'):.1f}",
            f"{max(run.rss_mib for run in found.first):.0f}",
            found.wrong_byte,
            f"**{median(found.again, 'wall_s'):.2f}**",
            f"{median(found.again, 'cpu_s'):.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="where to write; a new folder inside is used")
    parser.add_argument("--gib", type=float, default=4)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", nargs="*", default=[], help="only those whose name contains one of these")
    arguments = parser.parse_args()
    work = arguments.dir / "bench_fetch"
    work.mkdir(parents=True)
    clients = [c for c in CLIENTS if not arguments.clients or any(word in c.name for word in arguments.clients)]
    try:
        total_bytes = int(arguments.gib * (1 << 30))
        write_repository(work / "small", 32 << 20, 4)
        write_repository(work / "repository", total_bytes, arguments.files)
        print(
            f"{total_bytes / 1e9:.2f} GB in {arguments.files} files, {arguments.rounds} rounds, load {os.getloadavg()}"
        )
        print(table(measure(work, arguments.rounds, clients), total_bytes))
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
