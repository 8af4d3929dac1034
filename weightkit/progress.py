"""Progress of long work: a bar in a terminal or a notebook, a line now and then elsewhere, nothing when asked."""

from __future__ import annotations

import sys
import threading
from typing import Any

from tqdm.auto import tqdm

#: Seconds between lines where the output is no terminal.
LINE_EVERY_S = 10
_LINE_FORMAT = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}"


class Progress:
    """Bytes done, their rate and the time left. Threads may share it.

    Args:
        total: bytes to do.
        desc: what is done.
        shown: whether to show anything at all.
        parts: how many files the bytes are in; shown as ``done/parts files``.
        unit: what is counted, if not bytes.
        leave: whether a bar stays in the terminal when it is done.
    """

    def __init__(
        self, total: int, desc: str, *, shown: bool = True, parts: int = 0, unit: str = "B", leave: bool = True
    ) -> None:
        self._parts, self._parts_done, self._note, self._shown = parts, 0, "", shown
        self._lock = threading.Lock()
        options: dict[str, Any] = {"unit": unit, "unit_scale": unit == "B", "smoothing": 0.05, "disable": not shown}
        options["leave"] = leave
        if not _is_interactive():
            options |= {
                "file": _Lines(),
                "mininterval": LINE_EVERY_S,
                "delay": LINE_EVERY_S,
                "bar_format": _LINE_FORMAT,
            }
        self._bar = tqdm(total=total, desc=desc, **options)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, count: int = 1) -> None:
        """``count`` more bytes, or units, are done."""
        with self._lock:
            self._bar.update(count)

    def part_done(self) -> None:
        """One more file is done."""
        with self._lock:
            self._parts_done += 1
            self._set_postfix()

    def note(self, text: str) -> None:
        """What the bar says after the files, such as where the bytes come from."""
        with self._lock:
            if text != self._note:
                self._note = text
                self._set_postfix()

    def tell(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self._shown:
            with self._lock:
                self._bar.write(text, file=sys.stderr)

    def _set_postfix(self) -> None:
        files = f"{self._parts_done}/{self._parts} files" if self._parts else ""
        self._bar.set_postfix_str(", ".join(filter(None, (files, self._note))), refresh=False)


class _Lines:
    """Standard error for a bar that is no terminal's: each state on a line of its own."""

    def write(self, text: str) -> None:
        line = text.replace("\r", "").strip()
        if line:
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def _is_interactive() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules
