"""The journal of a write: what is durable, line by line, so that a later run does only what is left.

``.weightkit/journal.jsonl`` begins with the plan's hash, its sources and the names of all files that it writes. After
that a line is one of

    {"file": NAME, "bytes": N, "sha256": HEX}                  the first N bytes of NAME.partial are on the disk
    {"file": NAME, "bytes": N, "sha256": HEX, "done": true}    NAME is complete and in place

Each line is synced before the next step. What follows a line that was cut short or damaged is dropped: lines are only
hints, a partial file is hashed before it is continued.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weightkit.checkpoint.index import is_relative_path
from weightkit.checkpoint.stamp import Stamp
from weightkit.durable import STATE_DIR, sync_folder

JOURNAL_NAME = "journal.jsonl"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a file is: ``sha256`` is of its first ``bytes``."""

    bytes: int
    sha256: str
    done: bool = False


@dataclass
class History:
    """What an earlier run left: the hash of its plan, its sources (name to stamp), the relative paths of all files that
    it was to write, and progress by file. ``size_bytes`` is of the lines that were read."""

    plan_hash: str
    sources: dict[str, Stamp]
    names: tuple[str, ...]
    files: dict[str, Progress] = field(default_factory=dict)
    size_bytes: int = 0


class Journal:
    """Appends to the journal in ``target``. Threads may share it.

    Args:
        target: the folder that is written to.
        plan_hash, sources, names: what a fresh journal begins with. See ``History``.
    """

    def __init__(self, target: Path, plan_hash: str, sources: Mapping[str, Stamp], names: Sequence[str]) -> None:
        folder = target / STATE_DIR
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / JOURNAL_NAME
        self._lock = threading.Lock()
        history = read_history(target)
        self._file = self._path.open("ab")
        self._file.truncate(history.size_bytes if history is not None else 0)
        if history is None:
            stamps = {name: stamp.to_list() for name, stamp in sources.items()}
            self._append({"plan": plan_hash, "sources": stamps, "files": list(names)})
            sync_folder(folder)
            sync_folder(target)

    def record(self, file: str, progress: Progress) -> None:
        """Append one file's progress; it is on the disk when this returns."""
        line: dict[str, object] = {"file": file, "bytes": progress.bytes, "sha256": progress.sha256}
        self._append(line | ({"done": True} if progress.done else {}))

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """The write is complete: the journal goes."""
        self.close()
        self._path.unlink()

    def _append(self, line: Mapping[str, object]) -> None:
        with self._lock:
            self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
            os.fdatasync(self._file.fileno())


def read_history(target: Path) -> History | None:
    """What the journal in ``target`` tells; None where there is none, or one that was cut short in its first line."""
    path = target / STATE_DIR / JOURNAL_NAME
    if not path.exists():
        return None
    first, *lines = path.read_bytes().split(b"\n")[:-1] or [b""]  # what follows the last newline was cut short
    history = _read_first(first)
    if history is None:
        return None
    history.size_bytes = len(first) + 1
    for line in lines:
        progress = _read_progress(line, history.names)
        if progress is None:
            break
        history.files.update([progress])
        history.size_bytes += len(line) + 1
    return history


def _read_first(line: bytes) -> History | None:
    try:
        head = json.loads(line)
        sources = {name: Stamp.from_list(values) for name, values in head["sources"].items()}
        names = tuple(head["files"])
        valid = isinstance(head["plan"], str) and all(
            isinstance(name, str) and is_relative_path(name) for name in names
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return History(head["plan"], sources, names) if valid else None


def _read_progress(line: bytes, names: Collection[str]) -> tuple[str, Progress] | None:
    try:
        entry = json.loads(line)
        name, progress = entry["file"], Progress(entry["bytes"], entry["sha256"], entry.get("done", False))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    valid = type(progress.bytes) is int and isinstance(progress.sha256, str) and type(progress.done) is bool
    return (name, progress) if valid and name in names else None
