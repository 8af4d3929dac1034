"""``weightkit cast``."""

from __future__ import annotations

from typing import Any

import click

from weightkit.cli.options import Conversion, conversion_options


@click.command()
@click.option("--to", type=click.Choice(["bf16", "f16", "f32"]), required=True, help="The dtype of the weights.")
@click.option("--no-mtp", is_flag=True, help="Leave the MTP layers out.")
@conversion_options
def command(to: str, no_mtp: bool, **options: Any) -> None:
    """Cast the weights of SRC to another float dtype.

    FP8 weights are multiplied by their block scales and rounded once, to nearest even; F32 tensors stay F32. The bits
    do not depend on the device.
    """
    from weightkit.transforms import cast, strip_mtp

    run = Conversion(**options)
    checkpoint = run.open()
    if no_mtp:
        checkpoint = strip_mtp(checkpoint)
    run.write(cast(checkpoint, to), to, *["no-mtp"] * no_mtp)
