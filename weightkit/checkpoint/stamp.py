"""What tells that a file is still the one that was looked at."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from weightkit.errors import MissingFileError
from weightkit.remote.path import RemotePath
from weightkit.remote.ranges import Version


@dataclass(frozen=True, slots=True)
class Stamp:
    """A file's size, and when it was modified.

    Of a remote file, in place of the time, ``tag``: what its server calls this version; and ``sha256`` of the whole
    file, where the source records it.
    """

    size_bytes: int
    mtime_ns: int = 0
    tag: str = ""
    sha256: str | None = None

    @classmethod
    def of(cls, stat: os.stat_result) -> Stamp:
        return cls(stat.st_size, stat.st_mtime_ns)

    @property
    def version(self) -> Version:
        """Of a remote file, what its server must still have."""
        return Version(self.size_bytes, self.tag)

    def to_list(self) -> list[object]:
        """Plain values; those of a local file are two numbers."""
        return [self.size_bytes, self.mtime_ns, *([self.tag, self.sha256] if self.tag or self.sha256 else [])]

    @classmethod
    def from_list(cls, values: list[object]) -> Stamp:
        """The reverse of ``to_list``. Raises ``TypeError`` or ``ValueError`` for anything else."""
        size, mtime, tag, sha256 = [*values, "", None][:4] if len(values) == 2 else values
        if not isinstance(tag, str) or not (sha256 is None or isinstance(sha256, str)):
            raise TypeError("not a stamp")
        return cls(int(size), int(mtime), tag, sha256)  # type: ignore[call-overload]


def stamp_file(path: Path) -> Stamp:
    """The stamp of a file. Raises ``MissingFileError``."""
    if isinstance(path, RemotePath):
        entry = path.entry
        if entry is None:
            raise MissingFileError("no such file", where=path)
        return Stamp(entry.size_bytes, 0, entry.version.tag, entry.sha256)
    try:
        return Stamp.of(path.stat())
    except FileNotFoundError as exc:
        raise MissingFileError("no such file", where=path) from exc
