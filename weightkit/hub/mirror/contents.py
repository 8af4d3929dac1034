"""What a mirror serves: the files of a folder whose size and SHA-256 are known, and nothing else.

A folder with a lock is served by the lock; what was touched since fetch verified it is hashed first. A folder without
is held to all that ``verify`` knows, and hashed.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from weightkit.checkpoint.folder import CONFIG_NAME, LOCK_NAME, WEIGHT_SUFFIXES, require_inside, side_files
from weightkit.checkpoint.index import INDEX_NAME
from weightkit.checkpoint.lock import Lock, LockedFile, read_lock
from weightkit.checkpoint.reading import Bytes
from weightkit.errors import ChecksumError, MissingFileError, NotACheckpointError, WeightkitError, raise_all
from weightkit.examine import verify
from weightkit.examine.checksums import shipped_manifest
from weightkit.examine.stream import Reading, read_all
from weightkit.examine.survey import survey
from weightkit.hub.state import read_state
from weightkit.sha256 import sha256

#: Files above this are large whatever they are called: the hubs keep them apart from git, by SHA-256.
LARGE_BYTES = 10 << 20
#: The hubs' names for the newest commit of a repository.
BRANCHES = ("main", "master")
_FETCH = "Fetch it again: weightkit fetch continues what is there."
_UNFINISHED = frozenset((".partial", ".incomplete", ".lock", ".aria2"))


class ChangedError(WeightkitError):
    """A served file is no longer the one that was verified."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What identifies a file's content as long as nobody writes to it."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class ServedFile:
    """One verified file.

    Attributes:
        path: relative to the repository, with slashes.
        real: where it lies, links resolved.
        stamp: as it was when it was verified.
        sha256: of the content, 64 lower-case hexadecimal digits.
        blob_id: git's SHA-1 of what a git repository would hold: the content, or the LFS pointer of a large file.
        large: whether the hubs would keep it in LFS, and so list its SHA-256 rather than its git SHA-1.
    """

    path: str
    real: Path
    stamp: Stamp
    sha256: str
    blob_id: str
    large: bool

    @property
    def size_bytes(self) -> int:
        return self.stamp.size_bytes

    @property
    def etag(self) -> str:
        """Without quotes, as the hubs choose it: SHA-256 of a large file, git's SHA-1 of a small one."""
        return self.sha256 if self.large else self.blob_id

    @property
    def pointer_bytes(self) -> int:
        """Size of the LFS pointer."""
        return len(lfs_pointer(self.sha256, self.size_bytes))

    def open(self) -> int:
        """A descriptor of the very file that was verified.

        Raises ``ChangedError`` where the path leads to any other, or the file was written to: what is opened is judged,
        so that no exchange of files or links in between is of use.
        """
        try:
            # O_NONBLOCK: a pipe put in the file's place must not hold a thread.
            descriptor = os.open(self.real, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as exc:
            raise ChangedError(
                f"cannot be read any more ({exc.strerror})", where=self.path, fix="Restart the mirror."
            ) from exc
        try:
            self.check(descriptor)
        except ChangedError:
            os.close(descriptor)
            raise
        return descriptor

    def check(self, descriptor: int) -> None:
        """Raise ``ChangedError`` where the open file has changed since it was verified."""
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or Stamp.of(status) != self.stamp:
            raise ChangedError(
                "changed after it was verified, so it is not served",
                where=self.path,
                fix="Verify the folder, then restart the mirror.",
            )


@dataclass(frozen=True)
class Repository:
    """A folder of verified files, as hubs see it.

    Attributes:
        ids: ``owner/name``, each of which names it; the first is shown.
        folder: where the files lie.
        files: by path, sorted.
        revisions: names besides the branches and the commit that stand for it, such as the commit that was fetched.
    """

    ids: tuple[str, ...]
    folder: Path
    files: Mapping[str, ServedFile]
    revisions: frozenset[str] = frozenset()

    @cached_property
    def commit(self) -> str:
        """40 hexadecimal digits that follow from the files' paths, sizes and checksums alone: the same on every
        machine that mirrors the same files, and another as soon as one byte differs."""
        digest = hashlib.sha256()
        for file in self.files.values():
            digest.update(f"{file.path}\0{file.size_bytes}\0{file.sha256}\n".encode())
        return digest.hexdigest()[:40]

    @cached_property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files.values())

    def answers_to(self, revision: str) -> bool:
        """Whether a revision, as a client names it, is this state of the repository."""
        return revision in BRANCHES or revision == self.commit or revision in self.revisions


def open_repository(
    folder: Path, ids: Sequence[str], *, full: bool = False, jobs: int | None = None, progress: bool = True
) -> Repository:
    """Read what a folder holds and has to hold.

    Args:
        folder: a checkpoint in any layout.
        ids: the names to serve it under.
        full: run ``verify`` on a folder that has a lock, too, which hashes every byte.
        jobs: files read at once.
        progress: show a bar while files are hashed.

    Raises:
        NotACheckpointError: there is nothing to serve.
        WeightkitError, Problems: the folder is not whole. Nothing of it is served.
    """
    folder = Path(os.path.realpath(folder))
    if not folder.is_dir():
        raise NotACheckpointError("no such folder", where=folder, fix="Name the folder of a checkpoint.")
    lock = read_lock(folder)
    manifest = shipped_manifest(folder) if lock is None else None
    recorded = dict(lock.files) if lock is not None else dict(_manifest_files(manifest.files)) if manifest else {}
    names = list(recorded) or _verified_names(folder)
    stamps = _stamps(folder, names)  # before a byte is read: what changes afterwards is noticed
    if lock is None or full:
        report = verify(folder, jobs=jobs, progress=progress)
        raise_all("not served, because verify finds problems", report.problems, where=folder)
    elif changed := _changed_since_fetched(folder, recorded):
        _require_recorded(folder, recorded, _hash(folder, changed, jobs=jobs, progress=progress))
    files = _served_files(folder, recorded or _hash(folder, names, jobs=jobs, progress=progress), stamps)
    if not files:
        raise NotACheckpointError("no files to serve", where=folder, fix="Name the folder of a checkpoint.")
    return Repository(tuple(ids), folder, files, _fetched_revisions(lock))


def hash_folder(folder: Path, ids: Sequence[str], names: Iterable[str] | None = None) -> Repository:
    """A repository of whatever files lie in a folder, hashed and held to nothing. For tests and tools."""
    folder = Path(os.path.realpath(folder))
    paths = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    chosen = [name for name in (paths if names is None else names) if _is_public(name)]
    stamps = _stamps(folder, chosen)
    known = _hash(folder, chosen, jobs=None, progress=False)
    return Repository(tuple(ids), folder, _served_files(folder, known, stamps))


def lfs_pointer(sha256: str, size_bytes: int) -> bytes:
    """What a git repository holds in a large file's place (github.com/git-lfs/git-lfs, docs/spec.md)."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size_bytes}\n".encode()


def git_blob_id(content: bytes) -> str:
    """The SHA-1 that git gives a file of this content."""
    digest = hashlib.sha1(f"blob {len(content)}\0".encode(), usedforsecurity=False)
    digest.update(content)
    return digest.hexdigest()


def _changed_since_fetched(folder: Path, recorded: Mapping[str, LockedFile]) -> list[str]:
    """Files of the recorded size that fetch found right, and whose stamps say that they were touched since."""
    stamps = read_state(folder).stamps
    paths = {name: folder / name for name in stamps.keys() & recorded.keys()}
    return sorted(
        name
        for name, path in paths.items()
        if path.is_file()
        and path.stat().st_size == recorded[name].size_bytes
        and not stamps[name].still_holds(path.stat())
    )


def _require_recorded(folder: Path, recorded: Mapping[str, LockedFile], found: Mapping[str, LockedFile]) -> None:
    """Raise all whose SHA-256 is not the recorded one."""
    problems = [
        ChecksumError(
            "changed after it was fetched, and the SHA-256 is not the recorded one",
            where=folder / name,
            expected=recorded[name].sha256,
            found=file.sha256,
            fix=_FETCH,
        )
        for name, file in found.items()
        if file != recorded[name]
    ]
    raise_all("not served, because it is not whole", problems, where=folder)


def _fetched_revisions(lock: Lock | None) -> frozenset[str]:
    """The hub's commit, where these are its very files."""
    origin = fetch_origin(lock)
    commit = None if origin.get("no_mtp") is True else origin.get("commit")
    return frozenset({commit} if isinstance(commit, str) else ())


def fetch_origin(lock: Lock | None) -> Mapping[str, object]:
    """Where fetch had the files from, as it says in the lock (``make_lock``); empty for any other lock."""
    origin = None if lock is None else lock.origin.get("fetch")
    return origin if isinstance(origin, Mapping) else {}


def _manifest_files(entries: Mapping[str, object]) -> Iterator[tuple[str, LockedFile]]:
    for name, entry in entries.items():
        if isinstance(entry, Mapping):
            size, sha256 = entry.get("size_bytes"), entry.get("sha256")
            if isinstance(size, int) and isinstance(sha256, str):
                yield name, LockedFile(size, sha256)


def _verified_names(folder: Path) -> list[str]:
    """What ``verify`` looked at: weights, index, config and side files."""
    found = survey(folder)
    names = {*found.scan.headers, *side_files(folder)}
    return sorted(names | {name for name in (INDEX_NAME, CONFIG_NAME) if (folder / name).is_file()})


def _is_public(path: str) -> bool:
    """Whether a path may be served at all: nothing hidden, no state of ours or of a download."""
    name = PurePosixPath(path)
    hidden = any(part.startswith(".") for part in name.parts)
    return not hidden and path != LOCK_NAME and name.suffix not in _UNFINISHED


def _stamps(folder: Path, names: Iterable[str]) -> dict[str, Stamp]:
    """The stamps of those that are there."""
    paths = {name: folder / name for name in names}
    return {name: Stamp.of(path.stat()) for name, path in paths.items() if path.is_file()}


def _served_files(folder: Path, known: Mapping[str, LockedFile], stamps: Mapping[str, Stamp]) -> dict[str, ServedFile]:
    """The files as recorded. Raises all that is missing, of another size, linked from elsewhere, or small and changed;
    the large ones are told apart by size alone, and whoever fetches them checks the SHA-256."""
    files: dict[str, ServedFile] = {}
    problems: list[WeightkitError] = []
    for name in sorted(filter(_is_public, known)):
        try:
            files[name] = _served_file(folder, name, known[name], stamps.get(name))
        except WeightkitError as problem:
            problems.append(problem)
    raise_all("not served, because it is not whole", problems, where=folder)
    return files


def _served_file(folder: Path, name: str, locked: LockedFile, before: Stamp | None) -> ServedFile:
    path = folder / name
    if before is None or not path.is_file():
        raise MissingFileError("no such file", where=path, expected=f"{locked.size_bytes:,} bytes", fix=_FETCH)
    require_inside(folder, path)
    real = Path(os.path.realpath(path))
    if before.size_bytes != locked.size_bytes:
        raise ChecksumError(
            "not the recorded size",
            where=path,
            expected=f"{locked.size_bytes:,} bytes",
            found=f"{before.size_bytes:,}",
            fix=_FETCH,
        )
    stamp = Stamp.of(real.stat())
    if stamp != before:
        raise ChangedError("changed while it was verified", where=path, fix="Wait for its writer, then start again.")
    large = real.suffix in WEIGHT_SUFFIXES or path.suffix in WEIGHT_SUFFIXES or locked.size_bytes > LARGE_BYTES
    content = lfs_pointer(locked.sha256, locked.size_bytes) if large else real.read_bytes()
    if not large and (found := hashlib.sha256(content).hexdigest()) != locked.sha256:
        raise ChecksumError(
            "the SHA-256 is not the recorded one", where=path, expected=locked.sha256, found=found, fix=_FETCH
        )
    return ServedFile(name, real, stamp, locked.sha256, git_blob_id(content), large)


class _Digest:
    """Hashes a file as it is read."""

    def __init__(self, size_bytes: int) -> None:
        self.sha256 = sha256(size_bytes)

    def feed(self, offset: int, chunk: Bytes) -> None:
        self.sha256.update(chunk.data)

    def finish(self) -> Iterable[WeightkitError]:
        return ()


def _hash(folder: Path, names: Iterable[str], *, jobs: int | None, progress: bool) -> dict[str, LockedFile]:
    """Size and SHA-256 of files that nothing is recorded of."""
    sizes = {name: (folder / name).stat().st_size for name in names}
    digests = {name: _Digest(size) for name, size in sizes.items()}
    readings = [Reading(folder / name, [(0, sizes[name])], [digests[name]]) for name in sizes]
    raise_all("not served", read_all(readings, jobs=jobs, desc="hash", progress=progress), where=folder)
    return {name: LockedFile(sizes[name], digests[name].sha256.hexdigest()) for name in sizes}
