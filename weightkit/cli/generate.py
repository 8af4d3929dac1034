"""``weightkit generate``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

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


@click.command()
@click.argument("src", type=PATH, required=False)
@click.option("--prompt", default="What is 17 + 25?", show_default=True, help="The user's message.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(min=0, max=1, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option(
    "--dtype", type=click.Choice(["bf16", "f16", "f32"]), help="To compute in.  [default: bf16; f32 on a CPU]"
)
@model_option
@config_option
@device_option
@jobs_option
@json_option
@quiet_option
@debug_option
def command(
    src: Path | None,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    raw: bool,
    dtype: str | None,
    model: str,
    config: Path | None,
    device: str,
    jobs: int | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Generate text from SRC: a smoke test of any checkpoint, on a CPU or a GPU.

    Works from FP8, BF16 and rank files alike. Weights are read as they are needed. Logits that are not finite are an
    error.
    """
    from weightkit.generation import Runtime
    from weightkit.layouts import open_checkpoint
    from weightkit.workspace import source

    checkpoint = open_checkpoint(src or source(model), config=config)
    with Runtime(checkpoint, device=device, dtype=dtype, jobs=jobs) as runtime:  # type: ignore[arg-type]
        stream = runtime.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            chat=False if raw else None,
            progress=not quiet and not as_json and sys.stderr.isatty(),
        )
        if not as_json:
            for piece in stream:
                click.echo(piece, nl=False)
            click.echo()
        result = stream.result
    if as_json:
        click.echo(json.dumps(asdict(result) | {"tokens_per_s": result.tokens_per_s}))
    elif not quiet:
        click.echo(result.render(), err=True)
