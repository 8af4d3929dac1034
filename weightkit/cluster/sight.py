"""Whether a node sees what the process that started the work sees."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from weightkit.checkpoint.stamp import Stamp, stamp_file
from weightkit.errors import ClusterError, MissingFileError
from weightkit.remote.address import is_address
from weightkit.version import build

SHARE = "Source and target must lie on a filesystem that all nodes share, under the same paths."
INSTALL = "Install the same weightkit on every node, for the Python that Ray was started with."


def require_build(expected: str) -> None:
    """Raise ``ClusterError`` where this is another weightkit: its bytes may be others."""
    if build() != expected:
        raise ClusterError("another weightkit", expected=expected, found=build(), fix=INSTALL)


def require_seen(stamps: Mapping[str, Stamp]) -> None:
    """Raise ``ClusterError`` for the first file that is not there, or is another."""
    for path, stamp in stamps.items():
        found: object = stamp
        if not is_address(path):
            try:
                found = stamp_file(Path(path))
            except MissingFileError:
                found = "no such file"
            except OSError as exc:
                found = exc.strerror
        if found != stamp:
            raise ClusterError("this node does not see the source", where=path, expected=stamp, found=found, fix=SHARE)
