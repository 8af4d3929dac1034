"""The folder that is written to: what it holds already, whether there is room, and that nobody else writes there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from weightkit.checkpoint.folder import LOCK_NAME
from weightkit.checkpoint.index import INDEX_NAME
from weightkit.checkpoint.lock import read_lock
from weightkit.checkpoint.stamp import Stamp
from weightkit.durable import PARTIAL, SLACK_BYTES, STATE_DIR
from weightkit.errors import FormatError, SpaceError, TargetError
from weightkit.machine import available_memory_bytes, free_disk_bytes
from weightkit.units import exact_bytes
from weightkit.writer.journal import JOURNAL_NAME, Progress, read_history
from weightkit.writer.plan import Plan

#: Endings of what a checkpoint must not be mixed with.
_WEIGHTS = (".safetensors", INDEX_NAME)


@dataclass(frozen=True)
class TargetState:
    """``complete``: the plan was carried out already. ``files``: progress that an earlier run of the same plan left."""

    complete: bool = False
    files: Mapping[str, Progress] = field(default_factory=dict)


def inspect_target(plan: Plan, *, force: bool = False) -> TargetState:
    """What the target holds of this plan.

    Raises:
        TargetError: it holds something else, or is no folder that can be written to, and cannot be made one; ``force``
            replaces what an earlier write of ours left, and nothing that somebody else put there.
    """
    target = plan.target
    _require_place(target)
    if not target.exists():
        return TargetState()
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


def _require_place(target: Path) -> None:
    """Raise ``TargetError`` where the target is no folder to write to, nor lies where one can be made."""
    place = target.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        what = "a link that leads nowhere" if place.is_symlink() else "not a folder"
        raise TargetError(what, where=place, fix="Name another target.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise TargetError("no permission to write there", where=place, fix="Name another target, or change that.")


def _foreign_files(plan: Plan) -> list[str]:
    """What lies in the target that no lock or journal of ours accounts for, and that this plan would overwrite, mix
    with, or be led out of the target by."""
    target = plan.target
    planned = {file.name for file in plan.files} | set(plan.side_files) | {LOCK_NAME}
    ours = _recorded(target)
    found = (path.relative_to(target) for path in target.rglob("*") if not path.is_dir() or path.is_symlink())
    names = {path.as_posix() for path in found if path.parts[0] != STATE_DIR}
    strangers = {name for name in names if name.removesuffix(PARTIAL) not in ours}
    mixed = {name for name in strangers if name.removesuffix(PARTIAL) in planned or name.endswith(_WEIGHTS)}
    in_the_way = {name for name in planned if (target / name).is_dir()}
    return sorted(mixed | in_the_way | _no_folders(target, planned))


def _no_folders(target: Path, names: Iterable[str]) -> set[str]:
    """What lies where the files ``names`` need a folder; a link to one elsewhere is none."""
    parents = {parent.as_posix() for name in names for parent in Path(name).parents} - {"."}
    return {parent for parent in parents if os.path.lexists(target / parent) and not _is_folder(target / parent)}


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _recorded(target: Path) -> set[str]:
    """The relative paths that an earlier write has recorded. A damaged record names itself alone, and what was fetched
    was not written here."""
    names = {LOCK_NAME}
    with suppress(FormatError):
        lock = read_lock(target)
        if lock is not None:
            names = {LOCK_NAME, *lock.files} if "plan" in lock.origin else set()
    history = read_history(target)
    return names | set(history.names if history is not None else ())


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
    """Remove what an earlier write of ours left: the files of its lock and journal, whole and partial, and both of
    these. The caller is the only writer."""
    for path in _left_behind(target):
        path.unlink(missing_ok=True)
        with suppress(OSError):  # a folder that is not empty stays
            if path.parent != target:
                path.parent.rmdir()
    (target / STATE_DIR / JOURNAL_NAME).unlink(missing_ok=True)


def _left_behind(target: Path) -> list[Path]:
    recorded = sorted(_recorded(target))
    apart = _no_folders(target, recorded)
    inside = [name for name in recorded if not any(parent.as_posix() in apart for parent in Path(name).parents)]
    return [target / (name + ending) for name in inside for ending in ("", PARTIAL)]


def require_space(plan: Plan, files: Mapping[str, Progress], *, force: bool = False, beside_bytes: int = 0) -> None:
    """Raise ``SpaceError`` where the filesystem lacks room for what is left to write, and ``beside_bytes`` more."""
    needed, free = space_needed(plan, files, force=force) + beside_bytes, free_disk_bytes(plan.target)
    if needed > free:
        raise SpaceError(
            "not enough free space",
            where=plan.target,
            expected=exact_bytes(needed),
            found=exact_bytes(free),
            fix="Free some, or name a target elsewhere.",
        )


def space_needed(plan: Plan, files: Mapping[str, Progress], *, force: bool = False) -> int:
    """Bytes that the filesystem must have free for what is left to write.

    What lies there already counts: partial files, which are continued, and with ``force`` all that will be removed.
    """
    needed = sum(file.size_bytes for file in plan.files if not _is_done(file.name, files)) + SLACK_BYTES
    needed += sum(file.size_bytes for file in plan.side_files.values())
    partial = [plan.target / (file.name + PARTIAL) for file in plan.files]
    return needed - sum(map(_allocated, _left_behind(plan.target) if force else partial))


def require_memory(needed: int) -> None:
    """Raise ``SpaceError`` where buffers of ``needed`` bytes are more than the machine can give."""
    available = available_memory_bytes()
    if needed > available:
        raise SpaceError(
            "not enough memory for the buffers",
            where="--jobs",
            expected=exact_bytes(needed),
            found=f"{exact_bytes(available)} available",
            fix="Use a smaller --jobs.",
        )


def _is_done(name: str, files: Mapping[str, Progress]) -> bool:
    progress = files.get(name)
    return progress is not None and progress.done


def _allocated(path: Path) -> int:
    return path.lstat().st_blocks * 512 if os.path.lexists(path) else 0
