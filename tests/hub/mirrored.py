"""Folders for the mirror's tests, with the lock that whoever fills a folder leaves there."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tiny import write_tiny

from weightkit.checkpoint.folder import LOCK_NAME
from weightkit.checkpoint.lock import Lock, LockedFile
from weightkit.manifests import load

PICO = load("pico").path or Path("manifests/pico/checkpoint")


def write_lock(folder: Path, origin: dict[str, object] | None = None) -> None:
    """Record every file of a folder as it is."""
    files = {
        path.relative_to(folder).as_posix(): LockedFile(
            path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != LOCK_NAME
    }
    (folder / LOCK_NAME).write_bytes(Lock(files, origin or {}).to_bytes())


def write_locked(folder: Path, *, seed: int = 0, origin: dict[str, object] | None = None) -> Path:
    """A small checkpoint with code in a folder of its own, and a lock."""
    write_tiny(folder, seed=seed)
    (folder / "inference").mkdir()
    (folder / "inference/model.py").write_text("x = 1\n")
    write_lock(folder, origin)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """Relative path to content; neither hidden files nor the lock."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != LOCK_NAME
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
