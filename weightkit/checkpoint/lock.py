"""``weightkit.lock.json``: size and SHA-256 of every file of a checkpoint, and where they came from.

Whoever fills a folder writes it last; ``verify`` holds the folder to it without a network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from weightkit.checkpoint.folder import LOCK_NAME
from weightkit.checkpoint.index import is_relative_path
from weightkit.checkpoint.json_file import json_bytes, read_json_object
from weightkit.errors import FormatError

VERSION = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class LockedFile:
    """``sha256`` is in lower-case hexadecimal digits."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Lock:
    """``origin`` says what made the files, such as ``{"plan": HASH}``; ``files`` maps relative path to size and
    checksum."""

    files: Mapping[str, LockedFile]
    origin: Mapping[str, object] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        files = {name: asdict(file) for name, file in sorted(self.files.items())}
        return json_bytes({"version": VERSION, "origin": dict(self.origin), "files": files})


def read_lock(folder: Path) -> Lock | None:
    """The lock of a folder, None where it has none. Raises ``FormatError`` for a damaged one."""
    path = folder / LOCK_NAME
    if not path.exists():
        return None
    value = read_json_object(path)
    if value.get("version") != VERSION:
        raise FormatError("a lock of another version", where=path, expected=VERSION, found=value.get("version"))
    files, origin = value.get("files"), value.get("origin", {})
    if not isinstance(files, dict) or not isinstance(origin, dict):
        raise FormatError("a damaged lock", where=path, expected="the objects files and origin")
    return Lock({name: _locked_file(name, entry, path) for name, entry in files.items()}, origin)


def _locked_file(name: str, entry: object, where: Path) -> LockedFile:
    if isinstance(entry, dict) and entry.keys() == {"size_bytes", "sha256"} and is_relative_path(name):
        size, sha256 = entry["size_bytes"], entry["sha256"]
        if type(size) is int and size >= 0 and isinstance(sha256, str) and _SHA256.fullmatch(sha256):
            return LockedFile(size, sha256)
    raise FormatError(f"{name!r}: a damaged entry", where=where, expected="a relative path with size_bytes and sha256")
