"""``weightkit launch``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from weightkit.cli.options import PATH, config_option, debug_option, json_option, model_option, quiet_option


@click.command()
@click.argument("engine", type=click.Choice(["vllm", "sglang", "lmdeploy", "demo"]))
@click.argument("path", type=PATH, required=False)
@click.option(
    "--tp", type=click.IntRange(min=1), default=8, show_default=True, help="GPUs of this machine that share it."
)
@click.option("--context", type=click.IntRange(min=1), help="Tokens of a request.  [default: 32768, or the model's]")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on; 0.0.0.0 for all.")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    help="The port to listen on.  [default: 8000 vllm, 30000 sglang, 23333 lmdeploy]",
)
@click.option(
    "--mtp",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Tokens to draft at once with the MTP layers.",
)
@click.option("--demo", type=PATH, help="The folder of DeepSeek's generate.py.  [default: PATH/inference]")
@click.option("--run", "carry_out", is_flag=True, help="Start it here, wait until it is ready, test it, stop it.")
@click.option("--keep", is_flag=True, help="With --run: leave it running.")
@click.option(
    "--ready-timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=3600.0,
    show_default=True,
    help="With --run: seconds to be ready in.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=120.0,
    show_default=True,
    help="With --run: seconds for one answer of the test.",
)
@click.option("--log", type=PATH, help="With --run: the file for its output.  [default: a temporary one]")
@model_option
@config_option
@json_option
@quiet_option
@debug_option
@click.pass_context
def command(
    ctx: click.Context,
    engine: str,
    path: Path | None,
    tp: int,
    context: int | None,
    host: str,
    port: int | None,
    mtp: int,
    demo: Path | None,
    carry_out: bool,
    keep: bool,
    ready_timeout: float,
    timeout: float,
    log: Path | None,
    model: str,
    config: Path | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> int:
    """Print the exact command that serves PATH with ENGINE, or run it.

    The checkpoint is held against what the engine accepts first: layout, dtypes, GPTQ's rules, tensor parallelism,
    MTP, tokenizer and chat template. All problems are reported at once, and then no command is printed.

    Without PATH: the model as published, in the workspace. Exits 1 where the engine fails or its answers are not sane.
    """
    from weightkit.layouts import open_checkpoint
    from weightkit.serving import command as command_for
    from weightkit.workspace import source

    if (keep or log is not None) and not carry_out:
        raise click.UsageError("--keep and --log are for --run.")
    checkpoint = open_checkpoint(path or source(model), config=config)
    launch = command_for(engine, checkpoint, tp, context=context, host=host, port=port, mtp=mtp, demo=demo)
    if not carry_out:
        launch.require()
        if as_json:
            click.echo(json.dumps(launch.to_json()))
        else:
            click.echo(launch.shell + (" --interactive" if engine == "demo" else ""))
            if not quiet:
                click.echo("\n".join(_words_on(launch)), err=True)
        return 0
    from weightkit import manifests
    from weightkit.serving import run

    if not quiet:
        click.echo(launch.shell, err=True)
    named = ctx.get_parameter_source("model") is not click.core.ParameterSource.DEFAULT
    known = manifests.load(model) if named or path is None else None
    show = _silent if quiet else _Lines()
    ran = run(launch, manifest=known, keep=keep, ready_s=ready_timeout, timeout_s=timeout, log=log, tell=show)
    if as_json:
        click.echo(json.dumps(launch.to_json() | ran.to_json()))
    elif not quiet or not ran.verdict.ok:
        click.echo(ran.verdict.render())
    if ran.pid is not None and not quiet:
        click.echo(f"It serves {launch.endpoint} until you stop it: kill -- -{ran.pid}", err=True)
    return 0 if ran.verdict.ok else 1


def _words_on(launch: object) -> list[str]:
    from weightkit.serving import Launch

    if not isinstance(launch, Launch):
        return []
    lines = [f"Checked against {launch.engine.title} {launch.engine.version}:"]
    width = max(len(check.name) for check in launch.checks)
    lines += [f"  {check.name:{width}}  {check.detail}" for check in launch.checks]
    return [*lines, *(f"Note: {note}" for note in launch.notes)]


def _silent(line: str) -> None:
    pass


class _Lines:
    """Progress on standard error: one line that changes in a terminal, a line now and then elsewhere."""

    EVERY_S = 10.0

    def __init__(self) -> None:
        self._said_s = float("-inf")

    def __call__(self, line: str) -> None:
        import time

        own = line.startswith("Log: ") or " is ready after " in line
        if own:
            click.echo(line, err=True)
        elif sys.stderr.isatty() or time.monotonic() - self._said_s > self.EVERY_S:
            self._said_s = time.monotonic()
            click.echo(f"  {line}", err=True)
