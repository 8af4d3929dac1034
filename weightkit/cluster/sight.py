"""Whether a node sees what the process that started the work sees."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import weightkit
from weightkit.checkpoint.stamp import Stamp, stamp_file
from weightkit.errors import ClusterError, MissingFileError
from weightkit.remote.address import is_address

SHARE = "Source and target must lie on a filesystem that all nodes share, under the same paths."
INSTALL = "Install the same version of weightkit on every node, for the Python that Ray was started with."


def require_version(version: str) -> None:
    """Raise ``ClusterError`` where this is another weightkit: its bytes may be others."""
    if weightkit.__version__ != version:
        raise ClusterError("another version of weightkit", expected=version, found=weightkit.__version__, fix=INSTALL)


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
