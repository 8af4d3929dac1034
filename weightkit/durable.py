"""Files that survive a crash, in a folder that one process at a time writes to."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from weightkit.errors import SpaceError, TargetError

#: Where a writer keeps its journal; gone when the target is complete.
STATE_DIR = ".weightkit"
#: Ending of a file's name while it is written.
PARTIAL = ".partial"
#: What a full disk answers.
FULL = (errno.ENOSPC, errno.EDQUOT)
#: Room left for what grows beside the weights: journal, folders, the filesystem's own needs.
SLACK_BYTES = 16 << 20
_WRITER = "writer"


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: bytes | Iterable[bytes], *, durable: bool = True) -> None:
    """A small file, whole or not at all: under a partial name, synced, renamed; with the umask's mode."""
    partial = path.with_name(path.name + PARTIAL)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    with os.fdopen(handle, "wb") as file:
        for chunk in [content] if isinstance(content, bytes) else content:
            file.write(chunk)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    partial.rename(path)
    if durable:
        sync_folder(path.parent)


def no_space(path: Path) -> SpaceError:
    """What to raise for a full disk."""
    return SpaceError(
        "the disk is full",
        where=path,
        fix="Free some space and run the same command again: it continues where it stopped.",
    )


class Hold:
    """A target that is this process's alone. Processes elsewhere may write there on its behalf while ``is_held`` says
    so to them.

    ``name`` is unlike that of any other hold.
    """

    def __init__(self, handle: int) -> None:
        self.name = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
        self._handle = handle
        self.revoke()  # who helped a holder that was killed

    def announce(self) -> None:
        """From now on others may write on this process's behalf."""
        os.pwrite(self._handle, self.name.encode(), 0)
        os.fsync(self._handle)  # on a network filesystem others see it from now on

    def revoke(self) -> None:
        """From now on they may not, and stop when they next look."""
        os.ftruncate(self._handle, 0)
        os.fsync(self._handle)


def is_held(target: Path, name: str) -> bool:
    """Whether the hold of this name has ``target``, seen from here, and lets others write there."""
    try:
        return (target / STATE_DIR / _WRITER).read_bytes() == name.encode()
    except OSError:
        return False


@contextmanager
def only_writer(target: Path) -> Iterator[Hold]:
    """Hold the target for this process; its state folder goes afterwards, if nothing else is in it.

    Raises ``TargetError`` where another process has it.
    """
    folder = target / STATE_DIR
    handle = _hold(folder)
    try:
        yield Hold(handle)
    finally:
        with suppress(OSError):  # not empty: a journal says what is left to do
            (folder / _WRITER).unlink(missing_ok=True)
            folder.rmdir()
        os.close(handle)


def _hold(folder: Path) -> int:
    """A handle on the file whose lock says who writes."""
    path = folder / _WRITER
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            continue  # a writer that ended took the folder away
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(handle)
            raise TargetError(
                "another process is writing there", where=folder.parent, fix="Wait for it, or name another target."
            ) from exc
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(handle).st_ino:
                return handle
        os.close(handle)  # a writer that ended took this file away: its lock keeps nobody out
