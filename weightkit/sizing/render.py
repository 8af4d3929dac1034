"""A plan for a terminal: the answer first, then what it follows from, at most 100 columns wide."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import ceil

from weightkit.errors import printable
from weightkit.remote.path import is_remote
from weightkit.sizing.memory import STEP_TOKENS
from weightkit.sizing.plan import FormatPlan, Placement, SizingPlan
from weightkit.sizing.routes import MEASURED_ON, MOE_LAYER_S, Route
from weightkit.units import counted, human_binary_bytes, human_seconds

#: Parts of the model as rows name them.
PART_TITLES = {
    "embedding": "embedding",
    "attention": "attention",
    "indexer": "indexer",
    "dense": "dense MLPs",
    "shared": "shared experts",
    "routed": "routed experts",
    "rest": "routers, norms",
    "head": "head",
    "mtp": "MTP layers",
}
Cell = Callable[[FormatPlan], str]


def render_plan(plan: SizingPlan) -> str:
    """All of it."""
    sections = [_question(plan), [_answer(plan, found) for found in plan.formats]]
    sections[1] += [f"{name:5} {printable(why)}" for name, why in plan.missing.items()]
    sections += [_memory(plan), _routes(plan), _notes(plan)]
    return "\n\n".join("\n".join(section) for section in sections if section)


def _question(plan: SizingPlan) -> list[str]:
    machine, load = plan.machine, plan.load
    gpus = counted(machine.gpus, "GPU")
    if machine.gpu_memory is not None:
        gpus += f" of {both(machine.gpu_memory)}, {machine.utilization:.0%} of it usable"
    return [
        f"{printable(plan.model)} ({plan.member}) on {gpus}",
        f"for {counted(load.batch, 'sequence')} of {load.context:,} tokens (context {plan.context_length:,}), "
        + ("MTP layers loaded" if load.mtp else "MTP layers not loaded"),
    ]


def _answer(plan: SizingPlan, found: FormatPlan) -> str:
    """Whether it fits, in one line."""
    return f"{found.name:5} " + "; ".join(_verdict(plan, found))


def _verdict(plan: SizingPlan, found: FormatPlan) -> Iterator[str]:
    place = found.placement
    if place is None:
        yield f"cannot be divided over {counted(plan.machine.gpus, 'GPU')}"
    elif found.usable_bytes is None:
        yield f"needs {both(place.needed_bytes)} of each GPU"
    elif found.fits:
        left, tokens = both(found.left_bytes or 0), found.cache_tokens or 0
        yield f"fits: {left} left of each GPU, {tokens:,} tokens of cache"
    else:
        yield f"does not fit: {both(-(found.left_bytes or 0))} too much for each GPU"
    if found.usable_bytes is not None:
        least = found.smallest
        if least is None:
            yield "on no number of these GPUs"
        elif not found.fits or least.gpus != plan.machine.gpus:
            yield f"fewest GPUs: {least.gpus}" + (" with whole experts" if least.experts == "whole" else "")


def _memory(plan: SizingPlan) -> list[str]:
    formats = plan.formats
    rows: list[tuple[str, Cell] | str] = [
        ("made by", lambda found: found.command.removeprefix("weightkit ") or "as it is"),
        ("on disk, all layers", lambda found: both(found.disk_bytes)),
        ("without MTP layers", lambda found: both(found.main_bytes)),
        ("latent cache a token", lambda found: f"{found.token_cache_bytes:,} B"),
    ]
    if any(found.placements for found in formats):
        rows += [f"on each of {counted(plan.machine.gpus, 'GPU')}", *_rank_rows(plan)]
    rows += [
        "GPUs that divide it",
        ("  experts cut (TP)", lambda found: _numbers(found.legal["cut"])),
        ("  experts whole (EP)", lambda found: _numbers(found.legal["whole"])),
    ]
    if plan.machine.gpu_memory is not None:
        rows.append(("fewest that hold it", _fewest))
    cells = [
        (row, *[""] * len(formats)) if isinstance(row, str) else (row[0], *[row[1](found) for found in formats])
        for row in rows
    ]
    return _table([("", *[found.name for found in formats]), *cells])


def _fewest(found: FormatPlan) -> str:
    return "none" if found.smallest is None else str(found.smallest.gpus)


def _rank_rows(plan: SizingPlan) -> Iterator[tuple[str, Cell]]:
    """Of the placement that is taken; weights with experts cut and whole both."""
    shown = [found.placement for found in plan.formats if found.placement is not None]
    yield "  experts", lambda found: "-" if found.placement is None else found.placement.experts
    for part, title in PART_TITLES.items():
        if any(place.parts.get(part) for place in shown):
            yield f"  {title}", _of_place(lambda place, part=part: place.parts.get(part, 0))  # type: ignore[misc]
    yield "  weights, experts cut", lambda found: _weights(found, "cut")
    yield "  weights, experts whole", lambda found: _weights(found, "whole")
    if any(place.absorbed_bytes for place in shown):
        yield "  kv_b again, in BF16", _of_place(lambda place: place.absorbed_bytes)
    yield f"  cache, {plan.load.tokens:,} tokens", _of_place(lambda place: place.kv_cache_bytes)
    yield "  activations (estimate)", _of_place(lambda place: place.activation_bytes)
    yield "  needed", _of_place(lambda place: place.needed_bytes)
    if plan.machine.usable_bytes is not None:
        yield "  usable", lambda found: both(found.usable_bytes or 0)
        yield "  left", lambda found: "-" if found.left_bytes is None else both(found.left_bytes)
    usable = plan.machine.utilization
    yield f"  at {usable:.0%}, GPUs of", _of_place(lambda place: ceil(place.needed_bytes / usable))


def _of_place(value: Callable[[Placement], int]) -> Cell:
    return lambda found: "-" if found.placement is None else both(value(found.placement))


def _weights(found: FormatPlan, experts: str) -> str:
    place = found.placements.get(experts)
    return "not divisible" if place is None else both(place.weight_bytes)


def _numbers(numbers: Sequence[int]) -> str:
    """``1, 2, ... 128`` for many that double, else each."""
    if len(numbers) > 4 and all(after == 2 * before for before, after in pairwise(numbers)):
        return f"{numbers[0]}, {numbers[1]}, ... {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _routes(plan: SizingPlan) -> list[str]:
    rows = [
        (route.command, *map(decimal, _bytes_of(route)), _seconds(route.wall_s), _bound(route)) for route in plan.routes
    ]
    table = _table([("route", "reads", "writes", "disk in all", "time", ""), *rows])
    streams = [
        (
            found.name,
            decimal(found.routed_token_bytes),
            _seconds(found.streamed_token_s),
            both(found.resident_bytes),
        )
        for found in plan.formats
    ]
    head = ("experts streamed to one GPU", "read a token", "time", "the rest, resident")
    return [*table, "", *_table([head, *streams])]


def _bytes_of(route: Route) -> tuple[int, int, int]:
    return route.reads_bytes, route.writes_bytes, route.disk_bytes


def _seconds(wall_s: float) -> str:
    return human_seconds(wall_s) if wall_s >= 1 else "under 1 s"


def _bound(route: Route) -> str:
    return route.bound_by + (" (projection)" if route.projected else "")


def _notes(plan: SizingPlan) -> list[str]:
    machine = plan.machine
    notes = [
        f"Assumed: disk {decimal(machine.disk_speed)}/s for reading and writing together (--disk-speed), network "
        f"{decimal(machine.network_speed)}/s (--network-speed).",
        f"Activations: {min(STEP_TOKENS, plan.load.tokens):,} tokens at once. The cache is in BF16 and whole on every "
        "tensor-parallel GPU.",
    ]
    if any(route.projected for route in plan.routes):
        notes += [
            f"quantize: time of one H200, projected from {MOE_LAYER_S} s a MoE layer of {MEASURED_ON} in proportion to "
            "experts and their width;",
            "its disk holds two snapshots of the activations beside the result.",
        ]
    if plan.path is not None and is_remote(plan.path):
        notes.append("Files of the source pass through the disk a few at a time (--spool), which is not counted.")
    for found in plan.formats:
        notes += [f"{found.name}: {printable(problem)}" for problem in _first_problems(found)]
        for engine, reasons in found.obstacles.items():
            notes += [f"{found.name}, {engine}: {reason}." for reason in reasons]
    return notes


def _first_problems(found: FormatPlan) -> Iterator[str]:
    """The first of those that forbid cut experts, the first that forbids whole ones too, and the way out."""
    firsts = {problems[0]: None for problems in found.problems.values()}
    yield from firsts
    if found.smaller_groups is not None:
        yield f"Groups of {found.smaller_groups} would do: weightkit quantize --group-size {found.smaller_groups}."


def decimal(count: float) -> str:
    """``1,342.1 GB``, as disks count; GB is the largest unit."""
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if abs(count) >= 0.9995 * size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} B"


def both(count: float) -> str:
    """``641.3 GiB (688.6 GB)``: GPUs are sold in one and counted in the other."""
    return f"{human_binary_bytes(count)} ({decimal(count)})" if count else "0 B"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{cell:{'<' if number == 0 else '>'}{widths[number]}}" for number, cell in enumerate(row)).rstrip()
        for row in rows
    ]
