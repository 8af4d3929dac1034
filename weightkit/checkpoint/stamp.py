"""What tells that a file is still the one that was looked at."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from weightkit.errors import MissingFileError


@dataclass(frozen=True, slots=True)
class Stamp:
    """A file's size, and when it was modified."""

    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Stamp:
        return cls(stat.st_size, stat.st_mtime_ns)


def stamp_file(path: Path) -> Stamp:
    """The stamp of a file. Raises ``MissingFileError``."""
    try:
        return Stamp.of(path.stat())
    except FileNotFoundError as exc:
        raise MissingFileError("no such file", where=path) from exc
