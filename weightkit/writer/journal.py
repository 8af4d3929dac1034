"""The journal of a write: what is durable, line by line, so that a later run does only what is left.

``.weightkit/journal.jsonl`` begins with the plan's hash and sources. After that a line is one of

    {"file": NAME, "bytes": N, "sha256": HEX}                  the first N bytes of NAME.partial are on the disk
    {"file": NAME, "bytes": N, "sha256": HEX, "done": true}    NAME is complete and in place

Each line is synced before the next step; a last line cut short by a crash is dropped.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weightkit.checkpoint.folder import STATE_DIR
from weightkit.checkpoint.reading import Stamp
from weightkit.errors import FormatError

JOURNAL_NAME = "journal.jsonl"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a file is: ``sha256`` is of its first ``bytes``."""

    bytes: int
    sha256: str
    done: bool = False


@dataclass
class History:
    """What an earlier run left: the hash of its plan, its sources (name to stamp), and progress by file."""

    plan_hash: str
    sources: dict[str, Stamp]
    files: dict[str, Progress] = field(default_factory=dict)


class Journal:
    """Appends to the journal in ``target``. Threads may share it."""

    def __init__(self, target: Path, plan_hash: str, sources: Mapping[str, Stamp]) -> None:
        self._folder = target / STATE_DIR
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / JOURNAL_NAME
        fresh = not path.exists()
        self._lock = threading.Lock()
        if not fresh:
            _drop_torn_line(path)
        self._file = path.open("ab")
        if fresh:
            stamps = {name: [stamp.size_bytes, stamp.mtime_ns] for name, stamp in sources.items()}
            self._append({"plan": plan_hash, "sources": stamps})
            sync_folder(self._folder)

    def record(self, file: str, progress: Progress) -> None:
        """Append one file's progress; it is on the disk when this returns."""
        line: dict[str, object] = {"file": file, "bytes": progress.bytes, "sha256": progress.sha256}
        self._append(line | ({"done": True} if progress.done else {}))

    def close(self) -> None:
        self._file.close()

    def remove(self) -> None:
        """The write is complete: the journal's folder goes."""
        self.close()
        shutil.rmtree(self._folder)

    def _append(self, line: Mapping[str, object]) -> None:
        with self._lock:
            self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
            os.fdatasync(self._file.fileno())


def read_history(target: Path) -> History | None:
    """What the journal in ``target`` tells, None where there is none. Raises ``FormatError`` for a damaged one."""
    path = target / STATE_DIR / JOURNAL_NAME
    if not path.exists():
        return None
    lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline was cut short
    if not lines:
        return None
    try:
        head = json.loads(lines[0])
        sources = {name: Stamp(size, mtime) for name, (size, mtime) in head["sources"].items()}
        history = History(head["plan"], sources)
        for line in map(json.loads, lines[1:]):
            history.files[line["file"]] = Progress(line["bytes"], line["sha256"], line.get("done", False))
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise FormatError("a damaged journal", where=path, fix="Start anew with --force.") from exc
    return history


def _drop_torn_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
