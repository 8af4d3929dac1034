"""What a fetch will do, known before anything is written."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from weightkit.durable import PARTIAL, SLACK_BYTES, STATE_DIR
from weightkit.errors import SpaceError, TargetError, UnreachableError, WeightkitError, raise_all
from weightkit.hub.ask import ask_all
from weightkit.hub.line import Health, Line, Shared
from weightkit.hub.listing import Listing, RemoteFile
from weightkit.hub.mtp import WithoutMtp, leave_out_mtp
from weightkit.hub.state import FileStamp, State, read_state
from weightkit.hub.transport import Source, Transport
from weightkit.hub.wanted import choose_hubs, require_manifest, resolve, select
from weightkit.machine import free_disk_bytes
from weightkit.remote.patience import Patience, Throttle
from weightkit.units import exact_bytes, human_bytes


@dataclass(frozen=True)
class FetchPlan:
    """A fetch as data.

    Attributes:
        model: as asked for.
        target: the folder.
        listing: the pinned repository.
        sources: hubs that serve, with the commit that each is asked for.
        listings: of these hubs, and of those that are pinned but do not answer.
        files: those that the target is to hold as the hub has them, by path.
        held: of these, files that are there and did not change since they were verified.
        unchecked: files that are there and are hashed first.
        damaged: files of an earlier fetch whose size is wrong; what is right of them is kept.
        missing: files that are not there, in part at most.
        skipped: files left out by ``--no-mtp``.
        derived: content by path of files that are written in place of the hub's, because of that.
        arrived_bytes: of missing files, what an earlier run fetched.
        notes: what the user is to know.
    """

    model: str
    target: Path
    listing: Listing
    sources: tuple[Source, ...]
    listings: tuple[Listing, ...]
    files: Mapping[str, RemoteFile]
    held: tuple[str, ...]
    unchecked: tuple[str, ...]
    damaged: tuple[str, ...]
    missing: tuple[str, ...]
    skipped: tuple[str, ...]
    derived: Mapping[str, bytes]
    arrived_bytes: int
    free_disk_bytes: int
    no_mtp: bool
    spread: bool
    notes: tuple[str, ...]
    state: State = field(repr=False, compare=False)

    @property
    def size_bytes(self) -> int:
        """Of all files as the hub has them."""
        return sum(file.size_bytes for file in self.files.values())

    @property
    def left_bytes(self) -> int:
        """Still to be fetched; of damaged files only what is known to lack."""
        lacking = sum(self.files[path].size_bytes for path in (*self.missing, *self.damaged))
        return max(0, lacking - self.arrived_bytes)

    @property
    def complete(self) -> bool:
        """Whether nothing is to be done at all."""
        if (self.target / STATE_DIR).exists():  # killed at its very end: the traces have still to go
            return False
        finished = self.state.lock is not None and set(self.state.lock.files) >= {*self.files, *self.derived}
        return finished and len(self.held) == len(self.files) and not self.stale_derived

    @property
    def stale_derived(self) -> tuple[str, ...]:
        """Derived files that are not in place as they must be."""
        stamps = self.state.stamps
        return tuple(path for path in self.derived if not _holds(self.target / path, stamps.get(path), "derived"))

    def to_json(self) -> dict[str, object]:
        return {
            "model": self.model,
            "target": str(self.target),
            "hub": self.listing.hub,
            "repo": self.listing.repo,
            "revision": self.listing.revision,
            "commit": self.listing.commit,
            "serving": [source.name for source in self.sources],
            "files": len(self.files),
            "size_bytes": self.size_bytes,
            "held_files": len(self.held),
            "files_to_check": len(self.unchecked),
            "files_to_mend": len(self.damaged),
            "files_to_fetch": len(self.missing),
            "left_bytes": self.left_bytes,
            "free_disk_bytes": self.free_disk_bytes,
            "skipped_mtp": list(self.skipped),
            "notes": list(self.notes),
        }

    def render(self) -> str:
        """For people."""
        left = f"{human_bytes(self.left_bytes)} of {human_bytes(self.size_bytes)}"
        rows = [
            ("from", f"{self.listing.hub}: {self.listing.repo} at {self.listing.revision} ({self.listing.commit})"),
            ("served by", " and ".join(source.name for source in self.sources) or "no hub that answers"),
            ("to", str(self.target)),
            ("files", f"{len(self.files):,}: {len(self.missing):,} to fetch, {len(self.held):,} held"),
            ("to fetch", left),
            ("free disk", human_bytes(self.free_disk_bytes)),
        ]
        if self.unchecked or self.damaged:
            rows.append(("to check", f"{len(self.unchecked):,} files to hash, {len(self.damaged):,} to mend"))
        rows += [("note", note) for note in self.notes]
        if self.skipped:
            rows.append(("left out", f"{len(self.skipped):,} files of MTP tensors: {', '.join(self.skipped)}"))
        return "\n".join(f"{name:<10} {text}" for name, text in rows)


def plan_fetch(
    model: str,
    target: str | Path | None = None,
    *,
    hub: str = "auto",
    revision: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    no_mtp: bool = False,
    check: bool = False,
    token: str | None = None,
    patience: Patience | None = None,
) -> FetchPlan:
    """Ask the hubs, look at the target, and say what is to be done. Writes nothing; arguments as of ``fetch``.

    Raises:
        PlanError: a name, pattern or option that cannot be.
        HubError: of the hubs.
        TargetError: the target holds something else; a file that is not ours is in the way. All of these at once.
    """
    wanted = resolve(model)
    folder = Path(target) if target is not None else wanted.target
    state = _read_target(folder, {repo for repo, _ in wanted.places.values()}, no_mtp)
    names = choose_hubs(wanted, hub)
    if not state.listings and state.lock is not None and revision is None:
        origin = state.lock.origin["fetch"]
        commit = origin.get("commit") if isinstance(origin, Mapping) else None
        revision = commit if isinstance(commit, str) and ":" not in commit else None
    elif not check and _is_finished(folder, state, include, exclude, no_mtp) and state.listings[0].hub in names:
        names = [state.listings[0].hub]  # one question: has the branch moved?
    patience, stop = patience or Patience(), threading.Event()
    answers = ask_all(wanted, names, state, revision=revision, token=token, patience=patience, stop=stop)
    listing = answers.listings[0]
    require_manifest(wanted, listing)
    files = select(listing, include, exclude)
    without, notes = WithoutMtp(), list(answers.notes)
    if no_mtp and (known := _known_without_mtp(folder, state)) is not None:
        without = known
    elif no_mtp:
        shared = make_shared(answers.sources, patience, stop)
        lines = {
            path: Line(file, serving(file, answers.sources, answers.listings), shared) for path, file in files.items()
        }
        transport = Transport(patience, stop)
        try:
            without = leave_out_mtp(lines, transport)
        finally:
            transport.close()
        notes += without.notes
    if no_mtp:
        files = {path: file for path, file in files.items() if path not in {*without.skipped, *without.derived}}
    found = _look(folder, files, state, check)
    plan = FetchPlan(
        model=model,
        target=folder,
        listing=listing,
        sources=tuple(answers.sources),
        listings=tuple(answers.listings),
        files=files,
        skipped=without.skipped,
        derived=without.derived,
        arrived_bytes=sum(_arrived(folder / (path + PARTIAL)) for path in found["missing"])
        + sum(min(_arrived(folder / path), files[path].size_bytes) for path in found["damaged"]),
        free_disk_bytes=free_disk_bytes(folder),
        no_mtp=no_mtp,
        spread=hub == "both",
        notes=tuple(notes),
        state=state,
        **{kind: tuple(paths) for kind, paths in found.items()},
    )
    if not answers.sources and (plan.missing or plan.damaged):
        raise_all("no hub answers", answers.problems, where=model)
        raise UnreachableError("no hub answers", where=model)
    return plan


def _known_without_mtp(target: Path, state: State) -> WithoutMtp | None:
    """What an earlier run found out, where what it wrote is still there: then no hub need be asked again."""
    if not (state.no_mtp and state.skipped and state.derived):
        return None
    if not all(_holds(target / path, state.stamps.get(path), "derived") for path in state.derived):
        return None
    return WithoutMtp(tuple(state.skipped), {path: (target / path).read_bytes() for path in state.derived})


def _is_finished(target: Path, state: State, include: Sequence[str], exclude: Sequence[str], no_mtp: bool) -> bool:
    """Whether all that is wanted of the pinned listing is held."""
    if state.lock is None or not state.listings or no_mtp != state.no_mtp:
        return False
    gone = {*state.skipped, *state.derived} if no_mtp else set()
    wanted = select(state.listings[0], include, exclude).items()
    return all(_holds(target / path, state.stamps.get(path), file.content) for path, file in wanted if path not in gone)


def make_shared(sources: Sequence[Source], patience: Patience, stop: threading.Event) -> Shared:
    """What lines share, with no hub known to be fast or slow."""
    health = {source.name: Health() for source in sources}
    return Shared(patience, stop, Throttle(None, stop), health)


def serving(file: RemoteFile, sources: Sequence[Source], listings: Sequence[Listing]) -> list[Source]:
    """The sources that have a file of the same content: the pinned hub's first."""
    by_hub = {listing.hub: listing for listing in listings}
    found = []
    for source in sources:
        other = by_hub[source.hub.name].files.get(file.path)
        if other is not None and file.agrees(other):
            found.append(source)
    return found


def require_space(plan: FetchPlan) -> None:
    """Raise ``SpaceError`` where the filesystem lacks room for what is left to fetch."""
    needed = sum(plan.files[path].size_bytes for path in (*plan.missing, *plan.damaged))
    held = sum(_allocated(plan.target / (path + PARTIAL)) for path in plan.missing)
    held += sum(_allocated(plan.target / path) for path in plan.damaged)
    lacking = max(0, needed - held)
    slack = SLACK_BYTES if lacking > SLACK_BYTES else 1 << 20
    if lacking and lacking + slack > plan.free_disk_bytes:
        raise SpaceError(
            "not enough free space",
            where=plan.target,
            expected=exact_bytes(lacking + slack),
            found=exact_bytes(plan.free_disk_bytes),
            fix="Free some, name a target elsewhere, or fetch a part: --include, --exclude, --no-mtp.",
        )


def _read_target(target: Path, repos: set[str], no_mtp: bool) -> State:
    """The state of a target. Raises ``TargetError`` where it holds something else."""
    if os.path.lexists(target) and not target.is_dir():
        raise TargetError("not a folder", where=target, fix="Name another target.")
    try:
        state = read_state(target)
    except PermissionError as exc:
        raise TargetError(f"cannot be read ({exc.strerror})", where=target, fix="Name another target.") from exc
    if state.foreign is not None:
        raise TargetError(
            "holds what another command wrote",
            where=target,
            found=_origin(state.foreign.origin),
            fix="Name another target.",
        )
    held = {listing.repo for listing in state.listings}
    if state.lock is not None and isinstance(origin := state.lock.origin["fetch"], Mapping):
        held |= {str(origin.get("repo"))}
    if held and not held & repos:
        raise TargetError(
            "holds another model",
            where=target,
            expected=" or ".join(sorted(repos)),
            found=", ".join(sorted(held)),
            fix="Name another target.",
        )
    if no_mtp and state.lock is not None and not state.no_mtp and not _says_no_mtp(state):
        raise TargetError(
            "holds the model with its MTP layers",
            where=target,
            fix="Use weightkit strip, which makes a copy without them, or name another target.",
        )
    return state


def _says_no_mtp(state: State) -> bool:
    origin = state.lock.origin["fetch"] if state.lock is not None else None
    return isinstance(origin, Mapping) and origin.get("no_mtp") is True


def _origin(origin: Mapping[str, object]) -> str:
    return ", ".join(f"{key} {str(value)[:20]}" for key, value in origin.items()) or "a lock without an origin"


def _look(target: Path, files: Mapping[str, RemoteFile], state: State, check: bool) -> dict[str, list[str]]:
    """Files by what is there of them. Raises ``TargetError`` for all that is in the way."""
    found: dict[str, list[str]] = {"held": [], "unchecked": [], "damaged": [], "missing": []}
    problems: list[WeightkitError] = []
    for path, file in files.items():
        try:
            kind = _kind(target, file, state, check)
            found[kind].append(path)
        except WeightkitError as problem:
            problems.append(problem)
    if target.is_dir() and not os.access(target, os.W_OK | os.X_OK):
        problems.append(TargetError("may not be written to", where=target, fix="Name another target."))
    raise_all("not fit to be fetched into", problems, where=target)
    return found


def _kind(target: Path, file: RemoteFile, state: State, check: bool) -> str:
    path, partial = target / file.path, target / (file.path + PARTIAL)
    for parent in list(path.relative_to(target).parents)[:-1]:
        if os.path.lexists(target / parent) and ((target / parent).is_symlink() or not (target / parent).is_dir()):
            raise _in_the_way(target / parent, "a folder")
    if os.path.lexists(partial) and not _is_regular(partial):
        raise _in_the_way(partial, "a file")
    if not os.path.lexists(path):
        return "missing"
    if not _is_regular(path):
        raise _in_the_way(path, "a file")
    stamp = state.stamps.get(file.path)
    if _holds(path, stamp, file.content) and not check:
        return "held"
    if path.stat().st_size == file.size_bytes:
        return "unchecked"
    if is_ours(file.path, state):
        return "damaged"
    raise TargetError(
        "a file that no fetch put there is in the way",
        where=path,
        expected=f"{file.size_bytes:,} bytes",
        found=f"{path.stat().st_size:,}",
        fix="Move it away, or name another target.",
    )


def is_ours(path: str, state: State) -> bool:
    """Whether an earlier fetch put this file there."""
    return path in state.stamps or (state.lock is not None and path in state.lock.files)


def _holds(path: Path, stamp: FileStamp | None, content: str) -> bool:
    try:
        return stamp is not None and stamp.content == content and stamp.still_holds(path.lstat())
    except OSError:
        return False


def _in_the_way(path: Path, expected: str) -> TargetError:
    found = "a link" if path.is_symlink() else "a folder" if path.is_dir() else "something else"
    return TargetError("in the way", where=path, expected=expected, found=found, fix="Move it away.")


def _is_regular(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _arrived(path: Path) -> int:
    """Bytes of a partial file; of a sparse one, what is allocated."""
    try:
        status = path.lstat()
    except OSError:
        return 0
    return min(status.st_size, status.st_blocks * 512)


def _allocated(path: Path) -> int:
    try:
        return path.lstat().st_blocks * 512
    except OSError:
        return 0
