"""``weightkit bench``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from weightkit.cli.options import PATH, debug_option, json_option, model_option


@click.command(short_help="Measure what this machine reaches.")
@click.argument("path", type=PATH, required=False)
@model_option
@click.option(
    "--seconds",
    type=click.FloatRange(min=0.01, max=60),
    default=2.5,
    show_default=True,
    help="Of each of three disk measurements; others take a share of it.",
)
@click.option("--no-save", is_flag=True, help="Do not keep the result for the estimates of --dry-run.")
@json_option
@debug_option
def command(path: Path | None, model: str, seconds: float, no_save: bool, as_json: bool, debug: bool) -> None:
    """Measure what this machine reaches, and estimate what commands would at best take.

    Takes some 15 seconds. The disk measured is that of the folder PATH, by default the workspace, in scratch files
    without a name that vanish whatever happens. The result is kept there as weightkit-bench.json: conversions to places
    below it then say with --dry-run how long they would take.
    """
    from weightkit.measure import estimate, measure, save
    from weightkit.measure.render import render
    from weightkit.sizing.works import works_of
    from weightkit.workspace import home

    works = works_of(model)
    folder = path or home()
    if path is None:
        folder.mkdir(parents=True, exist_ok=True)
    ceilings = measure(folder, seconds=seconds)
    estimates = [estimate(work, ceilings) for work in works]
    saved = None if no_save else save(ceilings, folder)
    if as_json:
        found = ceilings.to_json() | {"model": model, "estimates": [item.to_json() for item in estimates]}
        click.echo(json.dumps(found | {"saved": str(saved) if saved else None}))
    else:
        click.echo(render(ceilings, model, estimates))
        if saved:
            click.echo(f"\nKept in {saved}.")
