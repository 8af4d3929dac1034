"""Who holds a target, as others see it who write there on the holder's behalf."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from weightkit.durable import STATE_DIR, is_held, only_writer
from weightkit.errors import TargetError


def test_others_write_while_it_is_announced(tmp_path: Path) -> None:
    with only_writer(tmp_path) as hold:
        assert not is_held(tmp_path, hold.name)
        hold.announce()
        assert is_held(tmp_path, hold.name)
        with pytest.raises(TargetError), only_writer(tmp_path):
            pass
        assert is_held(tmp_path, hold.name)
        hold.revoke()
        assert not is_held(tmp_path, hold.name)
        hold.announce()
        assert is_held(tmp_path, hold.name)
    assert not is_held(tmp_path, hold.name)
    assert not (tmp_path / STATE_DIR).exists()


def test_helpers_of_a_holder_that_was_killed_are_not_those_of_the_next(tmp_path: Path) -> None:
    name = tmp_path / "name"
    pid = os.fork()
    if pid == 0:
        with only_writer(tmp_path) as hold:
            hold.announce()
            name.write_text(hold.name)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert is_held(tmp_path, name.read_text())  # nobody has it, and nobody has come since
    with only_writer(tmp_path) as hold:
        assert not is_held(tmp_path, name.read_text())
        hold.announce()
        assert not is_held(tmp_path, name.read_text())
        assert hold.name != name.read_text()
