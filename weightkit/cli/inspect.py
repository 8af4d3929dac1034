"""``weightkit inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from weightkit.cli.options import config_option, debug_option, json_option
from weightkit.workspace import DEFAULT_MODEL


@click.command(short_help="Say what a checkpoint is: parameters, bytes, layers.")
@click.argument("what", metavar="[PATH|MODEL]", default=DEFAULT_MODEL)
@config_option
@json_option
@debug_option
def command(what: str, config: Path | None, as_json: bool, debug: bool) -> None:
    """Say what a checkpoint is: parameters by component and dtype, bytes, layers, experts, legal --mp.

    Works for the name of a known model with nothing downloaded; without an argument, for deepseek-v3.
    """
    from weightkit.examine import inspect

    found = inspect(Path(what) if Path(what).exists() else what, config=config)
    click.echo(json.dumps(found.to_json()) if as_json else found.render())
