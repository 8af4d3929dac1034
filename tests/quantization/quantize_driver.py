"""Run quantizations in forked children: some that die at a chosen step, some that are ranks of one. A process of its
own, with no threads, so that forking it is safe.

    python quantize_driver.py stops SOURCE TOKENS TARGET FIRST STRIDE
    python quantize_driver.py places SOURCE TOKENS TARGET
    python quantize_driver.py ranks SIZE SOURCE TOKENS TARGET
    python quantize_driver.py killed-ranks SOURCE TOKENS TARGET
    python quantize_driver.py command SIZE ARGUMENT...
    torchrun --nproc-per-node SIZE quantize_driver.py rank SOURCE TOKENS TARGET

Prints one JSON object that says what happened.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import weightkit.kernels._fp8_numba  # noqa: F401 - compiled once, not in each child
from weightkit.quantization import QuantizationReport, Settings, activations, layer, quantize
from weightkit.quantization.outbox import Outbox
from weightkit.quantization.solver import Solver
from weightkit.quantization.state import State
from weightkit.ranks.launch import held_port
from weightkit.writer import files, stream
from weightkit.writer.executor import Run

SETTINGS = {
    "experts": Settings(group_size=16),
    "all": Settings(group_size=16, scope="all", order="none"),
    "rtn": Settings(group_size=16, method="rtn", mtp=False),
}
#: What changes the disk, and what happens in between: where it is looked up, and its name.
DISK = ("pwrite", "fsync", "fdatasync", "ftruncate", "mkdir", "rename", "unlink", "rmdir")
STEPS: list[tuple[Any, str]] = [
    *((os, name) for name in DISK),
    *((Path, name) for name in ("mkdir", "rename", "unlink")),
    (Solver, "solve"),
]
#: Places to die before, and at which of their calls. Layers 1 and 2 each take 10 solutions.
PLACES: list[tuple[Any, str, tuple[int, ...]]] = [
    (Solver, "solve", (1, 10, 15)),
    (Outbox, "allow", (1, 2)),
    (State, "keep_report", (2, 3)),
    (State, "begin_snapshot", (1,)),
    (State, "write_part", (1,)),
    (State, "finish_snapshot", (1,)),
    (Run, "seal", (1,)),
    (State, "clear", (2,)),
]
#: Those to die after, too.
AFTER = ("allow", "write_part", "seal")


def small_steps() -> None:
    """Batches, chunks and buffers so small that a small model has many."""
    torch.set_num_threads(1)
    activations.BATCH_TOKENS, layer.CHUNK_TOKENS, layer.HELD_TOKENS = 64, 24, 48
    stream.BUFFER_BYTES = files.BUFFER_BYTES = 32 << 10
    files.DURABLE_EVERY_BYTES = 64 << 10


def run(source: Path, tokens: Path, target: Path, kind: str) -> QuantizationReport | None:
    """Sequences of 32 of all that the file has."""
    return quantize(
        source,
        target,
        SETTINGS[kind],
        calibration=tokens,
        samples=8,
        seq_len=32,
        device="cpu",
        snapshot_layers=1,
        progress=False,
    )


def in_child(work: Callable[[], object]) -> int:
    """The child's process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int | None:
    """The exit status of a child that ended by itself, None of one that was killed."""
    _, status = os.waitpid(pid, 0)
    return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


# --- stops ------------------------------------------------------------------------------------------------------------


def die_at(step: int, told: int, steps: Iterable[tuple[Any, str]] = STEPS, *, before: bool | None = None) -> None:
    """Die at the n-th of all these calls, ``before`` it or after (if not said, half of them so); tell ``told`` its
    name."""
    before = step // 2 % 2 == 1 if before is None else before
    numbers = itertools.count(1)

    def dying(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def die() -> None:
            os.write(told, f"{name}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

        def wrapped(*args: Any, **options: Any) -> Any:
            number = next(numbers)
            if number == step and before:
                die()
            try:
                return call(*args, **options)
            finally:
                if number == step:
                    die()

        return wrapped

    for place, name in steps:
        setattr(place, name, dying(name, getattr(place, name)))


def at_steps(source: Path, tokens: Path, target: Path, first: int, stride: int) -> dict[str, Any]:
    """Die at each of the steps of a run, then at a step of the run that continues it, then complete."""
    reference = target.with_name(f"{target.name}-reference")
    if ended(in_child(lambda: run(source, tokens, reference, "experts"))) != 0:
        raise SystemExit("the run without deaths failed")
    expected = outcome(reference)
    listening, told = os.pipe()
    died: list[str] = []
    for step in range(first, 100_000, stride):
        runs: list[int | None] = []
        for death in (step, step // 2 + 1, None):

            def work(death: int | None = death) -> None:
                if death is not None:
                    die_at(death, told)
                run(source, tokens, target, "experts")

            runs.append(ended(in_child(work)))
            if runs[-1] is None:
                died.append(os.read(listening, 100).decode().strip())
        if runs[-1] != 0 or 1 in runs:
            raise SystemExit(f"step {step}: a run failed: {runs}")
        if outcome(target) != expected:
            raise SystemExit(f"step {step}, at {died[-1]}: the result differs")
        if (target / ".weightkit").exists():
            raise SystemExit(f"step {step}, at {died[-1]}: state is left behind")
        shutil.rmtree(target)
        if runs[0] is not None:
            return {"died": died, "steps": step}
    raise SystemExit("the run never got through")


def at_places(source: Path, tokens: Path, target: Path) -> dict[str, Any]:
    """Die at each of the ``PLACES``; then complete."""
    reference = target.with_name(f"{target.name}-reference")
    if ended(in_child(lambda: run(source, tokens, reference, "experts"))) != 0:
        raise SystemExit("the run without deaths failed")
    expected, died = outcome(reference), []
    listening, told = os.pipe()
    for place, name, numbers in PLACES:
        for number, before in itertools.product(numbers, (True, False) if name in AFTER else (True,)):

            def work() -> None:
                die_at(number, told, [(place, name)], before=before)  # noqa: B023 - it runs within the loop
                run(source, tokens, target, "experts")

            if (status := ended(in_child(work))) is not None:
                raise SystemExit(f"{name} {number}: not reached, status {status}")
            died.append(os.read(listening, 100).decode().strip())
            if ended(in_child(lambda: run(source, tokens, target, "experts"))) != 0:
                raise SystemExit(f"{name} {number}: the run that continues failed")
            if outcome(target) != expected or (target / ".weightkit").exists():
                raise SystemExit(f"{name} {number}, {before}: the result differs, or state is left behind")
            shutil.rmtree(target)
    return {"died": died}


def outcome(folder: Path) -> dict[str, object]:
    """All that must not depend on stops: every file but the report, and of it every matrix."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and "report" not in path.name}
    report = QuantizationReport.load(folder / "quantization_report.json")
    layers = [(found.layer, found.tokens_by_expert, found.matrices) for found in report.layers]
    return {**files, "layers": layers}


# --- ranks ------------------------------------------------------------------------------------------------------------


def as_ranks(size: int, work: Callable[[int], object]) -> list[int | None]:
    """Exit statuses of ``size`` children, which find in the environment what torchrun would tell them."""

    def child(rank: int, port: int) -> None:
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in told.items()}, MASTER_ADDR="127.0.0.1")
        work(rank)

    with held_port() as port:
        pids = [in_child(lambda rank=rank: child(rank, port)) for rank in range(size)]  # type: ignore[misc]
        return [ended(pid) for pid in pids]


def each_kind(source: Path, tokens: Path, target: Path) -> dict[str, bool]:
    """All settings one after the other; whether this process got a report."""
    return {kind: run(source, tokens, target / kind, kind) is not None for kind in SETTINGS}


def killed_ranks(source: Path, tokens: Path, target: Path) -> dict[str, Any]:
    """Two ranks, one of which dies in the second of the layers; then three that continue; then a rerun of two."""
    listening, told = os.pipe()
    solves = 2 * 2 + 2 + 3  # gate and up together, and down, of two of the four experts and of the shared ones; and on

    def dying(rank: int) -> None:
        if rank == 0:
            die_at(solves, told, [(Solver, "solve")])
        run(source, tokens, target, "experts")

    first = as_ranks(2, dying)
    left = sorted(path.name for path in (target / ".weightkit/quantization").iterdir())
    second = as_ranks(3, lambda _: run(source, tokens, target, "experts"))
    third = as_ranks(2, lambda _: run(source, tokens, target, "experts"))
    return {"died": os.read(listening, 100).decode().strip(), "left": left, "runs": [first, second, third]}


def command(size: int, arguments: list[str]) -> dict[str, Any]:
    """The command line on each of several ranks."""
    from weightkit.cli import main as command_line

    return {"runs": as_ranks(size, lambda _: command_line(arguments))}


def main() -> None:
    mode, *arguments = sys.argv[1:]
    small_steps()
    found: dict[str, Any]
    if mode == "stops":
        source, tokens, target = map(Path, arguments[:3])
        found = at_steps(source, tokens, target, *map(int, arguments[3:]))
    elif mode == "places":
        source, tokens, target = map(Path, arguments)
        found = at_places(source, tokens, target)
    elif mode == "ranks":
        source, tokens, target = map(Path, arguments[1:])
        found = {"runs": as_ranks(int(arguments[0]), lambda _: each_kind(source, tokens, target))}
    elif mode == "killed-ranks":
        source, tokens, target = map(Path, arguments)
        found = killed_ranks(source, tokens, target)
    elif mode == "rank":
        layer.HELD_TOKENS = 1 << 20  # all inputs of an expert, while the other modes exchange them again
        source, tokens, target = map(Path, arguments)
        found = {"reports": each_kind(source, tokens, target)}
    else:
        found = command(int(arguments[0]), arguments[1:])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
