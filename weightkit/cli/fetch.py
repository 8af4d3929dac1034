"""``weightkit fetch``."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import click

from weightkit.cli.options import PATH, debug_option, json_option, quiet_option
from weightkit.workspace import DEFAULT_MODEL

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


class _Rate(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic from click 8.4 on
    """``50M``: bytes a second, decimal units."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)(?:b(?:/s)?)?", str(value).strip().lower())
        if found is None or not float(found[1]):
            self.fail(f"{value!r} is no rate. Write bytes a second, such as 50M.", param, ctx)
        return float(found[1]) * _UNITS[found[2]]


@click.command()
@click.argument("model", default=DEFAULT_MODEL)
@click.argument("dst", type=PATH, required=False)
@click.option(
    "--hub",
    type=click.Choice(["auto", "huggingface", "modelscope", "both"]),
    default="auto",
    show_default=True,
    help="Where from: auto takes the faster one, and the other steps in; both takes both at once.",
)
@click.option("--revision", help="Branch, tag or commit; pinned to a commit first.")
@click.option("--jobs", type=click.IntRange(min=1), help="Streams at once.  [default: 8]")
@click.option("--include", multiple=True, metavar="PATTERN", help="Only files whose path matches; may be repeated.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="No file whose path matches; may be repeated.")
@click.option("--no-mtp", is_flag=True, help="Leave out files that hold MTP tensors alone.")
@click.option("--check", is_flag=True, help="Hash finished files again, and mend what is damaged.")
@click.option("--max-rate", type=_Rate(), help="Bytes a second at most, such as 50M.")
@click.option("--token", help="For the hub that --hub names.  [default: what the hub's client has]")
@click.option("--dry-run", is_flag=True, help="Print what would be fetched; write nothing.")
@json_option
@quiet_option
@debug_option
def command(
    model: str,
    dst: Path | None,
    max_rate: float | None,
    jobs: int | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Fetch MODEL from Hugging Face or ModelScope into DST.

    MODEL is a known model's name or a repository, owner/name. Every file is verified. After any failure, run the same
    command again: it continues where it stopped.
    """
    from weightkit.hub import execute, plan_fetch

    if options["token"] and options["hub"] not in ("huggingface", "modelscope"):
        raise click.UsageError("--token needs --hub huggingface or --hub modelscope, so that no other hub sees it.")
    _quieten_clients()
    plan = plan_fetch(model, dst, **options)
    if dry_run:
        click.echo(json.dumps(plan.to_json()) if as_json else plan.render())
        return
    idle = plan.complete
    done = execute(plan, jobs=jobs, max_rate=max_rate, progress=not quiet)
    if as_json:
        click.echo(json.dumps(done.to_json()))
    elif not quiet:
        for note in done.notes if idle else ():  # of others it was told as they came
            click.echo(note, err=True)
        click.echo(done.render())


def _quieten_clients() -> None:
    """What the clients warn of is either tried again or ends in an error of ours."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("MODELSCOPE_LOG_LEVEL", "ERROR")
