"""Where the bytes of a plan's sources come from: read where they lie, or, of remote files whose checksums are recorded,
fetched whole into a spool of bounded size, verified, and then read.

An output is made from ranges of many sources, in an order that is not theirs, and a SHA-256 needs all of a file from
front to back. So a whole file is verified before a byte of it is used, and dropped when no output needs it any more.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from weightkit.checkpoint.stamp import Stamp
from weightkit.checkpoint.tensors import LazyTensor, size_bytes, stored_parts
from weightkit.durable import STATE_DIR
from weightkit.errors import SpaceError
from weightkit.machine import JOBS, free_disk_bytes
from weightkit.remote.address import is_address
from weightkit.units import human_bytes
from weightkit.writer.journal import Progress
from weightkit.writer.plan import Plan, PlannedFile
from weightkit.writer.target import space_needed

#: Files that are fetched at once, each over several connections.
FETCHERS = 2
#: More outputs than this are not written at once, even where they share their sources.
MAX_SHARING = 64
#: Where the spool lies, below the target's state folder.
SPOOL_DIR = "spool"
NO_SPOOL = "--spool 0 reads ranges alone, and verifies no source file whole"


@dataclass(frozen=True)
class Use:
    """An output needs a source file from byte ``begin`` of the output up to ``end``."""

    path: str
    begin: int
    end: int


def uses(file: PlannedFile, start: int = 0) -> list[Use]:
    """The remote sources of an output in the order of their first use, as far as it is not written up to ``start``."""
    found: dict[str, Use] = {}
    for begin, end, paths in _needs(file):
        for path in paths:
            if end > start:
                found[path] = Use(path, found[path].begin if path in found else begin, end)
    return list(found.values())


def _needs(file: PlannedFile) -> Iterator[tuple[int, int, list[str]]]:
    """Of each tensor: where it begins and ends in the output, and the remote files that it is made from."""
    position = len(file.header)
    for tensor in file.tensors.values():
        end = position + size_bytes(tensor)
        yield position, end, _remote_paths(tensor)
        position = end


def _remote_paths(tensor: LazyTensor) -> list[str]:
    return list(dict.fromkeys(part.path for part in stored_parts(tensor) if is_address(part.path)))


@dataclass(frozen=True)
class Sourcing:
    """How the remote sources of what is left of a plan are read.

    Attributes:
        stamps: of all remote sources that are still needed.
        spooled: those of them that are fetched whole and verified.
        limit_bytes: most that these take of the disk at a time.
        jobs: outputs written at once.
        refetched: about how often each of them is fetched.
    """

    stamps: Mapping[str, Stamp]
    spooled: tuple[str, ...] = ()
    limit_bytes: int = 0
    jobs: int = 1
    refetched: int = 1

    @property
    def unverified(self) -> tuple[str, ...]:
        """Those that are read by ranges, so that no checksum covers what is read."""
        return tuple(path for path in self.stamps if path not in self.spooled)

    @cached_property
    def spooled_bytes(self) -> int:
        """Bytes of all files that pass through the spool."""
        return sum(self.stamps[path].size_bytes for path in self.spooled)

    def lacking_bytes(self, target: Path) -> int:
        """Of the disk, what the spool may take beside what an earlier run left in it."""
        return self.limit_bytes - spool_bytes(target)


def plan_sourcing(
    plan: Plan,
    files: Mapping[str, Progress],
    *,
    jobs: int | None = None,
    limit_bytes: int | None = None,
    elsewhere: bool = False,
    force: bool = False,
) -> Sourcing:
    """How to read the remote sources of what is left of ``plan``.

    Args:
        files: progress that an earlier run left.
        jobs: outputs at once; default ``JOBS``, and all that share their sources where there is a spool: else
            each of these sources would be fetched again for the next outputs.
        limit_bytes: most that the spool may take; 0 for none; default room for what is in work, as far as the disk has
            it.
        elsewhere: other processes write the outputs, and have no spool.
        force: what an earlier write left will be removed.

    Raises ``SpaceError`` where the limit, or the disk, is too small for what one tensor is made from.
    """
    if not any(map(is_address, plan.stamps)):
        return Sourcing({}, jobs=jobs or JOBS)
    left = [file for file in plan.files if not (progress := files.get(file.name)) or not progress.done]
    needed = {file.name: uses(file, _start(files, file)) for file in left}
    paths = dict.fromkeys(use.path for found in needed.values() for use in found)
    stamps = {path: plan.stamps[path] for path in paths}
    known = tuple(path for path, stamp in stamps.items() if stamp.sha256 is not None)
    if not known or limit_bytes == 0 or elsewhere:
        return Sourcing(stamps, jobs=jobs or JOBS)
    sharing = max(Counter(use.path for found in needed.values() for use in found).values())
    at_once = jobs or max(JOBS, min(sharing, MAX_SHARING))
    limit = _limit(plan, files, left, {path: stamps[path].size_bytes for path in known}, at_once, limit_bytes, force)
    total = sum(stamps[path].size_bytes for path in known)
    refetched = 1 if limit >= total else -(-sharing // at_once)
    return Sourcing(stamps, known, limit, at_once, refetched)


def _start(files: Mapping[str, Progress], file: PlannedFile) -> int:
    progress = files.get(file.name)
    return progress.bytes if progress is not None else 0


def _limit(
    plan: Plan,
    files: Mapping[str, Progress],
    left: list[PlannedFile],
    sizes: Mapping[str, int],
    jobs: int,
    asked: int | None,
    force: bool,
) -> int:
    """What the spool may take. Raises ``SpaceError``."""
    groups = {tuple(path for path in paths if path in sizes) for file in left for _, _, paths in _needs(file)}
    least = max(sum(sizes[path] for path in group) for group in groups)
    if asked is not None and asked < least:
        raise SpaceError(
            "too small for the source files that one tensor is made from",
            where="--spool",
            expected=f"at least {least:,} bytes",
            found=f"{asked:,}",
            fix=f"Give it {human_bytes(least)} or more. {NO_SPOOL}.",
        )
    total, largest = sum(sizes.values()), max(sizes.values())
    wished = min(total, asked if asked is not None else max(least, (jobs + FETCHERS + 2) * largest))
    outputs = space_needed(plan, files, force=force)
    room = free_disk_bytes(plan.target) + spool_bytes(plan.target) - outputs
    if room >= wished or asked is not None:
        return wished
    if room < least:
        raise SpaceError(
            "not enough free space for the source files on their way",
            where=plan.target,
            expected=f"{least:,} bytes beside {max(outputs, 0):,} of outputs",
            found=f"{max(room, 0):,}",
            fix=f"Free some, or name a target elsewhere. {NO_SPOOL}.",
        )
    return room


class SourceRecord:
    """Which remote sources were verified whole, and which were read by ranges, over all runs into a target. Threads may
    share it."""

    def __init__(self, target: Path) -> None:
        self._path = target / STATE_DIR / "sources.jsonl"
        self._lock = threading.Lock()
        self._found: dict[str, set[str]] = {"verified": set(), "ranges": set()}
        with suppress(OSError):
            for line in self._path.read_bytes().split(b"\n")[:-1]:
                with suppress(ValueError, KeyError, TypeError, AttributeError):
                    how, path = json.loads(line)
                    self._found[how].add(path)

    def verified(self, path: str) -> None:
        """The file's SHA-256 is the recorded one, and nothing is read of it that was not hashed."""
        self._add("verified", path)

    def ranges(self, path: str) -> None:
        """What is read of it is covered by no checksum."""
        self._add("ranges", path)

    def sorted_out(self, paths: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Those of the files that were verified, and the others."""
        good = self._found["verified"] - self._found["ranges"]
        paths = list(paths)
        return tuple(p for p in paths if p in good), tuple(p for p in paths if p not in good)

    def remove(self) -> None:
        """The write is complete."""
        self._path.unlink(missing_ok=True)

    def _add(self, how: str, path: str) -> None:
        with self._lock:
            if path not in self._found[how]:
                self._found[how].add(path)
                with self._path.open("ab") as file:
                    file.write(json.dumps([how, path]).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())


def remote_sources(plan: Plan) -> dict[str, None]:
    """The addresses of all files that a plan reads."""
    if not any(map(is_address, plan.stamps)):
        return {}
    return {path: None for file in plan.files for _, _, paths in _needs(file) for path in paths}


def spool_bytes(target: Path) -> int:
    """What an earlier run left in the spool."""
    folder = target / STATE_DIR / SPOOL_DIR
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir()) if folder.is_dir() else 0
