"""A signal that comes when a command is done, while Python waits at its exit for a thread."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

#: ``--version`` is done at once; a thread that a signal does not end stays for longer than the test waits.
CODE = """
import threading, time
from weightkit.cli import main
def stay():
    threading.main_thread().join()
    print("waiting", flush=True)
    time.sleep(600)
threading.Thread(target=stay).start()
main(["--version"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_the_exit_ends_it_without_a_traceback(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("weightkit")
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=300)
    assert (process.returncode, said) == (-number, "")


def test_a_signal_that_the_caller_ignores_stays_ignored() -> None:
    code = CODE.replace("600", "0.5").replace(
        "import threading, time", "import signal, threading, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline(), process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=300)
    assert (process.returncode, said) == (0, "")


def test_a_signal_at_the_start_ends_it_without_a_traceback() -> None:
    code = (
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'weightkit.cli.app':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from weightkit.cli import main\n"
        "main(['--version'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
