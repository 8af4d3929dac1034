"""One cluster for all tests of this folder: its head has two CPUs to give."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from clusters import environment, head

os.environ["RAY_DEDUP_LOGS_SKIP_REGEX"] = ".*"  # before anybody imports ray, which reads it then
pytest.importorskip("ray")

FOLDER = Path(__file__).parent
_running, _addresses = ExitStack(), list[str]()


@contextmanager
def _joined() -> Iterator[str]:
    from weightkit.cluster.connection import connect

    os.environ.update({key: value for key, value in environment().items() if key.startswith("RAY_")})
    with head(cpus=2) as found:
        ray = connect(found)
        yield found
        ray.shutdown()


@pytest.fixture(scope="module")
def address() -> str:
    """Of a cluster that this process has joined; the same for all modules."""
    if not _addresses:
        _addresses.append(_running.enter_context(_joined()))
    return _addresses[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> Generator[None, None, None]:
    """End the cluster behind the folder's last test: an idle one takes a twentieth of a core, whatever runs next."""
    try:
        return (yield)
    finally:
        if nextitem is None or FOLDER not in nextitem.path.parents:
            _end()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish() -> None:
    """Of a session that was stopped."""
    _end()


def _end() -> None:
    _addresses.clear()
    _running.close()
