"""Conversions of a source at an address, from servers on loopback, beside the same of local files.

    python tests/benchmarks/full_width.py --dir /data/fp8 --layers 2 --dense 1 --experts 64 --shard-gb 0.5
    python tests/benchmarks/bench_remote.py /data/fp8 --out /data/out

For each command and source: wall time, bytes from the network, peak of the process's own memory (private dirty pages
are what counts, so the highest RSS less file pages), and most that the spool took of the disk. ``hf`` is `weightkit
mirror` in a process of its own; ``s3`` (with --s3) is moto's server, which is slow and only shows that it works.
Results on loopback say what this side can take, not what a network gives.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMMANDS = {
    "shard --mp 8": ("shard", "--mp", "8"),
    "strip": ("strip",),
    "cast --to bf16": ("cast", "--to", "bf16"),
}


@contextmanager
def mirror(folder: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "weightkit", "mirror", "--name", f"org/source={folder}", "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["endpoint"]
        process.terminate()


def anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


def folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("*"):
        try:
            total += path.stat().st_blocks * 512
        except OSError:
            continue
    return total


def run(arguments: list[str], out: Path, environment: dict[str, str]) -> dict[str, object]:
    """One command, watched. Its own account of it, and what was seen from outside."""
    shutil.rmtree(out, ignore_errors=True)
    started = time.monotonic()
    command = [sys.executable, "-m", "weightkit", *arguments, str(out), "-q", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        most = {"memory": 0, "spool": 0}
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.05):
                most["memory"] = max(most["memory"], anonymous_bytes(process.pid))
                most["spool"] = max(most["spool"], folder_bytes(out / ".weightkit/spool"))

        watcher = threading.Thread(target=watch)
        watcher.start()
        said, _ = process.communicate()
        done.set()
        watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return {"wall_s": time.monotonic() - started, **most, **json.loads(said)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Conversions of a source at an address.")
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", action="append", choices=COMMANDS)
    options = parser.parse_args()
    print("| command | source | s | read | memory | spool | verified |\n|---|---|---|---|---|---|---|")
    with mirror(options.source) as endpoint:
        environment = os.environ | {"HF_ENDPOINT": endpoint}
        sources = {
            "local": [str(options.source)],
            "hf, spool": ["hf://org/source"],
            "hf, small spool": ["hf://org/source", "--spool", "1.5GB"],
            "hf, ranges": ["hf://org/source", "--spool", "0"],
        }
        for name, command in COMMANDS.items():
            if options.only and name not in options.only:
                continue
            for source, where in sources.items():
                extra, place = where[1:], where[0]
                found = run([*command, *extra, place], options.out, environment)
                shutil.rmtree(options.out, ignore_errors=True)
                sizes = [f"{float(str(found[key])) / 1e9:.2f} GB" for key in ("read_bytes", "memory", "spool")]
                verified = len(found["verified"])  # type: ignore[arg-type]
                print(f"| {name} | {source} | {found['wall_s']:.1f} | {' | '.join(sizes)} | {verified} |", flush=True)


if __name__ == "__main__":
    main()
