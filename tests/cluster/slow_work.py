"""A task that writes its file in small steps, writes down what it reads, and waits in the middle until it may go on:
for tests that break in.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import weightkit.cluster.news as telling
import weightkit.writer.files as filling
import weightkit.writer.pieces as cutting
from weightkit.checkpoint.reading import Bytes, Reader
from weightkit.cluster import RayExecutor
from weightkit.cluster.news import News
from weightkit.cluster.writing import Order, write_file
from weightkit.writer import stream

STEP_BYTES = 16384
DURABLE_BYTES = 65536
PAUSE_S = 0.02
#: Of its sources a task reads so much before it waits for ``gate_of``, and then, if nobody opens that, so long.
HELD_AT_BYTES = 6 * DURABLE_BYTES
HELD_S = 300.0

read_range = Reader.read_range


def write_slowly(order: Order) -> Iterator[News]:
    """As ``write_file``. A line a read in the log beside the target: output file, process, source, offset, bytes."""
    stream.BUFFER_BYTES = filling.BUFFER_BYTES = cutting.COPY_BYTES = STEP_BYTES
    filling.DURABLE_EVERY_BYTES = DURABLE_BYTES
    telling.EVERY_S = 0.05
    log, gate, read_bytes = log_of(order.place.target), gate_of(order.place.target), 0

    def slow(reader: Reader, path: str, offset: int, out: Bytes) -> None:
        nonlocal read_bytes
        with log.open("a") as file:
            file.write(f"{order.file.name} {os.getpid()} {Path(path).name} {offset} {len(out)}\n")
        time.sleep(PAUSE_S)
        until = time.monotonic() + HELD_S
        while read_bytes >= HELD_AT_BYTES and not gate.exists() and order.place.is_held and time.monotonic() < until:
            time.sleep(PAUSE_S)
        read_range(reader, path, offset, out)
        read_bytes += len(out)

    Reader.read_range = slow  # type: ignore[method-assign]
    yield from write_file(order)


def log_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.log")


def gate_of(target: Path) -> Path:
    """Once this is there, tasks go on to the end."""
    return target.with_name(f"{target.name}.gate")


class SlowRay(RayExecutor):
    """Tasks that can be broken into."""

    work = staticmethod(write_slowly)
