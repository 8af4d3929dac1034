"""Under which ids a folder is served."""

from __future__ import annotations

import os
import re
from pathlib import Path

from weightkit import manifests, workspace
from weightkit.checkpoint.lock import read_lock
from weightkit.errors import PlanError
from weightkit.examine.checksums import shipped_manifest
from weightkit.hub.mirror.contents import fetch_origin

#: Owner of what has no id on a hub.
OWNER = "weightkit"
# huggingface_hub.utils.validate_repo_id, which its clients apply before they ask.
_PART = re.compile(r"(?![-.])(?!.*(?:--|\.\.))[A-Za-z0-9_.-]{1,96}(?<![-.])")


def is_id(text: str) -> bool:
    """Whether clients take ``text`` for ``owner/name``."""
    parts = text.split("/")
    return len(parts) == 2 and all(_PART.fullmatch(part) for part in parts) and not text.endswith(".git")


def default_ids(folder: Path) -> tuple[str, ...]:
    """The ids of a folder that is given none: the repository that it was fetched from; those of the hubs, where it is a
    known model as published; and ``weightkit/NAME``, NAME from the model and form in the workspace, or from the folder.

    Raises ``PlanError`` where the folder's name makes no id, ``FormatError`` for a damaged lock.
    """
    real = Path(os.path.realpath(folder))
    shipped = shipped_manifest(real)
    if shipped is not None:
        return (f"{OWNER}/{shipped.name}",)
    fetched = str(fetch_origin(read_lock(real)).get("repo"))
    ids = [fetched] if is_id(fetched) else []
    model, form = real.parent.name, real.name
    if real.parent.parent != Path(os.path.realpath(workspace.home())) or model not in manifests.names():
        return tuple(dict.fromkeys([*ids, _own(form, folder)]))
    if form == workspace.published_form(model):
        ids += [hub.id for hub in manifests.load(model).hubs.values()]
    return tuple(dict.fromkeys([*ids, _own(f"{model}-{form}", folder)]))


def _own(name: str, folder: Path) -> str:
    found = f"{OWNER}/{name}"
    if not is_id(found):
        raise PlanError(
            "the folder's name makes no id that clients accept",
            where=folder,
            expected="letters, digits, '.', '_' and '-'",
            found=repr(name),
            fix=f"Give it one: --name {OWNER}/NAME={folder}",
        )
    return found


def check_id(text: str) -> str:
    """``text``, or ``PlanError`` where clients would not take it for an id."""
    if not is_id(text):
        raise PlanError(
            "not an id that clients accept",
            where=text,
            expected="owner/name, of letters, digits, '.', '_' and '-'",
        )
    return text
