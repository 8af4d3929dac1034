"""``weightkit demo``."""

from __future__ import annotations

import json
import time

import click

from weightkit.cli.options import debug_option, device_option, json_option


@click.command(short_help="Take pico, which ships here, down the whole road.")
@device_option
@json_option
@debug_option
def command(device: str, as_json: bool, debug: bool) -> None:
    """Take pico, the model that ships with weightkit, down the whole road.

    Verify, strip, cast, shard and merge it in the workspace; each result is verified and must give the same answers.
    """
    from weightkit.demo import demo
    from weightkit.units import human_seconds

    started = time.monotonic()
    steps = []
    for step in demo(device):  # type: ignore[arg-type]
        steps.append(step)
        if not as_json:
            click.echo(step.render())
    if as_json:
        click.echo(json.dumps([step.to_json() for step in steps]))
    else:
        click.echo(f"All of it shown in {human_seconds(time.monotonic() - started)}.")
