"""Generation on several ranks: torchrun's processes, each with its share of the weights, on one machine or several.

Every rank runs the same ``Runtime`` on the same prompt; what rank 0 draws is taken by all, and rank 0 alone prints.
Before a weight is read all ranks say what they have, and all that is wrong with any of them is one error on rank 0.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from weightkit.checkpoint import Checkpoint
from weightkit.compute.engines import DeviceName
from weightkit.errors import CheckpointError, DeviceError, PlanError, Problems, SpaceError, WeightkitError, raise_all
from weightkit.family import legal_mp, mp_problems
from weightkit.generation.memory import divide
from weightkit.generation.runtime import PREFILL_TOKENS, Runtime
from weightkit.layouts import open_checkpoint
from weightkit.layouts.declare import architecture_of
from weightkit.layouts.ranks import rank_sets
from weightkit.model.memory import FREE_SHARE, free_memory_bytes
from weightkit.ranks import World
from weightkit.ranks.failures import leave_quietly, together
from weightkit.ranks.ranks import Ranks
from weightkit.units import counted, human_bytes
from weightkit.version import build

T = TypeVar("T")

CACHE_TOKENS = 1024
"""Tokens that there must be room for beside the weights. What the prompts at hand take is checked again when they are
known, before the first weight is read."""


@dataclass(frozen=True)
class RankReport:
    """What one rank has, as all learn it before anything is loaded.

    Attributes:
        world: which rank, and where.
        versions: of weightkit, torch and Python.
        device: ``cpu``, or the GPU's name; None where there was no use for it.
        source: a digest of the config and of the names, dtypes and shapes of all tensors; None where they cannot be
            opened.
        problems: what is wrong with it alone.
    """

    world: World
    versions: str
    device: str | None = None
    source: str | None = None
    problems: tuple[WeightkitError, ...] = ()


@contextmanager
def open_on_ranks(
    source: str | Path | Callable[[], Path],
    *,
    config: str | Path | None = None,
    device: DeviceName = "auto",
    cache_tokens: int = CACHE_TOKENS,
    **options: Any,
) -> Iterator[Runtime]:
    """This rank's ``Runtime``, once all ranks are known to be fit; without torchrun, one that has the whole model.

    All ranks must do the same with it; what others than rank 0 print within the body goes nowhere. A failure on any of
    them ends all; see ``weightkit.ranks.failures.together``.

    Args:
        source: the published layout in any dtype, or the files of as many ranks as there are processes; or what finds
            it, and may fail.
        config: see ``open_checkpoint``.
        device: ``auto``: of the GPUs the one of the local rank, else the CPU.
        cache_tokens: tokens that there must be room for in the cache.
        options: of ``Runtime``. Memory that is not named is what is free, divided among the ranks of a machine where
            they share it.

    Raises:
        WeightkitError: on rank 0, with the problems of all ranks; later, of this rank.
        SystemExit: on the other ranks.
    """
    world = World.of_environment()
    if world.size == 1:
        path = source() if callable(source) else source
        with Runtime(open_checkpoint(path, config=config), device=device, **options) as runtime:
            yield runtime
        return
    ranks = Ranks.join(torch.device("cpu"))
    with together(ranks, world):
        prepared, report = _prepare(source, world, ranks, config, device, cache_tokens, options)
        problems = verdict(ranks.everybodys(report))
    if problems or prepared is None:
        if world.rank > 0:
            leave_quietly()
        where = source if isinstance(source, (str, Path)) else None
        raise_all(f"not fit to run on {counted(world.size, 'rank')}", problems, where=where)
        leave_quietly()
    with together(ranks, world), prepared as runtime, _silence(world):
        ranks.move_to(runtime.weights.device)
        yield runtime
    ranks.leave()


def verdict(reports: Sequence[RankReport]) -> list[WeightkitError]:
    """All that is wrong with these ranks, told once where it is the same on several."""
    shared: dict[str, tuple[WeightkitError, list[World]]] = {}
    for report in reports:
        for problem in report.problems:
            shared.setdefault(str(problem), (problem, []))[1].append(report.world)
    problems = [_on(problem, worlds, len(reports)) for problem, worlds in shared.values()]
    differences = (
        ("different devices", "device", "Use --device, or machines of one kind."),
        ("different versions", "versions", "Install the same on every machine."),
        ("different checkpoints", "source", "Copy the same files to every machine."),
    )
    for what, attribute, fix in differences:
        found: dict[str, list[int]] = {}
        for report in reports:
            if (value := getattr(report, attribute)) is not None:
                found.setdefault(value, []).append(report.world.rank)
        if len(found) > 1:
            listing = "; ".join(f"{value} on {_ranks_of(held)}" for value, held in found.items())
            problems.append(DeviceError(f"{what} on the ranks", found=listing, fix=fix))
    return problems


@contextmanager
def _silence(world: World) -> Iterator[None]:
    """On ranks after the first, nowhere for what they print."""
    if world.rank == 0:
        yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _prepare(
    source: str | Path | Callable[[], Path],
    world: World,
    ranks: Ranks,
    config: str | Path | None,
    device: DeviceName,
    cache_tokens: int,
    options: Mapping[str, Any],
) -> tuple[Runtime | None, RankReport]:
    """This rank's runtime, which has read no weights yet, and the report."""
    report = RankReport(world, _versions())
    problems: list[WeightkitError] = []
    given = _attempt(problems, lambda: _open(Path(source() if callable(source) else source), world, config))
    place = _attempt(problems, lambda: take_device(device, world))
    if given is not None:
        report = replace(report, source=_digest(given))
        _attempt(problems, lambda: _require_degree(given, world.size))
    if given is None or place is None or problems:
        return None, replace(report, problems=tuple(problems))
    given_options = _budgets(world, options)
    runtime = _attempt(problems, lambda: Runtime(given, device=place, ranks=ranks, **given_options))
    if runtime is None:
        return None, replace(report, problems=tuple(problems))
    where = runtime.weights.device
    report = replace(report, device="cpu" if where.type == "cpu" else torch.cuda.get_device_name(where))
    _attempt(problems, lambda: require_memory(runtime, cache_tokens, given_options))
    return runtime, replace(report, problems=tuple(problems))


def _attempt(problems: list[WeightkitError], make: Callable[[], T]) -> T | None:
    """What ``make`` returns; None where it fails, for a reason that is then one of the ``problems``."""
    try:
        return make()
    except Problems as several:
        problems += several.problems
    except WeightkitError as problem:
        problems.append(problem)
    except OSError as exc:
        problems.append(CheckpointError(f"cannot be read ({exc.strerror})", where=exc.filename))
    return None


def _open(path: Path, world: World, config: str | Path | None) -> Checkpoint:
    """The checkpoint; of rank files only those of as many ranks as there are processes."""
    sets = rank_sets(path) if path.is_dir() else []
    if len(sets) == 1 and sets[0].size != world.size:
        size = sets[0].size
        raise PlanError(
            "the files are of another number of ranks",
            where=path,
            expected=f"{size} processes, for {sets[0].name(0)} to {sets[0].name(size - 1)}",
            found=world.size,
            fix=f"Start {size} ranks in all, or one process; or write the files again with `weightkit shard --mp "
            f"{world.size}`.",
        )
    return open_checkpoint(path, config=config, replicas_of=world.rank)


def _require_degree(checkpoint: Checkpoint, size: int) -> None:
    """Raise what forbids dividing the checkpoint among so many ranks."""
    arch = architecture_of(checkpoint)
    fp8 = "F8_E4M3" in checkpoint.dtypes
    reasons = mp_problems(arch, size, fp8=fp8, gptq=arch.is_gptq)
    if not reasons:
        return
    legal = ", ".join(map(str, legal_mp(arch, fp8=fp8, gptq=arch.is_gptq)))
    what = "\n".join(map(str, reasons))
    raise PlanError(what, fix=f"This checkpoint can be divided among so many ranks: {legal}. Use one of them.")


def take_device(device: DeviceName, world: World) -> DeviceName:
    """Make the local rank's GPU the only one that this process sees, where GPUs are to be used.

    So ``cuda`` means that one in every thread and library. Must come before anything else asks CUDA.

    Raises:
        DeviceError: fewer GPUs than ranks on this machine, or none where one was asked for.
    """
    if device == "cpu":
        return device
    found = torch.cuda.device_count()  # asks NVML: CUDA itself would look at the variable below only once
    if device == "auto" and found == 0:
        return "cpu"
    if found < world.local_size:
        raise DeviceError(
            "fewer GPUs than ranks on this machine",
            where=world.host,
            expected=f"{world.local_size} GPUs",
            found=found,
            fix="Start fewer ranks here (--nproc-per-node), more machines (--nnodes), or use --device cpu.",
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[world.local_rank].strip() if visible[0] else str(world.local_rank)
    return "cuda"


def _budgets(world: World, options: Mapping[str, Any]) -> dict[str, Any]:
    """``options``, with the host's memory divided among the ranks that share it."""
    host = int(free_memory_bytes(torch.device("cpu")) * FREE_SHARE) // world.local_size
    return {**options, "host_memory": host} if options.get("host_memory") is None else dict(options)


def require_memory(runtime: Runtime, tokens: int, options: Mapping[str, Any]) -> None:
    """Raise ``SpaceError`` where this rank's weights do not fit beside what ``tokens`` take, unless budgets were named,
    or streaming: ranks are for models that are to stay in memory."""
    weights = runtime.weights
    budget = divide(
        weights,
        tokens=tokens,
        sequences=1,
        most_tokens=PREFILL_TOKENS,
        gpu_memory=options.get("gpu_memory"),
        host_memory=options.get("host_memory"),
    )
    asked = options.get("stream") or any(options.get(name) is not None for name in ("gpu_memory", "memory_bytes"))
    if not asked and min(weights.packed_bytes, weights.sizes.dense) > budget.device_weights:
        raise SpaceError(
            "a rank's share of the weights does not fit in memory",
            where="--gpu-memory" if weights.device.type == "cuda" else "--host-memory",
            expected=f"{human_bytes(weights.packed_bytes)} for weights, {human_bytes(budget.working)} beside them",
            found=human_bytes(budget.device),
            fix="Use more ranks, or --stream: what does not fit is then read again for each token.",
        )


def _versions() -> str:
    return f"weightkit {build()}, torch {torch.__version__}, Python {platform.python_version()}"


def _digest(checkpoint: Checkpoint) -> str:
    """Of what is in the config and the headers, wherever the files lie and whichever rank's they are."""
    described = [[name, tensor.dtype, tensor.shape] for name, tensor in checkpoint.tensors.items()]
    return hashlib.sha256(json.dumps([checkpoint.config, described], sort_keys=True).encode()).hexdigest()[:12]


def _on(problem: WeightkitError, worlds: Sequence[World], size: int) -> WeightkitError:
    """The problem, with the ranks that have it, unless all do."""
    if len(worlds) < size:
        hosts = ", ".join(sorted({world.host for world in worlds}))
        place = f"{_ranks_of([world.rank for world in worlds])} ({hosts})"
        problem.where = place if problem.where is None else f"{place}: {problem.where}"
    return problem


def _ranks_of(numbers: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0-3, 5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    listing = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"rank{'s' * (len(numbers) > 1)} {listing}"
