"""Run a write over and over in forked children that die: killed from outside at random times, or by their own hand at a
chosen step. A process of its own, with no threads, so that forking it is safe.

    python crash_driver.py SOURCE TARGET cast|shard|strip --times SECONDS KILLS SEED
    python crash_driver.py SOURCE TARGET cast|shard|strip --steps FIRST STRIDE

Prints one JSON object that says what happened.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import weightkit as wk
from weightkit.checkpoint import Checkpoint
from weightkit.layouts import FileSet
from weightkit.writer import files as filling
from weightkit.writer import pieces as cutting
from weightkit.writer import stream

KINDS: dict[str, Callable[[Checkpoint], Checkpoint | FileSet]] = {
    "cast": lambda checkpoint: wk.cast(checkpoint, "bf16"),
    "shard": lambda checkpoint: wk.shard(checkpoint, mp=4),
    "strip": wk.strip_mtp,
}


def small_steps(buffer_bytes: int, durable_bytes: int) -> None:
    """Buffers and durable stretches so small that a small checkpoint has many."""
    stream.BUFFER_BYTES = filling.BUFFER_BYTES = buffer_bytes
    filling.DURABLE_EVERY_BYTES = durable_bytes
    cutting.COPY_BYTES = cutting.STRIP_BYTES = buffer_bytes


def write(source: Path, target: Path, kind: str, jobs: int) -> None:
    wk.write(KINDS[kind](wk.open_checkpoint(source)), target, jobs=jobs, device="cpu", progress=False)


def in_child(work: Callable[[], None]) -> int:
    """The child's process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int, kill_after_s: float | None = None) -> int | None:
    """The exit status of a child that ended by itself, None where a kill ended it."""
    deadline = None if kill_after_s is None else time.monotonic() + kill_after_s
    while True:
        found, status = os.waitpid(pid, 0 if deadline is None else os.WNOHANG)
        if found:
            return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        if deadline is not None and time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            deadline = None
        time.sleep(0.002)


def at_random_times(source: Path, target: Path, kind: str, whole_s: float, kills: int, seed: int) -> dict[str, int]:
    """Kill runs until so many were killed, then let one go on to its end; a run that completes before is kept, and the
    next begins anew beside it. ``whole_s``, of a run without kills, is a guess, corrected by such runs."""
    rng = random.Random(seed)
    killed = completed = 0
    while True:
        is_new, started = not target.exists(), time.monotonic()
        pid = in_child(lambda: write(source, target, kind, jobs=2))
        status = ended(pid, rng.uniform(0.02, whole_s * 0.4) if killed < kills else None)
        if status is None:
            killed += 1
            continue
        if status != 0:
            raise SystemExit(f"a run failed with status {status}")
        target.rename(target.with_name(f"{target.name}-{completed}"))
        completed += 1
        if killed == kills:
            return {"killed": killed, "completed": completed}
        if is_new:
            whole_s = min(whole_s, time.monotonic() - started)


def die_at(step: int) -> None:
    """Die at the n-th of all calls that change the disk, half of them before the call and half after."""
    numbers = itertools.count(1)

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            number = next(numbers)
            if number == step and step % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*args, **options)
            finally:
                if number == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    for name in ("pwrite", "fsync", "fdatasync", "ftruncate", "mkdir", "rename", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    for name in ("rename", "unlink", "rmdir", "mkdir"):
        setattr(Path, name, dying(getattr(Path, name)))


def at_steps(source: Path, target: Path, kind: str, first: int, stride: int) -> dict[str, int]:
    """Die at each of the steps of a run, then at a step of the run that continues it, then complete."""
    reference = target.with_name(f"{target.name}-reference")
    if ended(in_child(lambda: write(source, reference, kind, jobs=1))) != 0:
        raise SystemExit("the run without deaths failed")
    expected = contents(reference)
    for step in range(first, 100_000, stride):
        runs: list[int | None] = []
        for death in (step, step // 3 + 1, None):
            pid = in_child(lambda death=death: (die_at(death) if death else None, write(source, target, kind, jobs=1)))  # type: ignore[misc]
            runs.append(ended(pid))
        if runs[-1] != 0 or 1 in runs:
            raise SystemExit(f"step {step}: a run failed: {runs}")
        if contents(target) != expected:
            raise SystemExit(f"step {step}: the result differs")
        shutil.rmtree(target)
        if runs[0] is not None:
            return {"died": (step - first) // stride, "steps": step}
    raise SystemExit("the run never got through")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main() -> None:
    source, target, kind, mode, *numbers = sys.argv[1:]
    if kind == "cast":
        import weightkit.kernels._fp8_numba  # noqa: F401 - compiled once, not in each child
    if mode == "--times":
        small_steps(256 << 10, 4 << 20)
        whole_s, kills, seed = float(numbers[0]), int(numbers[1]), int(numbers[2])
        found = at_random_times(Path(source), Path(target), kind, whole_s, kills, seed)
    else:
        small_steps(64 << 10, 256 << 10)
        found = at_steps(Path(source), Path(target), kind, int(numbers[0]), int(numbers[1]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
