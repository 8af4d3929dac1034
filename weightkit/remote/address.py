"""Addresses of checkpoints: ``hf://owner/name[@revision]``, ``s3://bucket/prefix``, ``https://host/folder``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from weightkit.errors import NotACheckpointError

SCHEMES = ("hf", "s3", "https", "http")
_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://(?P<rest>.*)", re.DOTALL)
#: An address as ``pathlib`` leaves it: of two slashes, one.
_COLLAPSED = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?P<rest>[^/].*)", re.DOTALL)
_HUB = re.compile(
    r"(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<path>.+))?", re.DOTALL
)
#: Variables that say where an address is asked for. None of them is a secret.
_WHERE = (
    "HF_ENDPOINT",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "FSSPEC_S3_ANON",
)
EXPECTED = "hf://owner/name, s3://bucket/folder, https://host/folder or http://host/folder"


def is_address(path: str) -> bool:
    """Whether it is an address, and no file's path."""
    return "://" in path


def endpoints() -> dict[str, str]:
    """What the environment says of where addresses are asked for, so that other processes ask there too."""
    return {name: os.environ[name] for name in _WHERE if name in os.environ}


def address_of(what: str | os.PathLike[str]) -> str | None:
    """The address that ``what`` is, without doubled and final slashes; None for a local path.

    A ``Path`` that was made from an address has lost a slash; it is told from a local one by what lies there.
    """
    text = os.fspath(what)
    match = _ADDRESS.fullmatch(text)
    if match is None and not isinstance(what, str):
        match = _COLLAPSED.fullmatch(text)
        if match is not None and Path(text.split("/", 1)[0]).exists():
            return None
    return None if match is None else _whole(match)


def restored(collapsed: str) -> str:
    """The address that ``pathlib`` has taken a slash from; any other path as it is."""
    match = _COLLAPSED.fullmatch(collapsed)
    return collapsed if match is None else _whole(match)


def _whole(match: re.Match[str]) -> str:
    return f"{match['scheme'].lower()}://" + "/".join(part for part in match["rest"].split("/") if part)


def require_readable(address: str) -> None:
    """Raise ``NotACheckpointError`` for an address of another kind than those that are read, or with what would have to
    be kept secret in it."""
    scheme, _, rest = address.partition("://")
    if scheme not in SCHEMES or not rest:
        raise NotACheckpointError("an address that nothing is read from", where=address, expected=EXPECTED)
    if scheme in ("http", "https"):
        parts = urlsplit(address)
        if parts.query or parts.fragment:
            raise NotACheckpointError(
                "an address with a query",
                where=address.partition("?")[0].partition("#")[0],
                expected="a folder's address, to which the names of files are added",
            )
        if parts.username or parts.password:
            raise NotACheckpointError(
                "a name or password in an address, which is written into logs and locks",
                where=f"{scheme}://{rest.rpartition('@')[2]}",
                fix="Put them into ~/.netrc.",
            )


@dataclass(frozen=True)
class HubAddress:
    """``hf://repo@revision/path``; ``path`` is empty for the repository itself."""

    repo: str
    revision: str | None
    path: str

    def __str__(self) -> str:
        return (
            f"hf://{self.repo}" + (f"@{self.revision}" if self.revision else "") + (f"/{self.path}" * bool(self.path))
        )


def parse_hub(address: str) -> HubAddress:
    """The parts of an ``hf://`` address. Raises ``NotACheckpointError``."""
    match = _HUB.fullmatch(address.removeprefix("hf://"))
    if match is None:
        raise NotACheckpointError("no repository's address", where=address, expected="hf://owner/name[@revision]")
    return HubAddress(match["repo"], match["revision"], match["path"] or "")


def title_of(what: Path) -> str:
    """The name of a folder, for people and for what is made from it; of a repository without its revision."""
    address = address_of(what)
    if address is None:
        return (what.resolve() if what.name in ("", "..") else what).name
    if address.startswith("hf://"):
        hub = parse_hub(address)
        return (hub.path or hub.repo).rpartition("/")[2]
    return address.rpartition("/")[2]
