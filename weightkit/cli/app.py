"""The group of commands, loaded when asked for, and the one place where errors become messages."""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import click

import weightkit
from weightkit.errors import Interrupted, WeightkitError

#: In the order of the road that a checkpoint goes.
COMMANDS = (
    "plan",
    "bench",
    "fetch",
    "inspect",
    "verify",
    "strip",
    "cast",
    "quantize",
    "shard",
    "merge",
    "generate",
    "smoke",
    "launch",
    "mirror",
    "demo",
)


class _Commands(click.Group):
    """Imports a command's module when it is named. None of them imports torch to be described."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"weightkit.cli.{cmd_name}").command
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(weightkit.__version__, prog_name="weightkit")
def group() -> None:
    """Handle very large open-weight checkpoints: the DeepSeek-V3 family.

    Without SRC and DST, commands work in the workspace: ./weights, or the folder that WEIGHTKIT_HOME names.
    """


def main(args: list[str] | None = None) -> NoReturn:
    """Run a command line and exit."""
    signal.signal(signal.SIGTERM, _stop)
    _open_what_is_closed()
    try:
        code = _run(sys.argv[1:] if args is None else args)
    finally:
        _leave_to_signals()
        _drop_unsaid()
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    """The exit code, once all is said. Raises a failure itself under ``--debug``."""
    try:
        code = group.main(arguments, prog_name="weightkit", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except click.ClickException as exc:
        exc.show()
        return exc.exit_code
    except (KeyboardInterrupt, click.Abort, Interrupted) as exc:
        _say(str(exc) or "Stopped.", arguments)
        return 130
    except BrokenPipeError:
        return 1  # the reader of our output is gone: nothing to say, and nobody to say it to
    except Exception as exc:
        if "--debug" in arguments:
            raise
        _say(_message(exc), arguments, exc)
        return 1


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _leave_to_signals() -> None:
    """From now on signals end the process at once: Python waits at its exit for threads, a GPU's start among them, and
    would answer with a traceback."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _open_what_is_closed() -> None:
    """Outputs that were closed by whoever started this go nowhere; no file of ours takes their descriptors."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - to the end


def _drop_unsaid() -> None:
    """What could not be printed. Python would try again at its exit, say so, and end with a code of its own."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except ValueError:
            pass  # closed
        except OSError:
            with suppress(OSError), Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


def _message(error: Exception) -> str:
    if isinstance(error, WeightkitError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return (
        f"A defect in weightkit: {type(error).__name__}: {error}.\nRun it again with --debug and report what it prints."
    )


def _say(message: str, arguments: list[str], error: Exception | None = None) -> None:
    if "--json" in arguments and error is not None:
        with suppress(OSError):  # the error may be that this output is full or gone
            click.echo(json.dumps({"error": type(error).__name__, "message": message}))
    click.echo(f"Error: {message}" if error is not None else message, err=True)
