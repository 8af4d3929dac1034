"""``weightkit cast``."""

from __future__ import annotations

from typing import Any

import click

from weightkit.cli.options import Conversion, conversion_options


@click.command()
@click.option("--to", type=click.Choice(["bf16", "f16", "f32", "fp8"]), required=True, help="The dtype of the weights.")
@click.option(
    "--scale-fmt",
    type=click.Choice(["f32", "ue8m0"]),
    default="f32",
    show_default=True,
    help="Of FP8 block scales; ue8m0 for powers of two.",
)
@click.option("--no-mtp", is_flag=True, help="Leave the MTP layers out.")
@conversion_options
def command(to: str, scale_fmt: str, no_mtp: bool, **options: Any) -> None:
    """Cast the weights of SRC to another float dtype.

    FP8 weights are multiplied by their block scales and rounded once, to nearest even; F32 tensors stay F32. The bits
    do not depend on the device. --to fp8 is the way back: blocks of 128 x 128 with a scale each, and weights that came
    from FP8 keep their values.
    """
    from weightkit.transforms import cast, cast_to_fp8, strip_mtp

    run = Conversion(**options)
    opened = run.open()
    checkpoint = strip_mtp(opened) if no_mtp else opened
    made = cast_to_fp8(checkpoint, scale_fmt=scale_fmt) if to == "fp8" else cast(checkpoint, to)
    run.write(made, to, *["no-mtp"] * no_mtp, opened=opened)
