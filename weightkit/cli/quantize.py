"""``weightkit quantize``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from weightkit.cli.options import (
    PATH,
    SIZE,
    config_option,
    debug_option,
    device_option,
    executor_options,
    json_option,
    model_option,
    quiet_option,
    require_executor,
    without,
)


@click.command()
@click.argument("src", type=PATH, required=False)
@click.argument("dst", type=PATH, required=False)
@click.option("--bits", type=click.Choice(["4", "8"]), default="4", show_default=True, help="Width of an integer.")
@click.option(
    "--group-size", type=int, default=128, show_default=True, help="Columns that share a scale; -1 for all of them."
)
@click.option(
    "--scope",
    type=click.Choice(["experts", "all"]),
    default="experts",
    show_default=True,
    help="Routed and shared experts, or all linear maps of the layers.",
)
@click.option(
    "--method",
    type=click.Choice(["gptq", "rtn"]),
    default="gptq",
    show_default=True,
    help="rtn rounds to nearest, without calibration.",
)
@click.option("--calibration", type=PATH, help="Text, JSON lines or token ids.  [default: the manifest's]")
@click.option("--samples", type=click.IntRange(min=1), help="Sequences of it.  [default: 512, or the manifest's]")
@click.option("--seq-len", type=click.IntRange(min=1), help="Tokens of each.  [default: 4096, or the manifest's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of their choice.")
@click.option(
    "--damping",
    type=click.FloatRange(min=0, min_open=True),
    default=0.01,
    show_default=True,
    help="Added to a Hessian's diagonal, as a fraction of its mean.",
)
@click.option(
    "--order",
    type=click.Choice(["act", "none"]),
    default="act",
    show_default=True,
    help="Columns with the largest inputs first, or in their own order.",
)
@click.option(
    "--scales",
    type=click.Choice(["search", "largest"]),
    default="search",
    show_default=True,
    help="Try grids smaller than the largest weight asks for, or not.",
)
@click.option("--no-mtp", is_flag=True, help="Leave the MTP layers out.")
@click.option("--gpu-memory", type=SIZE, help="Most memory to use of a GPU, such as 24GiB.  [default: what is free]")
@click.option("--host-memory", type=SIZE, help="Most of the host's.  [default: what is free]")
@click.option(
    "--snapshot-layers",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    help="Keep activations on the disk after so many layers, for a resume; 0 for never.",
)
@executor_options
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    help="With --executor ray: processes, each with a GPU of its own.  [default: all GPUs]",
)
@model_option
@config_option
@click.option("--dry-run", is_flag=True, help="Print the plan and its cost; write nothing.")
@device_option
@click.option("--force", is_flag=True, help="Replace what an earlier run left in DST.")
@json_option
@quiet_option
@debug_option
@click.pass_context
def command(
    ctx: click.Context,
    src: Path | None,
    dst: Path | None,
    bits: str,
    group_size: int,
    scope: str,
    method: str,
    calibration: Path | None,
    samples: int | None,
    seq_len: int | None,
    seed: int,
    damping: float,
    order: str,
    scales: str,
    no_mtp: bool,
    gpu_memory: int | None,
    host_memory: int | None,
    snapshot_layers: int,
    executor: str,
    address: str | None,
    ranks: int | None,
    model: str,
    config: Path | None,
    dry_run: bool,
    device: str,
    force: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> int | None:
    """Quantize SRC, in FP8 or BF16, to int4 in the AutoGPTQ format.

    Layer by layer: each sees what the quantized layers before it make of the calibration text, and is written when it
    is done. A rerun continues with the layer that was in work. Several GPUs of a machine share the work under torchrun,
    torchrun --nproc-per-node 8 -m weightkit quantize; those of several machines with --executor ray.
    """
    require_executor(executor, address)
    if ranks is not None and executor != "ray":
        raise click.UsageError("--ranks needs --executor ray; without Ray, torchrun starts the ranks.")
    from weightkit.layouts import open_checkpoint
    from weightkit.quantization.calibration import Size, default_calibration, default_size
    from weightkit.quantization.job import describe, prepare
    from weightkit.quantization.run import carry_out
    from weightkit.quantization.settings import Settings
    from weightkit.workspace import home, source, target

    if executor == "ray" and not dry_run:
        return _on_cluster(src or source(model), ranks, address, device)
    settings = Settings(
        bits=int(bits),
        group_size=group_size,
        scope=scope,
        method=method,
        damping=damping,
        order=order,
        scales=scales,
        mtp=not no_mtp,
    )
    checkpoint = open_checkpoint(src or source(model), config=config)
    usual = Size()
    named = ctx.get_parameter_source("model") is not click.core.ParameterSource.DEFAULT
    if calibration is None and method == "gptq" and (src is None or named):
        calibration, usual = default_calibration(model, home() / "calibration"), default_size(model)
    job = prepare(
        checkpoint,
        dst or target(model, src, settings.form),
        settings,
        calibration=calibration,
        samples=samples or usual.samples,
        seq_len=seq_len or usual.seq_len,
        seed=seed,
        device=device,
        gpu_memory=gpu_memory,
        host_memory=host_memory,
        snapshot_layers=snapshot_layers,
        title=model if src is None else None,
    )
    if dry_run:
        cost = describe(job, force=force)
        job.ranks.leave()
        if job.ranks.rank == 0:
            click.echo(json.dumps(cost.to_json()) if as_json else cost.render())
        return None
    outcome = carry_out(job, progress=not quiet, force=force)
    job.ranks.leave()
    if outcome is None:
        return None
    if as_json:
        click.echo(json.dumps(outcome.to_json()))
    elif not quiet:
        click.echo(outcome.render())
    return None


def _on_cluster(source: Path, ranks: int | None, address: str | None, device: str) -> int:
    """Run this command on the nodes of a Ray cluster; the exit code."""
    from weightkit.checkpoint.stamp import stamp_file
    from weightkit.cluster.ranks import start
    from weightkit.remote.address import is_address

    files = [] if is_address(str(source)) else sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    return start(
        without(sys.argv[1:], "--executor", "--address", "--ranks"),
        ranks=ranks,
        address=address,
        device=device,  # type: ignore[arg-type]
        sources={str(path.absolute()): stamp_file(path) for path in files},
        say=lambda said: click.echo(said.line, err=said.is_error),
    )
