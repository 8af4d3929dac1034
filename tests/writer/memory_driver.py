"""How much a write adds to this process's largest resident set, beside what the libraries take.

    python memory_driver.py WARM_UP_SOURCE SOURCE TARGET KIND JOBS

Prints JSON: what the plan states as its peak, and by how much the largest resident set grew, in bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import weightkit as wk
from weightkit.checkpoint import Checkpoint
from weightkit.layouts import FileSet, lay_out_published
from weightkit.writer import make_plan
from weightkit.writer.executor import execute, peak_memory_bytes

KINDS: dict[str, Callable[[Checkpoint], FileSet]] = {
    "strip": lambda checkpoint: lay_out_published(wk.strip_mtp(checkpoint)),
    "cast-bf16": lambda checkpoint: lay_out_published(wk.cast(checkpoint, "bf16")),
    "cast-f32": lambda checkpoint: lay_out_published(wk.cast(checkpoint, "f32")),
    "shard": lambda checkpoint: wk.shard(checkpoint, mp=4),
    "shard-bf16": lambda checkpoint: wk.shard(wk.cast(checkpoint, "bf16"), mp=8),
}


def largest_bytes() -> int:
    """Of this process alone: ``ru_maxrss`` begins at the size of the process that started it, and hides growth."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    warm_up, source, target, kind, jobs = sys.argv[1:]
    files = KINDS[kind]
    # what is imported and compiled on first use is none of the plan's
    execute(
        make_plan(
            lay_out_published(wk.cast(wk.open_checkpoint(warm_up), kind[-3:] if "f32" in kind else "bf16")),
            f"{target}-warm",
        ),
        progress=False,
    )
    plan = make_plan(files(wk.open_checkpoint(source)), target)
    before = largest_bytes()
    execute(plan, jobs=int(jobs), progress=False)
    grown = largest_bytes() - before
    largest = max(file.size_bytes for file in plan.files)
    print(json.dumps({"stated": peak_memory_bytes(plan, int(jobs)), "grown": grown, "largest_file": largest}))
    for path in Path(target).iterdir():
        path.unlink()


if __name__ == "__main__":
    main()
