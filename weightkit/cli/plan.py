"""``weightkit plan``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from weightkit.cli.options import SIZE, config_option, debug_option, json_option, model_option


class _Speed(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic from click 8.4 on
    """``2GB`` or ``2GB/s``: bytes a second."""

    name = "speed"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return int(SIZE.convert(value.removesuffix("/s") if isinstance(value, str) else value, param, ctx))


@click.command(short_help="Say what a model takes: GPU memory, disk, time.")
@click.argument("what", metavar="[PATH|MODEL]", required=False)
@model_option
@click.option("--gpus", type=click.IntRange(min=1), default=8, show_default=True, help="GPUs to serve it on.")
@click.option("--gpu-memory", type=SIZE, help="Memory of each, such as 96GiB; without it no verdict.")
@click.option(
    "--gpu-memory-utilization",
    type=click.FloatRange(min=0, min_open=True, max=1),
    default=0.9,
    show_default=True,
    help="Of it, what an engine may use.",
)
@click.option("--context", type=click.IntRange(min=1), default=4096, show_default=True, help="Tokens of a sequence.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences at once.")
@click.option("--mtp", is_flag=True, help="Load the MTP layers too (speculative decoding).")
@click.option(
    "--format",
    "formats",
    type=click.Choice(["fp8", "bf16", "int4"]),
    multiple=True,
    help="Only this one; may be repeated.  [default: all]",
)
@click.option(
    "--group-size", type=int, default=128, show_default=True, help="Of int4: columns that share a scale; -1 for all."
)
@click.option("--disk-speed", type=_Speed(), default="2GB", show_default=True, help="Bytes a second (assumed).")
@click.option("--network-speed", type=_Speed(), default="100MB", show_default=True, help="Bytes a second (assumed).")
@config_option
@json_option
@debug_option
def command(
    what: str | None,
    model: str,
    gpus: int,
    gpu_memory: int | None,
    gpu_memory_utilization: float,
    context: int,
    batch: int,
    mtp: bool,
    formats: tuple[str, ...],
    group_size: int,
    disk_speed: int,
    network_speed: int,
    config: Path | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Say what a model takes before it is fetched: GPU memory by rank and format, disk, time.

    For the name of a known model nothing is downloaded; of a checkpoint at PATH only headers are read. Weights are
    counted exactly, activations estimated, times projected from the speeds of disk and network.
    """
    from weightkit.sizing import Load, Machine, plan

    found = plan(
        what or model,
        Machine(gpus, gpu_memory, gpu_memory_utilization, disk_speed, network_speed),
        Load(context, batch, mtp),
        formats=formats,
        group_size=group_size,
        config=config,
    )
    click.echo(json.dumps(found.to_json()) if as_json else found.render())
