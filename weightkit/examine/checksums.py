"""Files held against the sizes and SHA-256 that a lock or a manifest records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from weightkit import manifests
from weightkit.checkpoint.folder import LOCK_NAME, require_inside
from weightkit.checkpoint.lock import Lock, LockedFile, read_lock
from weightkit.checkpoint.reading import Bytes
from weightkit.errors import ChecksumError, MissingFileError, WeightkitError
from weightkit.examine.survey import Survey, attempt
from weightkit.layouts.opening import FETCH, is_unreadable
from weightkit.manifests import Manifest
from weightkit.remote.path import RemotePath, folder_of
from weightkit.sha256 import Digest, sha256

NONE_KNOWN = f"none are known: no {LOCK_NAME}, no manifest"


@dataclass(frozen=True)
class Known:
    """Recorded size and checksum by relative path, and where they are from (for messages)."""

    files: Mapping[str, LockedFile]
    source: str


def known_files(survey: Survey, manifest: Manifest | None) -> tuple[Known, list[WeightkitError]]:
    """What the folder's lock and the manifest record; the manifest counts where both name a file. For one file of a
    folder, only its own record."""
    problems: list[WeightkitError] = []
    files: dict[str, LockedFile] = {}
    sources: list[str] = []
    lock = attempt(lambda: read_lock(survey.folder), survey.folder / LOCK_NAME)
    if isinstance(lock, WeightkitError):
        problems.append(lock)
    elif isinstance(lock, Lock):
        files |= lock.files
        sources.append(LOCK_NAME)
    elif isinstance(survey.folder, RemotePath) and (listed := _from_listing(survey.folder)).files:
        files |= listed.files
        sources.append(listed.source)
    if manifest is not None and manifest.files:
        files |= {name: file for name, entry in manifest.files.items() if (file := _from_manifest(entry)) is not None}
        sources.append(f"the manifest of {manifest.name}")
    if survey.path != survey.folder:
        files = {name: file for name, file in files.items() if name == survey.path.name}
    return Known(files, " and ".join(sources)), problems


def _from_listing(folder: RemotePath) -> Known:
    """What the listing of a repository records."""
    listing, name = folder_of(str(folder))
    below = f"{name}/" if name else ""
    files = {
        path.removeprefix(below): LockedFile(entry.size_bytes, entry.sha256)
        for path, entry in listing.entries.items()
        if entry.sha256 is not None and path.startswith(below)
    }
    return Known(files, listing.recorded_by)


def _from_manifest(entry: object) -> LockedFile | None:
    if not isinstance(entry, Mapping):
        return None
    size, sha256 = entry.get("size_bytes"), entry.get("sha256")
    return LockedFile(size, sha256) if isinstance(size, int) and isinstance(sha256, str) else None


def shipped_manifest(folder: Path) -> Manifest | None:
    """The manifest whose checkpoint lies in this folder, for those that ship with the package."""
    if not folder.resolve().is_relative_to(Path(manifests.__file__).resolve().parent):
        return None
    found = (manifests.load(name) for name in manifests.names())
    return next((item for item in found if item.path is not None and item.path.resolve() == folder.resolve()), None)


def size_problems(survey: Survey, known: Known) -> tuple[list[WeightkitError], list[str]]:
    """Files that are missing or of another size, and those that are worth hashing."""
    missing = {problem.where for problem in survey.problems if isinstance(problem, MissingFileError)}
    unreadable = {problem.where for problem in survey.problems if is_unreadable(problem)}
    problems: list[WeightkitError] = []
    intact: list[str] = []
    for name, locked in known.files.items():
        path = survey.folder / name
        problem = attempt(partial(_size_problem, path, locked, known.source), path)
        if problem is None:
            if str(path) not in unreadable:
                intact.append(name)
        elif not (isinstance(problem, MissingFileError) and problem.where in missing):
            problems.append(problem)
    return problems, intact


def _size_problem(path: Path, locked: LockedFile, source: str) -> WeightkitError | None:
    if not path.is_file():
        return MissingFileError("no such file", where=path, expected=f"there, as {source} names it", fix="Fetch it.")
    require_inside(path.parent, path)
    size = path.stat().st_size
    if size == locked.size_bytes:
        return None
    expected = f"{locked.size_bytes:,} bytes"
    return ChecksumError(f"not the size in {source}", where=path, expected=expected, found=f"{size:,}", fix=FETCH)


class Sha256:
    """Hashes a file as it is read."""

    def __init__(self, path: Path, locked: LockedFile, source: str) -> None:
        self._path, self._locked, self._source = path, locked, source
        self._begun: Digest | None = None  # does not travel between processes, so it is made where it is fed

    @property
    def _digest(self) -> Digest:
        if self._begun is None:
            self._begun = sha256(self._locked.size_bytes)
        return self._begun

    def feed(self, offset: int, chunk: Bytes) -> None:
        self._digest.update(chunk.data)

    def finish(self) -> Iterator[WeightkitError]:
        found = self._digest.hexdigest()
        if found != self._locked.sha256:
            yield ChecksumError(
                f"the SHA-256 is not that in {self._source}",
                where=self._path,
                expected=self._locked.sha256,
                found=found,
                fix="Fetch the file again. If it was edited on purpose, that edit is all that is wrong.",
            )
