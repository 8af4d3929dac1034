"""``weightkit mirror``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from weightkit.cli.options import debug_option, jobs_option, json_option, quiet_option


@click.command(short_help="Serve checkpoints to other machines, as the hubs do.")
@click.argument("paths", metavar="PATH...", nargs=-1)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on; 0.0.0.0 for all.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8090, show_default=True, help="The port; 0 for a free one."
)
@click.option("--name", "named", multiple=True, metavar="ORG/NAME=PATH", help="Serve PATH under this id.")
@click.option("--verify", "full", is_flag=True, help="Hash all files first, those that a lock vouches for too.")
@jobs_option
@json_option
@click.option("-v", "--verbose", is_flag=True, help="Print each request.")
@quiet_option
@debug_option
def command(
    paths: tuple[str, ...],
    host: str,
    port: int,
    named: tuple[str, ...],
    full: bool,
    jobs: int | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Serve checkpoints to other machines, as the hubs do, until Ctrl-C.

    PATH is a checkpoint's folder or a model of the workspace. Clients of Hugging Face and ModelScope, and weightkit
    fetch, download from here when HF_ENDPOINT or MODELSCOPE_ENDPOINT is this address. Only verified files are served,
    and nothing is ever written.
    """
    if not paths and not named:
        raise click.UsageError("Name a checkpoint's folder, or a model of the workspace.")
    from weightkit.hub.mirror import Catalog, open_repository, require_server

    require_server()
    from weightkit.hub.mirror.app import build_app, render
    from weightkit.hub.mirror.server import endpoint_of, is_loopback, listen, run

    with listen(host, port) as listener:  # before anything is hashed: a taken port is said at once
        folders = _folders(paths, named)
        progress = not quiet
        catalog = Catalog(
            [open_repository(path, ids, full=full, jobs=jobs, progress=progress) for path, ids in folders.items()]
        )
        endpoint = endpoint_of(listener)

        def say() -> None:
            if as_json:
                served = {name: {"commit": state.commit, "path": str(state.folder)} for name, state in catalog}
                click.echo(json.dumps({"endpoint": endpoint, "repositories": served}))
            elif not quiet:
                click.echo(f"{endpoint} serves, until Ctrl-C:\n\n{render(catalog, endpoint)}")
            if not is_loopback(listener):
                click.echo(
                    "Note: whoever reaches this address can read these checkpoints. No password, no encryption.",
                    err=True,
                )

        run(build_app(catalog), listener, on_ready=say, log_requests=verbose)


def _folders(paths: tuple[str, ...], named: tuple[str, ...]) -> dict[Path, list[str]]:
    """The ids of each folder, links resolved so that none is opened twice."""
    from weightkit.hub.mirror import check_id, default_ids

    found: dict[Path, list[str]] = {}
    for item in named:
        name, equals, path = item.partition("=")
        if not equals:
            raise click.UsageError(f"--name {item}: expected ORG/NAME=PATH.")
        found.setdefault(_folder(path).resolve(), []).append(check_id(name))
    for path in paths:
        folder = _folder(path)
        found.setdefault(folder.resolve(), []).extend(default_ids(folder))
    return {folder: list(dict.fromkeys(ids)) for folder, ids in found.items()}


def _folder(path: str) -> Path:
    """A folder by its path, or by the name of a model of the workspace."""
    from weightkit import manifests
    from weightkit.workspace import source

    return source(path) if not Path(path).exists() and path in manifests.names() else Path(path)
