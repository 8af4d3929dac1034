"""One cluster for all tests of this folder: its head has two CPUs to give."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from clusters import environment, head

os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = ".*"  # before anybody imports ray, which reads it then
pytest.importorskip("ray")


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """Of a cluster that this process has joined."""
    from weightkit.cluster.connection import connect

    os.environ.update({key: value for key, value in environment().items() if key.startswith("RAY_")})
    with head(cpus=2) as found:
        ray = connect(found)
        yield found
        ray.shutdown()
