"""``weightkit smoke``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from weightkit.cli.options import (
    PATH,
    config_option,
    debug_option,
    device_option,
    jobs_option,
    json_option,
    model_option,
    quiet_option,
)

if TYPE_CHECKING:
    from weightkit.manifests import Manifest


@click.command(short_help="Test whether a checkpoint computes what it should.")
@click.argument("path", type=PATH, required=False)
@model_option
@config_option
@click.option("--compare", "other", type=PATH, help="Find where this checkpoint of the same model parts from PATH.")
@click.option("--endpoint", metavar="URL", help="Test a server that speaks OpenAI's protocol instead of a PATH.")
@click.option("--served-name", help="The model to ask the server for.  [default: the first that it serves]")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds that a request to the server may take.",
)
@click.option(
    "--dtype", type=click.Choice(["bf16", "f16", "f32"]), help="To compute in.  [default: bf16; f32 on a CPU]"
)
@device_option
@jobs_option
@json_option
@quiet_option
@debug_option
@click.pass_context
def command(
    ctx: click.Context,
    path: Path | None,
    model: str,
    config: Path | None,
    other: Path | None,
    endpoint: str | None,
    served_name: str | None,
    timeout: float,
    dtype: str | None,
    device: str,
    jobs: int | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> int:
    """Test whether a checkpoint computes what it should; exits 1 where it does not.

    Finite logits at every position, the same tokens twice and whichever way they are computed, the answers and the
    perplexity that the model's manifest knows, routers without lost experts.

    With --compare: KL divergence and top-1 agreement of two checkpoints by token, the first layer whose hidden states
    part by more than their formats explain, and the tensors that are the reason, by name.

    Without PATH: the model as published, in the workspace.
    """
    if endpoint is not None and (path is not None or other is not None):
        raise click.UsageError("--endpoint tests a server: leave out PATH and --compare.")
    named = ctx.get_parameter_source("model") is not click.core.ParameterSource.DEFAULT
    if endpoint is not None:
        from weightkit.serving.endpoint import smoke_endpoint

        verdict = smoke_endpoint(endpoint, model=served_name, manifest=_manifest(model, named), timeout_s=timeout)
    else:
        from weightkit.layouts import open_checkpoint
        from weightkit.workspace import source

        checkpoint = open_checkpoint(path or source(model), config=config)
        options = {"device": device, "dtype": dtype, "jobs": jobs, "progress": not (quiet or as_json)}
        if other is not None:
            from weightkit.smoke.compare import compare_checkpoints

            verdict = compare_checkpoints(checkpoint, open_checkpoint(other, config=config), **options)  # type: ignore[arg-type]
        else:
            from weightkit.smoke.local import smoke_checkpoint

            verdict = smoke_checkpoint(checkpoint, manifest=_manifest(model, named or path is None), **options)  # type: ignore[arg-type]
    if as_json:
        click.echo(json.dumps(verdict.to_json(), ensure_ascii=False))
    elif not quiet or not verdict.ok:
        click.echo(verdict.render())
    return 0 if verdict.ok else 1


def _manifest(model: str, named: bool) -> Manifest | None:
    """The manifest that the user named; None leaves it to the checkpoint."""
    from weightkit import manifests

    return manifests.load(model) if named else None
