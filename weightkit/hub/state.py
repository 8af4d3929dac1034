"""What fetch keeps in the target, so that a later run continues the same commit and trusts no file that changed.

``.weightkit.fetch.json``       the pinned listings, and a stamp of each file that was found right
``.weightkit/stamps.jsonl``     stamps of the run that is under way, a line each; merged into the above at its end

Both carry a checksum of themselves: a record that was damaged is no record, and what it spoke of is hashed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from weightkit.checkpoint.folder import LOCK_NAME
from weightkit.checkpoint.index import is_relative_path
from weightkit.checkpoint.json_file import read_json_object
from weightkit.checkpoint.lock import Lock, LockedFile, read_lock
from weightkit.durable import STATE_DIR, write_whole
from weightkit.errors import FormatError, WeightkitError
from weightkit.hub.listing import STATE_NAME, Listing, RemoteFile, listing_from_json

VERSION = 1
STAMPS_NAME = "stamps.jsonl"


@dataclass(frozen=True, slots=True)
class FileStamp:
    """A file as it was when its content was known.

    Attributes:
        size_bytes, mtime_ns, ctime_ns, inode: of its stat; a change of any of them means that it is hashed again.
            (``ctime`` tells of edits whose ``mtime`` was set back.)
        sha256: of the content.
        content: what the listing calls the content that this was fetched or made from.
        prefixes: digests of prefixes in hexadecimal, from which a damaged chunk is found; see ``partial``.
        chunk_bytes: how far apart they are.
    """

    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    sha256: str
    content: str
    prefixes: str = ""
    chunk_bytes: int = 0

    @classmethod
    def of(
        cls, status: os.stat_result, sha256: str, content: str, prefixes: bytes = b"", chunk_bytes: int = 0
    ) -> FileStamp:
        times = (status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        return cls(status.st_size, *times, sha256, content, prefixes.hex(), chunk_bytes)

    def still_holds(self, status: os.stat_result) -> bool:
        """Whether nothing tells that the file changed."""
        found = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        return found == (self.size_bytes, self.mtime_ns, self.ctime_ns, self.inode)


@dataclass
class State:
    """What a target holds of an earlier fetch.

    Attributes:
        listings: pinned; the first is the one whose commit counts.
        stamps: by path.
        lock: the target's lock, if a fetch wrote it; ``foreign`` if something else did.
        no_mtp: whether that fetch left MTP files out; ``skipped`` are these, ``derived`` what it wrote in their place.
    """

    listings: list[Listing] = field(default_factory=list)
    stamps: dict[str, FileStamp] = field(default_factory=dict)
    lock: Lock | None = None
    foreign: Lock | None = None
    no_mtp: bool = False
    skipped: list[str] = field(default_factory=list)
    derived: list[str] = field(default_factory=list)

    @property
    def commit(self) -> str | None:
        return self.listings[0].commit if self.listings else None


def read_state(target: Path) -> State:
    """What an earlier fetch left; an empty state where there is none. A damaged record costs hashing, not trust.

    Raises ``FormatError`` for a damaged lock, where no record tells that it was a fetch's and can be written again.
    """
    state, damaged = State(), None
    try:
        lock = read_lock(target) if target.is_dir() else None
    except FormatError as error:
        lock, damaged = None, error
    if lock is not None and isinstance(lock.origin.get("fetch"), Mapping):
        state.lock = lock
    else:
        state.foreign = lock
    with suppress(WeightkitError, OSError):
        path = target / STATE_NAME
        if path.exists():
            value = _checked(read_json_object(path))
            if value is not None and value.get("version") == VERSION:
                listings, stamps = value.get("listings"), value.get("stamps")
                if isinstance(listings, list) and isinstance(stamps, dict):
                    state.listings = [listing_from_json(item, path) for item in listings]
                    state.stamps = {name: stamp for name, entry in stamps.items() if (stamp := _stamp(entry))}
                    state.no_mtp = value.get("no_mtp") is True
                    state.skipped, state.derived = (_texts(value.get(key)) for key in ("skipped", "derived"))
    with suppress(OSError):
        for line in (target / STATE_DIR / STAMPS_NAME).read_bytes().split(b"\n")[:-1]:
            with suppress(ValueError, KeyError, TypeError):
                entry = _checked(json.loads(line))
                if entry is not None and (stamp := _stamp(entry["stamp"])):
                    state.stamps[str(entry["path"])] = stamp
    if damaged is not None and not state.listings:
        damaged.fix = f"Remove {LOCK_NAME}; fetch then hashes what is there and writes it anew."
        raise damaged
    return state


def with_check(record: Mapping[str, object]) -> bytes:
    """A record as JSON on one line, with the SHA-256 of itself."""
    return _dumps({"sha256": hashlib.sha256(_dumps(record)).hexdigest(), "record": record})


def _checked(value: object) -> dict[str, object] | None:
    """The record, None where it is not what was written."""
    record = value.get("record") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(record, dict):
        return None
    return record if hashlib.sha256(_dumps(record)).hexdigest() == value.get("sha256") else None


def _dumps(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _texts(value: object) -> list[str]:
    """A list of paths from the record; none that leads out of the target."""
    return (
        [text for text in value if isinstance(text, str) and is_relative_path(text)] if isinstance(value, list) else []
    )


def _stamp(entry: object) -> FileStamp | None:
    if not isinstance(entry, dict):
        return None
    try:
        stamp = FileStamp(**entry)
        bytes.fromhex(stamp.prefixes)
    except (TypeError, ValueError):
        return None
    return stamp


class Record:
    """Writes the state of a run. Threads may share it."""

    def __init__(self, target: Path, state: State) -> None:
        self._target, self._state = target, state
        self._lock = threading.Lock()
        self._path = target / STATE_DIR / STAMPS_NAME
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(self._path)
        self._file = self._path.open("ab")

    def pin(self) -> None:
        """Write listings and stamps, whole: what is pinned from now on."""
        with self._lock:
            listings = [listing.to_json() for listing in self._state.listings]
            stamps = {path: asdict(stamp) for path, stamp in sorted(self._state.stamps.items())}
            kinds = {key: getattr(self._state, key) for key in ("no_mtp", "skipped", "derived")}
            value = {"version": VERSION, **kinds, "listings": listings, "stamps": stamps}
            write_whole(self._target / STATE_NAME, with_check(value))

    def stamp(self, path: str, stamp: FileStamp) -> None:
        """A file was found right. Not synced: where the line is lost, the file is hashed once more."""
        with self._lock:
            self._state.stamps[path] = stamp
            self._file.write(with_check({"path": path, "stamp": asdict(stamp)}) + b"\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()

    def complete(self, lock: Lock) -> None:
        """All is there: stamps, the lock, and no more traces of the work."""
        self.pin()
        self.close()
        write_whole(self._target / LOCK_NAME, lock.to_bytes())
        self._path.unlink(missing_ok=True)
        with suppress(OSError):
            for part in (self._target / STATE_DIR / "parts").iterdir():
                part.unlink()
            (self._target / STATE_DIR / "parts").rmdir()


def _drop_torn_line(path: Path) -> None:
    with suppress(FileNotFoundError):
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def make_lock(listing: Listing, files: Mapping[str, RemoteFile], state: State, *, no_mtp: bool) -> Lock:
    """The lock of a finished target: size and SHA-256 of each file, and where they are from.

    The origin is ``{"fetch": {"hub", "repo", "revision", "commit", "no_mtp"?, "git_sha1": {PATH: HEX}}}``.
    """
    stamps = {path: state.stamps[path] for path in files}
    git = {path: file.git_sha1 for path, file in files.items() if file.git_sha1 is not None and file.sha256 is None}
    origin = {"hub": listing.hub, "repo": listing.repo, "revision": listing.revision, "commit": listing.commit}
    fetch: dict[str, object] = {**origin, **({"no_mtp": True} if no_mtp else {}), "git_sha1": git}
    return Lock({path: LockedFile(stamp.size_bytes, stamp.sha256) for path, stamp in stamps.items()}, {"fetch": fetch})
