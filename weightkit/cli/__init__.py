"""The command line: a file a command. It parses, calls the library, prints, and chooses the exit code.

Exit codes: 0 done; 1 an error, said on stderr; 2 a wrong call; 130 stopped by a signal.
"""

from __future__ import annotations

import gc
import signal
from typing import NoReturn

__all__ = ["main"]


def main(args: list[str] | None = None) -> NoReturn:
    """Run a command line and exit."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:  # it would answer a Ctrl-C with a traceback out of an import
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    gc.set_threshold(50_000, 20, 100)  # plans are 100,000 objects that stay: looking at them took a fifth of the time
    from weightkit.cli import app

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    app.main(args)
