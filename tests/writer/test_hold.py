"""Who holds a target, as others see it who write there on the holder's behalf."""

from __future__ import annotations

import signal
import subprocess
import sys
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
    code = """
import os, signal, sys
from pathlib import Path
from weightkit.durable import only_writer
with only_writer(Path(sys.argv[1])) as hold:
    hold.announce()
    print(hold.name, end="", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    name = killed.stdout
    assert is_held(tmp_path, name)  # nobody has it, and nobody has come since
    with only_writer(tmp_path) as hold:
        assert not is_held(tmp_path, name)
        hold.announce()
        assert not is_held(tmp_path, name)
        assert hold.name != name
