"""``weightkit verify``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from weightkit.cli.options import (
    PATH,
    config_option,
    debug_option,
    executor_options,
    jobs_option,
    json_option,
    model_option,
    quiet_option,
    require_executor,
)


@click.command()
@click.argument("path", type=PATH, required=False)
@model_option
@config_option
@click.option("--quick", is_flag=True, help="Read headers only: no checksums.")
@click.option("--values", is_flag=True, help="Look at every weight and scale for NaN, Inf and bad scales.")
@jobs_option
@executor_options
@json_option
@quiet_option
@debug_option
@click.pass_context
def command(
    ctx: click.Context,
    path: Path | None,
    model: str,
    config: Path | None,
    quick: bool,
    values: bool,
    jobs: int | None,
    executor: str,
    address: str | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> int:
    """Verify a checkpoint; report all its problems at once.

    Index, files and headers against each other, tensors against what the config calls for, the config against the
    tensors, side files, and checksums where a lock or a manifest has them. Exits 1 where there is any problem.

    Without PATH: the model as published, in the workspace, which must also have the manifest's totals.
    """
    from weightkit.examine import verify
    from weightkit.workspace import source

    require_executor(executor, address)
    readers = None
    if executor == "ray":
        from weightkit.cluster import RayReaders

        readers = RayReaders(address, jobs=jobs)
    report = verify(
        path or source(model),
        config=config,
        manifest=None if path else model,
        quick=quick,
        values=values,
        jobs=jobs,
        readers=readers,
        progress=not quiet,
    )
    if as_json:
        click.echo(json.dumps(report.to_json()))
    elif not quiet or not report.ok:
        click.echo(report.render())
    return 0 if report.ok else 1
