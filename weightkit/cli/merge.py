"""``weightkit merge``."""

from __future__ import annotations

from typing import Any

import click

from weightkit.cli.options import Conversion, conversion_options


@click.command()
@conversion_options
def command(**options: Any) -> None:
    """Merge the rank files of SRC back into the published layout.

    Every tensor comes back byte for byte; of a SRC in the published layout it makes a copy. Without SRC: the only rank
    files of the model in the workspace.
    """
    from weightkit.transforms import merge
    from weightkit.workspace import sharded_source

    run = Conversion(**options)
    checkpoint = run.open(sharded_source)
    form = "merged" if run.src else f"{checkpoint.root.name}-merged"
    run.write(merge(checkpoint), form, copies=bool(checkpoint.placement))
