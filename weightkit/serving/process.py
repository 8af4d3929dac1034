"""An engine as a process group of its own: its log, what is left of it, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from weightkit.errors import EngineError

STOP_S = 20.0
"""An engine that is told to stop may take so long before it is killed."""
INTERRUPTED_S = 3.0
"""The same after Ctrl-C."""
TAIL_BYTES = 64 << 10
_LONGEST_LINE = 400


class EngineProcess:
    """An engine that was started. Use it in a ``with`` block: whatever ends the block ends the engine.

    Engines start processes of their own, some in sessions of their own (``torchrun``); all of them are followed, and
    none outlives ``stop``.

    Args:
        argv: the program and its arguments.
        env: variables besides those of this process.
        log: the file that all output goes to.

    Raises:
        EngineError: the program cannot be started.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.log = log
        self.kept = False
        self._members: dict[int, int] = {}
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | dict(env)
        with log.open("ab") as file:
            try:
                self._process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                )
            except OSError as exc:
                raise EngineError(f"it cannot be started ({exc.strerror or exc})", where=argv[0]) from exc

    @property
    def pid(self) -> int:
        """The process, and its group."""
        return self._process.pid

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self.kept:
            self.stop(INTERRUPTED_S if kind is not None and issubclass(kind, KeyboardInterrupt) else STOP_S)

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        self._follow()
        return self._process.poll()

    def tail(self, lines: int) -> list[str]:
        """The last lines of the log."""
        with suppress(OSError), self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace").replace("\r", "\n")
            found = [line.rstrip()[:_LONGEST_LINE] for line in text.splitlines() if line.strip()]
            return found[-lines:]
        return []

    def stop(self, grace_s: float = STOP_S) -> None:
        """End it and everything that it started. A second Ctrl-C kills at once."""
        try:
            self._signal_group(signal.SIGTERM)
            deadline, alone = time.monotonic() + grace_s, False
            while (left := self._alive()) and time.monotonic() < deadline:
                if self._process.returncode is not None and not alone:  # who would have stopped them is gone
                    alone, deadline = True, min(deadline, time.monotonic() + INTERRUPTED_S)
                    for pid in left:
                        _signal(pid, signal.SIGTERM)
                time.sleep(0.05)
        finally:
            with _deaf():
                self._kill()

    def _kill(self) -> None:
        """Kill what is left, and what that started meanwhile, until there is nothing."""
        for _ in range(50):
            self._signal_group(signal.SIGKILL)
            for pid in self._alive():
                _signal(pid, signal.SIGKILL)
            if not self._alive():
                break
            time.sleep(0.05)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)

    def _signal_group(self, number: signal.Signals) -> None:
        # The group's number is taken as long as one of its processes is left, and not given to strangers until then.
        if self._process.returncode is None or self._alive():
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def _alive(self) -> list[int]:
        self._process.poll()
        self._follow()
        table = _processes()
        return [pid for pid, start in self._members.items() if pid in table and table[pid].start == start]

    def _follow(self) -> None:
        """Take note of every descendant, so that one whose parent ends is not lost."""
        table = _processes()
        members = {pid for pid, start in self._members.items() if pid in table and table[pid].start == start}
        members |= {pid for pid, entry in table.items() if self.pid in (pid, entry.group, entry.session)}
        grown = True
        while grown:
            further = {pid for pid, entry in table.items() if entry.parent in members} - members
            members |= further
            grown = bool(further)
        self._members = {pid: table[pid].start for pid in members}


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


class _Process:
    """What ``/proc/PID/stat`` says of a process; ``start`` tells it from a later one of the same number."""

    __slots__ = ("group", "parent", "session", "start")

    def __init__(self, fields: Sequence[str]) -> None:
        self.parent, self.group, self.session = int(fields[1]), int(fields[2]), int(fields[3])
        self.start = int(fields[19])


def _processes() -> dict[int, _Process]:
    """All processes that run, by number; those that ended and were not yet waited for do not. Empty without /proc."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            fields = entry.read_text().rpartition(")")[2].split()
            if fields[0] not in ("Z", "X"):
                found[int(entry.parent.name)] = _Process(fields)
    return found


@contextmanager
def interrupts() -> Iterator[None]:
    """Within the block a closed terminal and SIGTERM end the program as Ctrl-C does, so that the engine is stopped.
    Does nothing in other threads than the first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _deaf() -> Iterator[None]:
    """Within the block Ctrl-C is not heard: what it would stop is being killed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def wait_for(
    process: EngineProcess, ready: Callable[[], bool], *, timeout_s: float, every_s: float, tell: Callable[[str], None]
) -> float:
    """Seconds until ``ready``; ``tell`` gets the log's last line whenever it changed.

    Raises:
        EngineError: the engine ended, or was not ready in time; with the log's last lines.
    """
    started = time.monotonic()
    last = ""
    while True:
        code = process.poll()
        if code is not None:
            raise ended(process, code)
        if ready():
            return time.monotonic() - started
        if time.monotonic() - started > timeout_s:
            raise EngineError(
                "not ready within the time limit",
                where=process.log,
                expected=f"ready within {timeout_s:g} s",
                found="it runs, and is not\n" + _indented(process.tail(15)),
                fix="Read its log. Give it longer with --ready-timeout if it is still loading.",
            )
        line = next(iter(process.tail(1)), "")
        if line != last:
            tell(line)
            last = line
        time.sleep(every_s)


#: What an engine's last lines say, and what to do about it.
_HINTS = (
    ("out of memory", "Use a larger --tp, a smaller --context, or a smaller form: weightkit quantize."),
    ("kv cache", "Use a smaller --context or a larger --tp: the cache for one request does not fit."),
    ("address already in use", "Choose another --port."),
    ("unrecognized arguments", "This version has other flags than the one that weightkit knows: see its --help."),
    ("no such option", "This version has other flags than the one that weightkit knows: see its --help."),
    ("trust_remote_code", "The engine wants to run Python code of the checkpoint: read it, then add the flag."),
    ("no module named", "Its installation lacks a package: install what the last line names."),
)


def ended(process: EngineProcess, code: int) -> EngineError:
    """What to raise for an engine that ended by itself."""
    lines = process.tail(30)
    text = "\n".join(lines).lower()
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return EngineError(
        "the engine ended by itself",
        where=process.log,
        found=f"{how}, and these last lines\n" + _indented(lines),
        fix=next((hint for sign, hint in _HINTS if sign in text), "Read its log from the beginning."),
    )


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"    {line}" for line in lines) if lines else "    (it wrote nothing)"
