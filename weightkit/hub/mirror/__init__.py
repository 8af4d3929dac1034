"""A read-only hub for the local network: one machine downloads, the others fetch from it.

It speaks the Hugging Face protocol and ModelScope's, so that their clients, and whatever is built on them, need only
``HF_ENDPOINT`` or ``MODELSCOPE_ENDPOINT``.

contents.py      a folder's verified files: stamps, checksums, the commit that follows from them
names.py         under which ids a folder is served
catalog.py       repositories by id
huggingface.py, modelscope.py    the routes
body.py          files and ranges of them
app.py, server.py    the application, and the application on a socket
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from weightkit.errors import PlanError
from weightkit.hub.mirror.catalog import Catalog
from weightkit.hub.mirror.contents import Repository, hash_folder, open_repository
from weightkit.hub.mirror.names import check_id, default_ids

if TYPE_CHECKING:
    from starlette.applications import Starlette

__all__ = [
    "Catalog",
    "Repository",
    "can_serve",
    "check_id",
    "default_ids",
    "hash_folder",
    "mirror_app",
    "open_repository",
    "serve",
]


def mirror_app(folders: Mapping[str, str | Path], *, progress: bool = False) -> Starlette:
    """The application that serves ``folders`` (path by ``owner/name``), verified first.

    Raises what ``open_repository`` raises, and ``PlanError`` where the extra ``mirror`` is not installed.
    """
    require_server()
    from weightkit.hub.mirror.app import build_app

    opened = (open_repository(Path(path), [check_id(name)], progress=progress) for name, path in folders.items())
    return build_app(Catalog(opened))


@contextmanager
def serve(folders: Mapping[str, str | Path], *, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve ``folders`` (path by ``owner/name``) while the block lasts; yields the endpoint, such as
    ``http://127.0.0.1:41234``.

    Raises what ``mirror_app`` raises, and ``PlanError`` for an address that cannot be had.
    """
    app = mirror_app(folders)
    from weightkit.hub.mirror.server import endpoint_of, in_thread, listen

    listener = listen(host, port)
    with in_thread(app, listener):
        yield endpoint_of(listener)


def can_serve() -> bool:
    """Whether the server library, the extra ``mirror``, is installed."""
    return not _missing()


def _missing() -> list[str]:
    return [name for name in ("starlette", "uvicorn") if find_spec(name) is None]


def require_server() -> None:
    """Raise ``PlanError`` where the server library is not installed."""
    missing = _missing()
    if missing:
        raise PlanError(
            "the mirror needs a server library",
            expected="starlette and uvicorn",
            found=f"no {' and no '.join(missing)}",
            fix="Install it: pip install 'weightkit[mirror]'",
        )
