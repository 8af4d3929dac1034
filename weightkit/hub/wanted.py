"""What is asked for: a model's name or ``owner/name``, on which hubs, at which revision, which of its files."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightkit import manifests, workspace
from weightkit.errors import ListingError, PlanError, WeightkitError, raise_all
from weightkit.hub.listing import HUB_NAMES, HubName, Listing, RemoteFile
from weightkit.manifests import Manifest

HUB_CHOICES = ("auto", *HUB_NAMES, "both")
_BRANCHES: Mapping[HubName, str] = {"huggingface": "main", "modelscope": "master"}
_ENDPOINTS = ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT")
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_NAME = "Copy the name from the hub's page. A folder on this disk has nothing to fetch."
#: Headers and padding of weight files, as a part of their data; above it the files hold something else.
_HEADERS = 0.02


@dataclass(frozen=True)
class Wanted:
    """A model and where it is published.

    Attributes:
        name: as asked for.
        places: repository and default revision by hub.
        target: where it goes when nothing is said.
        manifest: what is known of it; None of a repository that no manifest names.
        by_name: whether it was asked for by the manifest's name, so that it must be what the manifest says.
    """

    name: str
    places: Mapping[HubName, tuple[str, str]]
    target: Path
    manifest: Manifest | None
    by_name: bool


def resolve(model: str) -> Wanted:
    """Raises ``PlanError`` for a name that is neither a manifest's nor ``owner/name``, or has nothing to fetch."""
    if "/" in model:
        return _resolve_repository(model)
    try:
        manifest = manifests.load(model)
    except PlanError as error:
        close = error.fix is not None and error.fix.startswith("Did you mean")
        fix = error.fix if close else "Use one of these, or the name of a repository, owner/name."
        raise PlanError(error.what, where=error.where, expected=error.expected, fix=fix) from error
    target = workspace.home() / manifest.name / workspace.published_form(manifest.name)
    return Wanted(model, _places(manifest), target, manifest, by_name=True)


def _resolve_repository(repo: str) -> Wanted:
    if not _ID.fullmatch(repo):
        raise PlanError("no repository's name", where=repo, expected="owner/name, or a model's name", fix=_NAME)
    for name in manifests.names():
        manifest = manifests.load(name)
        if any(hub.id == repo for hub in manifest.hubs.values()):
            target = workspace.home() / manifest.name / workspace.published_form(manifest.name)
            return Wanted(repo, _places(manifest), target, manifest, by_name=False)
    places = {hub: (repo, _BRANCHES[hub]) for hub in HUB_NAMES}
    return Wanted(repo, places, workspace.home() / repo.rpartition("/")[2], None, by_name=False)


def _places(manifest: Manifest) -> dict[HubName, tuple[str, str]]:
    places = {hub: (manifest.hubs[hub].id, manifest.hubs[hub].revision) for hub in HUB_NAMES if hub in manifest.hubs}
    if places:
        return places
    if not any(os.environ.get(variable) for variable in _ENDPOINTS):
        raise PlanError(
            "ships with the package and is on no hub, so there is nothing to fetch",
            where=manifest.name,
            fix=f"Use it where it lies ({manifest.path}), or set HF_ENDPOINT to a `weightkit mirror` that has it.",
        )
    return {hub: (f"weightkit/{manifest.name}", _BRANCHES[hub]) for hub in HUB_NAMES}


def choose_hubs(wanted: Wanted, hub: str) -> list[HubName]:
    """The hubs to ask, in order. Raises ``PlanError``."""
    if hub not in HUB_CHOICES:
        raise PlanError("no such hub", where="--hub", expected=f"one of {', '.join(HUB_CHOICES)}", found=hub)
    names = [name for name in HUB_NAMES if name in wanted.places and hub in (name, "auto", "both")]
    if not names:
        raise PlanError("not published on that hub", where=wanted.name, expected=" or ".join(wanted.places), found=hub)
    return names


def select(listing: Listing, include: Sequence[str], exclude: Sequence[str]) -> dict[str, RemoteFile]:
    """The files whose paths match a pattern of ``include`` (all, where there is none) and none of ``exclude``.

    Patterns are the shell's, over the whole path, ``*`` matching slashes too; one that ends in a slash means all below.
    Raises ``PlanError`` where nothing is left.
    """
    taken = {path: file for path, file in listing.files.items() if not include or _matches(path, include)}
    left = {path: file for path, file in taken.items() if not _matches(path, exclude)}
    if not left:
        raise PlanError(
            "no file is left to fetch",
            where=listing.repo,
            expected=f"patterns that match some of {', '.join(list(listing.files)[:6])}, ...",
            found=", ".join([*(f"--include {p}" for p in include), *(f"--exclude {p}" for p in exclude)]),
        )
    return left


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern + "*" if pattern.endswith("/") else pattern) for pattern in patterns)


def require_manifest(wanted: Wanted, listing: Listing) -> None:
    """Raise ``ListingError`` where a model that was asked for by name is not what its manifest says."""
    manifest = wanted.manifest
    if manifest is None or not wanted.by_name:
        return
    where, problems = f"{listing.hub}: {listing.repo}", list[WeightkitError]()
    for path, entry in manifest.files.items():
        file = listing.files.get(path)
        size, sha256 = (entry.get("size_bytes"), entry.get("sha256")) if isinstance(entry, Mapping) else (None, None)
        if file is None:
            problems.append(ListingError(f"{path!r}: not in the listing", where=where))
        elif (size is not None and size != file.size_bytes) or (sha256 and file.sha256 and sha256 != file.sha256):
            problems.append(
                ListingError(
                    f"{path!r}: another file than the manifest has",
                    where=where,
                    expected=f"{size} bytes, {sha256}",
                    found=f"{file.size_bytes} bytes, {file.content}",
                )
            )
    if manifest.expected is not None:
        problems += _total_problems(manifest, listing, where)
    fix = f"Fetch it by its repository's name, {listing.repo}, to have it as it is."
    raise_all(f"not what the manifest of {manifest.name} says", problems, where=where, fix=fix)


def _total_problems(manifest: Manifest, listing: Listing, where: str) -> list[WeightkitError]:
    weights = [file for path, file in listing.files.items() if path.endswith(".safetensors")]
    expected, problems = manifest.expected, list[WeightkitError]()
    if expected is None:
        return problems
    fix = f"Fetch it by its repository's name, {listing.repo}, to have it as it is."
    if expected.files is not None and len(weights) != expected.files:
        what = f"the manifest of {manifest.name} has another number of weight files"
        problems.append(ListingError(what, where=where, expected=expected.files, found=len(weights), fix=fix))
    size = sum(file.size_bytes for file in weights)
    if not expected.size_bytes <= size <= expected.size_bytes * (1 + _HEADERS) + (1 << 20):
        what = f"the manifest of {manifest.name} has weights of another size"
        need = f"{expected.size_bytes:,} bytes and headers"
        problems.append(ListingError(what, where=where, expected=need, found=f"{size:,}", fix=fix))
    return problems
