"""What a worker has imported and collected stays to its end, and the garbage collector need not look at it again.

Else each of its full passes looks at half a million objects: a quarter of the CPU seconds of tests at full size.
"""

from __future__ import annotations

import gc
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000, 10, 20)
