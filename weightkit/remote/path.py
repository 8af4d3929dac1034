"""A path that answers as one of a local file does: what reads small files and headers then reads them anywhere.

Folders are known by their address once they were opened (``register``). A path is only its address, so that it can be
joined, compared and sent elsewhere; what lies there is looked up.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PosixPath
from typing import IO, Any

from weightkit.errors import ContentError, UnreachableError
from weightkit.remote.address import address_of, is_address, restored
from weightkit.remote.ranges import RemoteFiles, Version

#: Larger files are weights, and never read whole into memory.
WHOLE_BYTES = 512 << 20
#: Contents of small files are kept, up to so much of a folder.
KEPT_BYTES = 64 << 20
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a remote folder, and what its content hashes to, as far as that is recorded there: SHA-256, or git's id
    of the content."""

    version: Version
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def size_bytes(self) -> int:
        return self.version.size_bytes


@dataclass
class Folder:
    """A remote folder as it was when it was opened.

    Attributes:
        address: with the commit, where there is one.
        entries: by relative path.
        recorded_by: what the checksums are from, for messages; empty where there are none.
    """

    address: str
    entries: dict[str, Entry]
    recorded_by: str = ""
    files: RemoteFiles = field(default_factory=RemoteFiles, repr=False)
    _kept: dict[str, bytes] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def read(self, name: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file. Raises as ``Ranges.read``."""
        out = bytearray(end - start)
        if out:
            self.files.read(f"{self.address}/{name}", self.entries[name].version, start, memoryview(out))
        return bytes(out)

    def content(self, name: str) -> bytes:
        """A whole small file, held to its checksum where one is recorded.

        Raises:
            ContentError: it is another.
            UnreachableError: it is too large to be one, or cannot be read.
        """
        with self._lock:
            if name in self._kept:
                return self._kept[name]
        entry, where = self.entries[name], f"{self.address}/{name}"
        if entry.size_bytes > WHOLE_BYTES:
            raise UnreachableError("too large to be read whole", where=where, found=f"{entry.size_bytes:,} bytes")
        content = self.read(name, 0, entry.size_bytes)
        _require_content(where, entry, content)
        with self._lock:
            if sum(map(len, self._kept.values())) + len(content) <= KEPT_BYTES:
                self._kept[name] = content
        return content


def _require_content(where: str, entry: Entry, content: bytes) -> None:
    if entry.sha256 is not None:
        expected, found = entry.sha256, hashlib.sha256(content).hexdigest()
    elif entry.git_sha1 is not None:
        head = b"blob %d\0" % len(content)
        expected, found = entry.git_sha1, hashlib.sha1(head + content).hexdigest()
    else:
        return
    if found != expected:
        raise ContentError(
            "other bytes than the source records",
            where=where,
            expected=expected,
            found=found,
            fix="Run it again; if it stays so, the source is damaged.",
        )


_FOLDERS: dict[str, Folder] = {}


def register(folder: Folder) -> RemotePath:
    """Make a folder known, in place of an earlier one of the same address. Its path."""
    _FOLDERS[folder.address] = folder
    return RemotePath(folder.address)


def folder_of(address: str) -> tuple[Folder, str]:
    """The folder that an address lies in, and the path in it. Raises ``UnreachableError`` where none was opened."""
    place, name = address, ""
    while place not in _FOLDERS:
        place, slash, last = place.rpartition("/")
        if not slash:
            raise UnreachableError("an address that was not opened", where=address)
        name = f"{last}/{name}" if name else last
    return _FOLDERS[place], name


def is_known(path: RemotePath) -> bool:
    """Whether the folder that it lies in was opened."""
    try:
        folder_of(str(path))
    except UnreachableError:
        return False
    return True


class RemotePath(PosixPath):
    """The address of a remote file or folder. See the module."""

    def __str__(self) -> str:
        return restored(super().__str__())

    def __fspath__(self) -> str:
        return str(self)

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __reduce__(self) -> tuple[type[RemotePath], tuple[str]]:
        return RemotePath, (str(self),)

    @property
    def entry(self) -> Entry | None:
        """What is known of the file; None where there is none."""
        folder, name = folder_of(str(self))
        return folder.entries.get(name)

    def read_range(self, start: int, end: int) -> bytes:
        """Bytes [start, end) of the file. Raises as ``Ranges.read``."""
        self._existing()
        folder, name = folder_of(str(self))
        return folder.read(name, start, end)

    def exists(self, **_: Any) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self, **_: Any) -> bool:
        return self.entry is not None

    def is_dir(self, **_: Any) -> bool:
        folder, name = folder_of(str(self))
        return not name or any(entry.startswith(name + "/") for entry in folder.entries)

    def is_symlink(self) -> bool:
        return False

    def absolute(self) -> RemotePath:
        return self

    def resolve(self, strict: bool = False) -> RemotePath:
        return self

    def stat(self, **_: Any) -> os.stat_result:
        """Mode and size; all else is 0."""
        if self.is_dir():
            return os.stat_result((stat.S_IFDIR | 0o555, 0, 0, 1, 0, 0, 0, 0, 0, 0))
        return os.stat_result((stat.S_IFREG | 0o444, 0, 0, 1, 0, 0, self._existing().size_bytes, 0, 0, 0))

    def lstat(self) -> os.stat_result:
        return self.stat()

    def iterdir(self) -> Iterator[RemotePath]:  # type: ignore[override]
        folder, name = folder_of(str(self))
        below = name + "/" if name else ""
        names = {entry.removeprefix(below).split("/")[0] for entry in folder.entries if entry.startswith(below)}
        return (self / child for child in sorted(names))

    def glob(self, pattern: str, **_: Any) -> Iterator[RemotePath]:  # type: ignore[override]
        """Files and folders in this one whose names match; no pattern reaches further."""
        return (child for child in self.iterdir() if child.match(pattern))

    def open(self, mode: str = "rb", *_: Any, **__: Any) -> IO[Any]:  # type: ignore[override]
        """A small file, to read its bytes."""
        if mode != "rb":
            raise io.UnsupportedOperation("remote files are read only, as bytes")
        return io.BytesIO(self.read_bytes())

    def read_bytes(self) -> bytes:
        self._existing()
        folder, name = folder_of(str(self))
        return folder.content(name)

    def read_text(self, encoding: str | None = None, errors: str | None = None, **_: Any) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def _existing(self) -> Entry:
        entry = self.entry
        if entry is None:
            raise FileNotFoundError(2, "No such file", str(self))
        return entry


def as_path(what: str | os.PathLike[str]) -> Path:
    """The path of a file or folder here, or elsewhere where ``what`` is an address. Nothing is asked."""
    if isinstance(what, RemotePath):
        return what
    address = address_of(what)
    return Path(what) if address is None else RemotePath(address)


def is_remote(path: Path | str) -> bool:
    """Whether it is the address of a remote file."""
    return isinstance(path, RemotePath) or (isinstance(path, str) and is_address(path))
