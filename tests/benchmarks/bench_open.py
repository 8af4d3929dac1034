"""How long DeepSeek-V3 at full size takes to open and to plan: 163 files, 91,991 tensors, data as holes.

    python tests/benchmarks/bench_open.py [FOLDER]

The headers are read from the page cache. The target is under 3 s for opening.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from sparse import write_known

import weightkit as wk
from weightkit.layouts import FileSet, lay_out_published
from weightkit.writer import make_plan

ROUNDS = 5
PLANS: dict[str, Callable[[wk.Checkpoint], FileSet]] = {
    "strip": lambda checkpoint: lay_out_published(wk.strip_mtp(checkpoint)),
    "cast --to bf16": lambda checkpoint: lay_out_published(wk.cast(checkpoint, "bf16")),
    "shard --mp 8": lambda checkpoint: wk.shard(checkpoint, mp=8),
    "shard --mp 16": lambda checkpoint: wk.shard(checkpoint, mp=16),
    "shard --mp 16 --to bf16": lambda checkpoint: wk.shard(wk.cast(checkpoint, "bf16"), mp=16),
}


def best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of several rounds."""
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        folder = Path(name) / "v3"
        size = write_known(folder)
        checkpoint = wk.open_checkpoint(folder)
        print(f"{len(checkpoint.stamps)} files, {len(checkpoint.tensors):,} tensors, {size:,} bytes of data")
        print(f"{'open':<28} {best(lambda: wk.open_checkpoint(folder)):6.2f} s")
        for title, files in PLANS.items():
            seconds = best(lambda files=files: make_plan(files(checkpoint), folder.parent / "out").hash)  # type: ignore[misc]
            print(f"{'plan ' + title:<28} {seconds:6.2f} s")


if __name__ == "__main__":
    main()
