"""``weightkit strip``."""

from __future__ import annotations

from typing import Any

import click

from weightkit.cli.options import Conversion, conversion_options


@click.command()
@conversion_options
def command(**options: Any) -> None:
    """Take the MTP layers out of SRC.

    Layers from num_hidden_layers on go; config, index and totals follow. All other bytes are copied.
    """
    from weightkit.transforms import strip_mtp
    from weightkit.workspace import published_form

    run = Conversion(**options)
    form = "no-mtp" if run.src else f"{published_form(run.model)}-no-mtp"
    opened = run.open()
    run.write(strip_mtp(opened), form, opened=opened)
