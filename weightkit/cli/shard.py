"""``weightkit shard``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from weightkit.cli.options import PATH, Conversion, conversion_options


@click.command(short_help="Shard SRC into one file a rank.")
@click.option("--mp", type=click.IntRange(min=1), help="Model-parallel ranks: one file each.")
@click.option(
    "--ep", type=click.IntRange(min=1), help="Expert-parallel ranks: routed experts divided, the rest on each."
)
@click.option("--to", type=click.Choice(["bf16", "f16", "f32"]), help="Cast on the way.")
@click.option("--experts", type=click.IntRange(min=1), help="Keep so many routed experts a layer.")
@click.option(
    "--keep", type=PATH, help="JSON of layer to ids of the experts to keep.  [default: the first of each group]"
)
@conversion_options
def command(
    mp: int | None, ep: int | None, to: str | None, experts: int | None, keep: Path | None, **options: Any
) -> None:
    """Shard SRC into one file a rank, as DeepSeek's inference demo loads them.

    SRC may be in the published layout or sharded at another degree. MTP layers are left out.
    """
    from weightkit.transforms import cast, keep_experts, read_kept, shard, strip_mtp

    if (mp is None) == (ep is None):
        raise click.UsageError("Give either --mp or --ep.")
    if keep is not None and experts is None:
        raise click.UsageError("--keep needs --experts.")
    run = Conversion(**options)
    opened = run.open()
    checkpoint = strip_mtp(opened)
    if experts is not None:
        checkpoint = keep_experts(checkpoint, experts, kept=None if keep is None else read_kept(keep))
    if to is not None:
        checkpoint = cast(checkpoint, to)
    ranks = f"mp{mp}" if mp is not None else f"ep{ep}"
    parts = [to, f"experts{experts}" if experts is not None else None, ranks]
    files = shard(checkpoint, mp=mp, ep=ep)
    copies = checkpoint.tensors == opened.tensors and set(files.files) == {Path(path).name for path in opened.stamps}
    run.write(files, *[part for part in parts if part is not None], copies=copies)
