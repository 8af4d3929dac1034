"""``weightkit generate``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from weightkit.cli.options import (
    PATH,
    SIZE,
    config_option,
    debug_option,
    device_option,
    jobs_option,
    json_option,
    model_option,
    quiet_option,
)

if TYPE_CHECKING:
    from weightkit.generation import Generation, GenerationPlan, Runtime


@click.command(short_help="Generate text from any checkpoint.")
@click.argument("src", type=PATH, required=False)
@click.option("--prompt", default="What is 17 + 25?", show_default=True, help="The user's message.")
@click.option(
    "--prompts",
    type=PATH,
    help="File of many prompts, which share each reading of the weights: a line each, or JSON lines with prompt, "
    "messages or token_ids.",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Most tokens of an answer."
)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1, min_open=True),
    default=1.0,
    show_default=True,
    help="Sample from the likeliest tokens of so much probability.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option(
    "--dtype", type=click.Choice(["bf16", "f16", "f32"]), help="To compute in.  [default: bf16; f32 on a CPU]"
)
@click.option(
    "--dequantize",
    is_flag=True,
    help="Multiply with FP8 and int4 weights after dequantizing them on a GPU too, as published code does: slower, and "
    "sums in its order.",
)
@click.option(
    "--stream/--no-stream",
    default=None,
    help="Read weights from disk as they are needed; or fail where they do not all fit.  [default: where they do not]",
)
@click.option("--gpu-memory", type=SIZE, help="Most to use of a GPU, such as 24GiB.  [default: 90 % of what is free]")
@click.option("--host-memory", type=SIZE, help="Most to use of host memory.  [default: 80 % of what is available]")
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    help="Divide the model among so many processes here, a GPU each.  [default: those of torchrun, or one]",
)
@click.option("--dry-run", is_flag=True, help="Print what would be read and how long that takes; generate nothing.")
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
    prompts: Path | None,
    raw: bool,
    ranks: int | None,
    stream: bool | None,
    dry_run: bool,
    model: str,
    config: Path | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Generate text from SRC: a smoke test of any checkpoint, on a CPU or a GPU.

    Works from FP8, BF16, int4 and rank files alike. Weights are read as they are needed; those that do not fit in
    memory are read again from disk for each token, after a plan has said how long that takes. Logits that are not
    finite are an error.

    Ranks divide a model that one GPU cannot hold, of one machine or, with torchrun, of several: torchrun
    --nproc-per-node 8 -m weightkit generate SRC. Rank files must be of as many ranks.
    """
    from weightkit.ranks import start
    from weightkit.workspace import source

    if (
        prompts is not None
        and click.get_current_context().get_parameter_source("prompt") is ParameterSource.COMMANDLINE
    ):
        raise click.UsageError("--prompt and --prompts: name one of them.")
    sampling = {name: options.pop(name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    if ranks is not None and (code := start(ranks, sys.argv[1:])) is not None:
        sys.exit(code)
    from weightkit.generation import read_prompts
    from weightkit.generation.ranks import open_on_ranks

    with open_on_ranks(lambda: src or source(model), config=config, stream=stream, **options) as runtime:
        many = [prompt] if prompts is None else read_prompts(prompts)
        chat = False if raw else None
        limit = sampling["max_new_tokens"]
        ids = runtime.encode_many(many, max_new_tokens=limit, chat=chat)
        plan = runtime.plan(ids, max_new_tokens=limit, measure=True if dry_run else None)
        if dry_run:
            click.echo(json.dumps(plan.to_json()) if as_json else plan.render())
            return
        if plan.is_streamed and not quiet and not as_json:
            click.echo(plan.render(), err=True)
        progress = not quiet and not as_json
        if prompts is None:
            _one(runtime, ids[0], plan, {**sampling, "progress": progress}, as_json=as_json, quiet=quiet)
        else:
            results = runtime.generate_many(ids, **sampling, progress=progress)
            _print_many(results, plan, as_json=as_json, quiet=quiet)


def _one(
    runtime: Runtime, ids: Sequence[int], plan: GenerationPlan, options: dict[str, Any], *, as_json: bool, quiet: bool
) -> None:
    """Generate from one prompt, its text printed as it comes."""
    stream = runtime.stream(ids, **options)
    if not as_json:
        for piece in stream:
            click.echo(piece, nl=False)
            sys.stdout.flush()
        click.echo()
    result = stream.result
    if as_json:
        click.echo(json.dumps(_to_json(result) | ({"plan": plan.to_json()} if plan.is_streamed else {})))
    elif not quiet:
        click.echo(result.render(), err=True)


def _print_many(results: Sequence[Generation], plan: GenerationPlan, *, as_json: bool, quiet: bool) -> None:
    """All results, in the order of their prompts."""
    if as_json:
        click.echo(json.dumps({"generations": [_to_json(result) for result in results], "plan": plan.to_json()}))
        return
    for number, result in enumerate(results, start=1):
        click.echo(f"--- prompt {number}")
        click.echo(result.text)
    if not quiet:
        from weightkit.generation.result import render_many

        click.echo(render_many(results), err=True)


def _to_json(result: Generation) -> dict[str, Any]:
    return asdict(result) | {"tokens_per_s": result.tokens_per_s}
