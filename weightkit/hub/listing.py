"""What a hub says a repository holds: paths, sizes, checksums. Read as untrusted input."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from weightkit.checkpoint.folder import LOCK_NAME
from weightkit.checkpoint.index import is_relative_path
from weightkit.durable import PARTIAL, STATE_DIR
from weightkit.errors import FormatError, ListingError, raise_all

HubName = Literal["huggingface", "modelscope"]
HUB_NAMES: tuple[HubName, ...] = ("huggingface", "modelscope")
#: What fetch keeps in the target: pinned listing and stamps.
STATE_NAME = ".weightkit.fetch.json"
#: Longer paths are no file's of a checkpoint, and no filesystem takes longer names.
MAX_PATH, MAX_NAME = 1024, 240
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a listing.

    Attributes:
        path: relative, with slashes.
        size_bytes: as listed.
        sha256: of the content; None where the hub lists only ``git_sha1``.
        git_sha1: git's id of the content, SHA-1 over ``blob SIZE\\0`` and the content. Hugging Face lists it for files
            that are not stored as large ones.
    """

    path: str
    size_bytes: int
    sha256: str | None
    git_sha1: str | None = None

    @property
    def content(self) -> str:
        """What names the content: ``sha256:...`` or ``git-sha1:...``."""
        return f"sha256:{self.sha256}" if self.sha256 is not None else f"git-sha1:{self.git_sha1}"

    def agrees(self, other: RemoteFile) -> bool:
        """Whether both are surely the same bytes, or are found not to be when the checksum is computed: another hub's
        copy may then serve for this file."""
        if self.size_bytes != other.size_bytes:
            return False
        return self.sha256 is None or other.sha256 is None or self.sha256 == other.sha256


@dataclass(frozen=True)
class Listing:
    """A repository at one commit.

    Attributes:
        hub: which hub.
        repo: ``owner/name``.
        revision: the branch, tag or commit that was asked for.
        commit: what it was then. ModelScope lists no commit: a digest of the listing stands in (``listing:...``).
        files: by path, sorted.
    """

    hub: HubName
    repo: str
    revision: str
    commit: str
    files: Mapping[str, RemoteFile]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())

    def to_json(self) -> dict[str, object]:
        files = {path: _without_none(asdict(file)) for path, file in self.files.items()}
        for entry in files.values():
            del entry["path"]
        return {
            "hub": self.hub,
            "repo": self.repo,
            "revision": self.revision,
            "commit": self.commit,
            "files": files,
        }


def listing_from_json(value: object, where: object) -> Listing:
    """The reverse of ``Listing.to_json``. Raises ``FormatError`` for anything else, ``ListingError`` for hostile
    paths."""
    try:
        record = dict(value)  # type: ignore[call-overload]
        files = [RemoteFile(path, **{"sha256": None} | entry) for path, entry in record["files"].items()]
        head = [record[key] for key in ("hub", "repo", "revision", "commit")]
    except (TypeError, ValueError, KeyError, AttributeError) as exc:
        raise FormatError("a damaged record of a fetch", where=where, fix=f"Remove {STATE_NAME}.") from exc
    if head[0] not in HUB_NAMES or not all(isinstance(text, str) for text in head):
        raise FormatError("a damaged record of a fetch", where=where, fix=f"Remove {STATE_NAME}.")
    return make_listing(head[0], head[1], head[2], head[3], files)


def make_listing(hub: HubName, repo: str, revision: str, commit: str | None, files: Iterable[RemoteFile]) -> Listing:
    """A checked listing. All that is wrong with it is told at once.

    Our own lock, which a folder that was uploaded may hold, is left out: the target gets its own.

    Raises ``ListingError``: no files, no checksum, a path that leaves the target or is ours, paths that collide.
    """
    listed = [file for file in files if file.path != LOCK_NAME]
    where = f"{hub}: {repo}"
    problems = [problem for file in listed if (problem := _problem(file, where)) is not None]
    if not problems:
        problems = _collisions([file.path for file in listed], where)
    if not listed:
        problems = [ListingError("an empty repository", where=where, found=f"no files at {revision}")]
    raise_all("a listing that cannot be trusted", problems, where=where)
    by_path = {file.path: file for file in sorted(listed, key=lambda file: file.path)}
    return Listing(hub, repo, revision, commit or listing_digest(by_path.values()), by_path)


def listing_digest(files: Iterable[RemoteFile]) -> str:
    """What stands in for a commit: ``listing:`` and half a SHA-256 over paths, sizes and checksums."""
    lines = "".join(f"{file.path}\0{file.size_bytes}\0{file.content}\n" for file in files)
    return f"listing:{hashlib.sha256(lines.encode()).hexdigest()[:32]}"


def _problem(file: RemoteFile, where: str) -> ListingError | None:
    path = file.path
    if not isinstance(path, str) or not is_relative_path(path) or len(path) > MAX_PATH:
        return ListingError("a path that does not stay in the target", where=where, found=repr(path)[:200])
    parts = path.split("/")
    if max(len(part.encode()) for part in parts) > MAX_NAME:
        return ListingError("a file name that is too long", where=where, found=repr(path)[:80])
    if parts[0] in (STATE_DIR, STATE_NAME, LOCK_NAME):
        return ListingError("a path that is kept for weightkit's own records", where=where, found=repr(path))
    if type(file.size_bytes) is not int or not 0 <= file.size_bytes < 1 << 62:
        return ListingError(f"{path!r}: no size", where=where, found=repr(file.size_bytes)[:40])
    hashes = ((file.sha256, _SHA256), (file.git_sha1, _SHA1))
    if any(text is not None and not (isinstance(text, str) and form.fullmatch(text)) for text, form in hashes):
        return ListingError(f"{path!r}: a malformed checksum", where=where, found=file.content[:90])
    if file.sha256 is None and file.git_sha1 is None:
        return ListingError(f"{path!r}: no checksum, so nothing could be verified", where=where)
    return None


def _collisions(paths: list[str], where: str) -> list[ListingError]:
    """Paths that cannot lie in one folder: twice the same, a file that is another's folder, the partial name of
    another."""
    known = set(paths)
    twice = sorted(path for path, count in Counter(paths).items() if count > 1)
    problems = [ListingError(f"{path!r} stands twice", where=where) for path in twice]
    for path in known:
        parents = ["/".join(path.split("/")[:depth]) for depth in range(1, path.count("/") + 1)]
        taken = [parent for parent in parents if parent in known]
        if path.endswith(PARTIAL) and path.removesuffix(PARTIAL) in known:
            taken.append(path.removesuffix(PARTIAL))
        problems += [ListingError(f"{path!r} and {other!r} cannot both be written", where=where) for other in taken]
    return problems


def _without_none(fields: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in fields.items() if value is not None}
