"""The folder that is written to: what it holds already, whether there is room, and that nobody else writes there."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from weightkit.checkpoint.folder import LOCK_NAME, STATE_DIR
from weightkit.checkpoint.index import INDEX_NAME
from weightkit.checkpoint.lock import read_lock
from weightkit.checkpoint.reading import Stamp
from weightkit.errors import FormatError, SpaceError, TargetError
from weightkit.writer.journal import Progress, read_history
from weightkit.writer.plan import Plan
from weightkit.writer.resources import available_memory_bytes, free_disk_bytes

PARTIAL = ".partial"
#: Room left for what grows beside the weights: journal, folders, the filesystem's own needs.
SLACK_BYTES = 16 << 20


@dataclass(frozen=True)
class TargetState:
    """``complete``: the plan was carried out already. ``files``: progress that an earlier run of the same plan left."""

    complete: bool = False
    files: Mapping[str, Progress] = field(default_factory=dict)


def inspect_target(plan: Plan, *, force: bool = False) -> TargetState:
    """What the target holds of this plan.

    Raises:
        TargetError: it holds something else, or is no folder; ``force`` replaces what an earlier write of ours left,
            and nothing
            that somebody else put there.
    """
    target = plan.target
    if not target.exists():
        return TargetState()
    if not target.is_dir():
        raise TargetError("not a folder", where=target, fix="Name another target.")
    foreign = _foreign_files(plan)
    if foreign:
        raise TargetError(
            "holds files that this would mix with or overwrite",
            where=target,
            found=_some(foreign),
            fix="Name another target, or move them away.",
        )
    if force:
        return TargetState()
    lock, history = read_lock(target), read_history(target)
    if history is not None:
        if history.plan_hash == plan.hash:
            return TargetState(files=history.files)
        raise TargetError(
            _difference(history.sources, plan), where=target, fix="Use --force to start anew, or name another target."
        )
    if lock is None:
        return TargetState()
    if lock.origin.get("plan") == plan.hash and _all_there(
        target, {name: file.size_bytes for name, file in lock.files.items()}
    ):
        return TargetState(complete=True)
    raise TargetError(
        "holds the result of another run, of a changed source or with other options, or files of it are gone",
        where=target,
        fix="Use --force to replace it, or name another target.",
    )


def _foreign_files(plan: Plan) -> list[str]:
    """What lies in the target that no lock or journal of ours accounts for, and that this plan would overwrite or mix
    with."""
    target = plan.target
    planned = {file.name for file in plan.files} | set(plan.side_files) | {LOCK_NAME}
    ours = _recorded(target)
    if (target / STATE_DIR).exists():
        ours |= planned
    found = (path.relative_to(target) for path in target.rglob("*") if path.is_file())
    names = {path.as_posix() for path in found if STATE_DIR not in path.parts}
    strangers = {name for name in names if name.removesuffix(PARTIAL) not in ours}
    return sorted(name for name in strangers if name in planned or name.endswith((".safetensors", INDEX_NAME)))


def _recorded(target: Path) -> set[str]:
    """The names that an earlier write of ours has recorded. A damaged record names itself alone."""
    names = {LOCK_NAME}
    with suppress(FormatError):
        lock = read_lock(target)
        names |= set(lock.files) if lock is not None else set()
    with suppress(FormatError):
        history = read_history(target)
        names |= set(history.files) if history is not None else set()
    return names


def _all_there(target: Path, sizes: Mapping[str, int]) -> bool:
    return all((target / name).is_file() and (target / name).stat().st_size == size for name, size in sizes.items())


def _difference(sources: Mapping[str, Stamp], plan: Plan) -> str:
    now = {Path(path).name: stamp for path, stamp in plan.stamps.items()}
    changed = sorted(name for name in sources.keys() & now.keys() if sources[name] != now[name])
    if changed:
        return f"holds an unfinished write, and its source changed since: {_some(changed)}"
    if sources.keys() != now.keys():
        return "holds an unfinished write from another source"
    return "holds an unfinished write with other options"


def _some(names: Sequence[str], shown: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def clear_target(target: Path) -> None:
    """Remove what an earlier write of ours left: the files of its lock and journal, partial ones, and both of these."""
    for name in _recorded(target):
        (target / name).unlink(missing_ok=True)
    for partial in target.glob("*" + PARTIAL):
        partial.unlink()
    shutil.rmtree(target / STATE_DIR, ignore_errors=True)


def require_space(plan: Plan, files: Mapping[str, Progress]) -> None:
    """Raise ``SpaceError`` where the filesystem lacks room for what is left to write."""
    needed = sum(file.size_bytes for file in plan.files if not _is_done(file.name, files)) + SLACK_BYTES
    needed += sum(len(file.content or b"") for file in plan.side_files.values())
    held = sum(_allocated(plan.target / (file.name + PARTIAL)) for file in plan.files)
    free = free_disk_bytes(plan.target)
    if needed - held > free:
        raise SpaceError(
            "not enough free space",
            where=plan.target,
            expected=f"{needed - held:,} bytes",
            found=f"{free:,}",
            fix="Free some, or name a target elsewhere.",
        )


def require_memory(needed: int) -> None:
    """Raise ``SpaceError`` where buffers of ``needed`` bytes are more than the machine can give."""
    available = available_memory_bytes()
    if available is not None and needed > available:
        raise SpaceError(
            "not enough memory for the buffers",
            where="--jobs",
            expected=f"{needed:,} bytes",
            found=f"{available:,} available",
            fix="Use a smaller --jobs.",
        )


def _is_done(name: str, files: Mapping[str, Progress]) -> bool:
    progress = files.get(name)
    return progress is not None and progress.done


def _allocated(path: Path) -> int:
    return path.stat().st_blocks * 512 if path.exists() else 0


@contextmanager
def only_writer(target: Path) -> Iterator[None]:
    """Hold the target for this process. Raises ``TargetError`` where another one has it."""
    folder = target / STATE_DIR
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "writer"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        os.close(handle)
        raise TargetError(
            "another process is writing there", where=target, fix="Wait for it, or name another target."
        ) from exc
    try:
        yield
    finally:
        os.close(handle)
