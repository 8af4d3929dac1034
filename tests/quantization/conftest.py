from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small products are slower on several threads, and far slower where these are busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Done:
    """What a command line came to."""

    code: int
    out: str
    err: str


@pytest.fixture
def weightkit(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Done]]:
    """The command line in this process."""
    from weightkit.cli import main

    def call(*arguments: object) -> Done:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        return Done(int(ended.value.code or 0), *capfd.readouterr())

    handler = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, handler)
