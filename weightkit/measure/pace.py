"""Bytes a second of something that is done again and again by several threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

#: Others disturb a measurement in one direction only, so the best window counts.
WINDOWS = 3


def best_pace(steps: Sequence[Callable[[], int]], seconds: float) -> float:
    """The best ``pace`` of three windows that take ``seconds`` together, after every step was done once."""
    for step in steps:
        step()
    return max(pace(steps, seconds / WINDOWS) for _ in range(WINDOWS))


def pace(steps: Sequence[Callable[[], int]], seconds: float) -> float:
    """Call each of ``steps`` on a thread of its own, again and again for ``seconds``; it returns how many bytes it
    worked on, 0 when it is through. Returns the bytes a second of all together."""

    def work(step: Callable[[], int]) -> int:
        done = 0
        while count := step():
            done += count
            if time.perf_counter() >= deadline:
                break
        return done

    started = time.perf_counter()
    deadline = started + seconds
    with ThreadPoolExecutor(len(steps)) as pool:
        total = sum(pool.map(work, steps))
    return total / (time.perf_counter() - started)
