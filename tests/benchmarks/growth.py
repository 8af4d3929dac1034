"""shard and cast at several sizes: is the time a straight line, and the memory flat? ``bench_convert.py --growth``.

For each size, smallest first, a checkpoint without MTP layers is written, each command and as much plain I/O with
O_DIRECT run ``--rounds`` times in turn, and all of it is deleted before the next. The slope of a command's line beside
that of plain I/O is what it takes of a checkpoint so large that its start is nothing. What would not fit on the disk,
or would by what was measured not end in time, is not run and the report says so.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from measured import Run, RunError, folder_bytes, measure

if TYPE_CHECKING:
    from bench_convert import Bench

HERE = Path(__file__).resolve().parent
#: Disk that stays free.
SPARE_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Point:
    """One command at one size."""

    contender: str
    read_bytes: int
    written_bytes: int
    runs: tuple[Run, ...]

    @property
    def wall_s(self) -> float:
        return statistics.median(run.wall_s for run in self.runs)

    @property
    def rss_bytes(self) -> int:
        return max(run.rss_bytes for run in self.runs)


def measure_sizes(bench: Bench, sizes_gb: list[float]) -> list[Point]:
    points: list[Point] = []
    for gb in sorted(sizes_gb):
        source = bench.work / "fp8"
        try:
            wanted = int(gb * 1e9)
            if bench.left_s() < 30:
                raise RunError("no time")
            if not _fits(bench, wanted):
                raise RunError("its input does not fit on the disk")
            started = time.monotonic()
            size = ["--gb", str(gb), "--shard-gb", str(bench.args.shard_gb)]
            command = [sys.executable, str(HERE / "full_width.py"), "--dir", str(source), *size]
            measure(command, source, bench.log, bench.left_s())
            print(
                f"{gb:g} GB: {folder_bytes(source) / 1e9:.2f} written in {time.monotonic() - started:.1f} s", flush=True
            )
            points += _measure_size(bench, source, points)
        except RunError as exc:
            bench.note(f"NOT RUN: {gb:g} GB: {exc}")
        finally:
            shutil.rmtree(source, ignore_errors=True)
    return points


def _measure_size(bench: Bench, source: Path, before: list[Point]) -> list[Point]:
    from bench_convert import PLAIN, TASKS, Results

    points = []
    for task in TASKS:
        if task.name not in ("shard", "cast"):
            continue
        reads, writes = bench.planned(task, source)
        contenders = {
            f"{task.name}, {contender.name}": contender
            for contender in bench.contenders(task, source, Results(reads, writes))
            if contender.ours or contender.name == PLAIN[1]
        }
        earlier = [point for point in before if point.contender in contenders]
        if not earlier:
            for contender in contenders.values():
                if contender.ours and not _obstacle(bench, writes, 0):
                    bench.once(task, contender, source)  # compiles
        expected_s = 1.2 * max((point.wall_s / point.read_bytes * reads for point in earlier), default=0)
        runs: dict[str, list[Run]] = {name: [] for name in contenders}
        for number in range(bench.args.rounds):
            for name, contender in contenders.items():
                if len(runs[name]) < number:
                    continue  # it failed
                if why := _obstacle(bench, writes, max([expected_s, *(1.2 * run.wall_s for run in runs[name])])):
                    bench.note(f"NOT RUN: {reads / 1e9:.1f} GB, {name}, round {number + 1}: {why}")
                elif run := bench.once(task, contender, source):
                    runs[name].append(run)
        points += [Point(name, reads, writes, tuple(several)) for name, several in runs.items() if several]
    return points


def _obstacle(bench: Bench, writes: int, expected_s: float) -> str | None:
    if not _fits(bench, writes):
        free = shutil.disk_usage(bench.work).free
        return f"its {writes / 1e9:.1f} GB do not fit into the {free / 1e9:.1f} GB that are free"
    return None if expected_s + 15 < bench.left_s() else "no time"


def _fits(bench: Bench, size: int) -> bool:
    return size * 1.02 + SPARE_BYTES < shutil.disk_usage(bench.work).free


def report(points: list[Point], torch: int) -> str:
    lines = [
        "| | GB in | GB out | wall s (each round) | s a GB in | GB/s | RSS MiB | beyond torch | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    names = sorted({point.contender for point in points})
    for name in names:
        lines += [_row(point, torch) for point in points if point.contender == name]
    by_name = {name: [point for point in points if point.contender == name] for name in names}
    return "\n".join([*lines, "", *(_line(name, several, _plain(name, by_name)) for name, several in by_name.items())])


def _plain(name: str, by_name: dict[str, list[Point]]) -> list[Point]:
    """The points of plain I/O for the same task."""
    from bench_convert import PLAIN

    return by_name.get(f"{name.partition(',')[0]}, {PLAIN[1]}", [])


def _fit(points: list[Point]) -> tuple[float, float]:
    """Seconds a GB of input, and seconds without any: least squares."""
    walls = [point.wall_s for point in points]
    slope, intercept = statistics.linear_regression([point.read_bytes / 1e9 for point in points], walls)
    return slope, intercept


def _row(point: Point, torch: int) -> str:
    each = ", ".join(f"{run.wall_s:.2f}" for run in point.runs)
    reads, writes = point.read_bytes / 1e9, point.written_bytes / 1e9
    cells = [point.contender, f"{reads:.2f}", f"{writes:.2f}", f"**{point.wall_s:.2f}** ({each})"]
    cells += [f"{point.wall_s / reads:.3f}", f"{(reads + writes) / point.wall_s:.2f}"]
    cells += [f"{size / 2**20:,.0f}" for size in (point.rss_bytes, point.rss_bytes - torch)]
    return f"| {' | '.join([*cells, f'{statistics.median(run.cpu_s for run in point.runs):.1f}'])} |"


def _line(name: str, points: list[Point], plain: list[Point]) -> str:
    """The least-squares line through the medians, beside that of plain I/O, and the range of the memory."""
    if len(points) < 3:
        return f"- {name}: {len(points)} sizes, no line"
    sizes, walls = [point.read_bytes / 1e9 for point in points], [point.wall_s for point in points]
    slope, intercept = _fit(points)
    beside = (
        f", {slope / _fit(plain)[0]:.2f} of plain I/O's slope" if len(plain) == len(points) and plain != points else ""
    )
    off = [wall - (intercept + slope * size) for size, wall in zip(sizes, walls, strict=True)]
    worst = max(range(len(off)), key=lambda index: abs(off[index]))
    memory = [point.rss_bytes / 2**20 for point in points]
    return (
        f"- {name}: {slope:.3f} s a GB of input{beside} and {intercept:+.2f} s; largest deviation {off[worst]:+.2f} s "
        f"({off[worst] / walls[worst]:+.1%}) at {sizes[worst]:.1f} GB; RSS {min(memory):,.0f} to {max(memory):,.0f} MiB"
    )
