"""Options that commands share, and what a conversion does with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from weightkit.units import parse_bytes
from weightkit.workspace import DEFAULT_MODEL

if TYPE_CHECKING:
    from weightkit.checkpoint import Checkpoint
    from weightkit.layouts import FileSet
    from weightkit.writer import Executor

Command = TypeVar("Command", bound=Callable[..., Any])

#: Whether it is there and can be read is for the library to say.
PATH = click.Path(path_type=Path, readable=False)


class _Size(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Bytes, such as ``24GiB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parse_bytes(value)
        except ValueError as exc:
            self.fail(str(exc), param, ctx)


SIZE = _Size()


def _chain(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


model_option = click.option(
    "--model", default=DEFAULT_MODEL, show_default=True, help="The model of the workspace to work on."
)
config_option = click.option("--config", type=PATH, help="The model's config.json, where the source has none.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
debug_option = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress, no summary.")
device_option = click.option(
    "--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True, help="Where to compute."
)
jobs_option = click.option("--jobs", type=click.IntRange(min=1), help="Files in work at once.  [default: 8]")
#: Where a command's files are worked on: ``executor`` and ``address``, which ``require_executor`` checks.
executor_options = _chain(
    click.option(
        "--executor",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Work here, or on the nodes of a Ray cluster; --jobs is then of each node.",
    ),
    click.option(
        "--address",
        metavar="HOST:PORT",
        help="Head of the Ray cluster; `local` starts one here.  [default: RAY_ADDRESS, or what runs here]",
    ),
)


def without(arguments: Sequence[str], *options: str) -> list[str]:
    """A command line without some options that take a value each."""
    left, found = list(arguments), []
    while left:
        word = left.pop(0)
        if word in options:
            del left[:1]
        elif word.partition("=")[0] not in options:
            found.append(word)
    return found


def require_executor(executor: str, address: str | None) -> None:
    """Refuse an address that would not be used."""
    if address is not None and executor != "ray":
        raise click.UsageError("--address needs --executor ray.")


#: What a command takes that makes one checkpoint from another; it gets a ``Conversion`` as ``run``.
conversion_options = _chain(
    click.argument("src", type=PATH, required=False),
    click.argument("dst", type=PATH, required=False),
    model_option,
    config_option,
    click.option("--dry-run", is_flag=True, help="Print the plan and its cost; write nothing."),
    jobs_option,
    executor_options,
    click.option(
        "--spool",
        type=SIZE,
        help="Of a SRC at an address, most disk for its files on their way: each is fetched whole and verified. 0 reads"
        " ranges alone, verified by no checksum.  [default: what is in work]",
    ),
    device_option,
    click.option("--force", is_flag=True, help="Replace what an earlier run left in DST."),
    json_option,
    click.option("-v", "--verbose", is_flag=True, help="Print the plan before it is carried out."),
    quiet_option,
    debug_option,
)


@dataclass(frozen=True)
class Conversion:
    """The shared options of one call."""

    src: Path | None
    dst: Path | None
    model: str
    config: Path | None
    dry_run: bool
    jobs: int | None
    executor: str
    address: str | None
    spool: int | None
    device: str
    force: bool
    as_json: bool
    verbose: bool
    quiet: bool
    debug: bool

    def __post_init__(self) -> None:
        require_executor(self.executor, self.address)

    def open(self, default: Callable[[str], Path] | None = None) -> Checkpoint:
        """The source: SRC, or what ``default`` finds in the workspace."""
        from weightkit.layouts import open_checkpoint
        from weightkit.workspace import source

        return open_checkpoint(self.src or (default or source)(self.model), config=self.config)

    def write(
        self, what: Checkpoint | FileSet, *form: str, opened: Checkpoint | None = None, copies: bool = False
    ) -> None:
        """Carry out, or only print, the writing of ``what`` to DST, or to the place that its ``form`` has in the
        workspace. It is said where that makes a mere copy: it ``copies``, or has the tensors of what was ``opened``."""
        from weightkit.checkpoint import Checkpoint
        from weightkit.compute import start_engine
        from weightkit.layouts import lay_out_published
        from weightkit.workspace import target
        from weightkit.writer import execute, make_plan, summarize

        files = lay_out_published(what) if isinstance(what, Checkpoint) else what
        plan = make_plan(files, self.dst or target(self.model, self.src, form))
        copies = copies or (opened is not None and isinstance(what, Checkpoint) and what.tensors == opened.tensors)
        if copies and not self.quiet:
            click.echo("Note: no tensor changes; this makes a copy.", err=True)
        if self.dry_run or (self.verbose and not self.as_json):
            elsewhere = self.executor != "local"
            summary = summarize(plan, jobs=self.jobs, force=self.force, spool_bytes=self.spool, elsewhere=elsewhere)
            click.echo(json.dumps(summary.to_json()) if self.as_json else summary.render())
        if self.dry_run:
            return
        executor = self._executor()
        written = execute(
            plan,
            jobs=self.jobs,
            engine=partial(start_engine, self.device) if executor is None else None,  # type: ignore[arg-type]
            executor=executor,
            progress=not self.quiet,
            force=self.force,
            spool_bytes=self.spool,
        )
        if self.as_json:
            click.echo(json.dumps(written.to_json()))
        elif not self.quiet:
            click.echo(written.render())

    def _executor(self) -> Executor | None:
        """None for this process."""
        if self.executor == "local":
            return None
        from weightkit.cluster import RayExecutor

        return RayExecutor(self.address, jobs=self.jobs, device=self.device)  # type: ignore[arg-type]
