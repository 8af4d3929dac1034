"""Source files on their way: fetched whole, held to their checksums, read by ranges, dropped after their last use.

A file in the spool is named by its SHA-256 and grows from its start, so that a stopped run continues where it was: what
lies there is hashed, and the rest is fetched.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weightkit.checkpoint import Reader
from weightkit.checkpoint.reading import Bytes
from weightkit.checkpoint.stamp import Stamp
from weightkit.errors import ChecksumError, Interrupted
from weightkit.remote.ranges import RemoteFiles
from weightkit.sha256 import sha256
from weightkit.units import counted
from weightkit.writer.plan import PlannedFile
from weightkit.writer.sourcing import FETCHERS, Sourcing, Use, uses

#: Fetched at once, in pieces over several connections, and hashed.
CHUNK_BYTES = 32 << 20
#: A file whose checksum is wrong is fetched so often.
ATTEMPTS = 2


@dataclass
class _Held:
    """A verified file. ``pins`` counts the reads that are under way."""

    file: int
    size_bytes: int
    pins: int = 0


class Spool:
    """Remote files on the disk, a few at a time. Threads may share it.

    Args:
        folder: where they lie.
        sourcing: which files, and how much of the disk they may take.
        outputs: what is to be written, with the byte that each begins at.
        files: reads the remote files.
        verified: told the name of each file that was found right.
        tell: told what the user is to know.
    """

    def __init__(
        self,
        folder: Path,
        sourcing: Sourcing,
        outputs: Iterable[tuple[PlannedFile, int]],
        files: RemoteFiles,
        *,
        verified: Callable[[str], None],
        tell: Callable[[str], None],
    ) -> None:
        self.fetched_bytes = 0
        self._folder, self._stamps, self._limit = folder, sourcing.stamps, sourcing.limit_bytes
        self._remote, self._verified, self._tell = files, verified, tell
        self._paths = frozenset(sourcing.spooled)
        self._changed = threading.Condition()
        self._held: dict[str, _Held] = {}
        self._fetching: set[str] = set()
        self._fetched: Counter[str] = Counter()
        self._wanted: Counter[str] = Counter()  # by how many blocked reads
        self._uses: dict[str, list[Use]] = {}  # by output, what is still to come, ordered by its end
        outputs = list(outputs)
        #: In work. Those that come first are so from the start: what they need is not given up before they begin.
        self._active = {output.name for output, _ in outputs[: sourcing.jobs]}
        self._leaving: set[str] = set()  # to be dropped after the reads under way
        self._failure: BaseException | None = None
        self._closed = False
        order: dict[str, None] = {}
        for output, start in outputs:
            found = self._set_uses(output, start)
            order |= dict.fromkeys(use.path for use in found)
        self._order = {path: place for place, path in enumerate(order)}
        folder.mkdir(parents=True, exist_ok=True)
        self._keep_useful()
        tell(f"{counted(len(order), 'source file')} to fetch, each verified whole before it is used")
        self._threads = [threading.Thread(target=self._work, name="spool", daemon=True) for _ in range(FETCHERS)]
        for thread in self._threads:
            thread.start()

    def __contains__(self, path: str) -> bool:
        return path in self._paths

    def close(self) -> None:
        """Stop fetching. What lies in the folder stays, for a later run."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._remote.stop.set()
        for thread in self._threads:
            thread.join()
        for held in self._held.values():
            os.close(held.file)
        self._held.clear()

    # --- what outputs say ---------------------------------------------------------------------------------------------

    def begin(self, output: PlannedFile, start: int) -> None:
        """An output is being written, from ``start`` on."""
        with self._changed:
            self._active.add(output.name)
            self._set_uses(output, start)
            self._drop_useless()

    def passed(self, output: PlannedFile, position: int) -> None:
        """What it holds before ``position`` was read."""
        with self._changed:
            left = self._uses.get(output.name, [])
            if left and left[0].end <= position:
                while left and left[0].end <= position:
                    left.pop(0)
                self._drop_useless()

    def end(self, output: PlannedFile) -> None:
        """It is written, or given up."""
        with self._changed:
            self._active.discard(output.name)
            self._uses.pop(output.name, None)
            self._drop_useless()

    def _set_uses(self, output: PlannedFile, start: int) -> list[Use]:
        found = [use for use in uses(output, start) if use.path in self._paths]
        self._uses[output.name] = sorted(found, key=lambda use: use.end)
        return found

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(self, path: str, offset: int, out: Bytes) -> None:
        """Fill ``out`` from byte ``offset`` of a verified file; waits until it is there.

        Raises:
            ChecksumError: its content is not what is recorded.
            Interrupted: the run is being stopped.
            HubError, SourceChangedError: it cannot be had.
        """
        if not len(out):
            return
        held = self._pin(path)
        try:
            view, done = out.data, 0
            while done < len(view):
                count = os.preadv(held.file, [view[done:]], offset + done)
                if not count:
                    raise OSError(f"{self._place(path)} was truncated")
                done += count
        finally:
            with self._changed:
                held.pins -= 1
                if path in self._leaving and not held.pins:
                    self._drop_useless()

    def _pin(self, path: str) -> _Held:
        with self._changed:
            held = self._held.get(path)
            if held is None:
                self._wanted[path] += 1
                self._changed.notify_all()
                try:
                    while (held := self._held.get(path)) is None:
                        self._require_going(path)
                        self._changed.wait(0.5)
                finally:
                    self._wanted[path] -= 1
            held.pins += 1
            return held

    def _require_going(self, path: str) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed or self._remote.stop.is_set():
            raise Interrupted("stopped", where=path)

    # --- room ---------------------------------------------------------------------------------------------------------

    def _needed(self) -> set[str]:
        return {use.path for left in self._uses.values() for use in left}

    def _soon(self) -> set[str]:
        """What outputs in work need."""
        return {use.path for name in self._active for use in self._uses.get(name, [])}

    def _drop_useless(self) -> None:
        """Drop the files that no output needs any more. The lock is held."""
        needed = self._needed()
        for path in [path for path in self._held if path not in needed]:
            self._drop(path)
        self._changed.notify_all()

    def _drop(self, path: str) -> None:
        if self._held[path].pins or self._wanted[path]:
            self._leaving.add(path)
            return
        self._leaving.discard(path)
        os.close(self._held.pop(path).file)
        self._place(path).unlink(missing_ok=True)

    def _room(self) -> int:
        taken = sum(held.size_bytes for held in self._held.values())
        return self._limit - taken - sum(self._stamps[path].size_bytes for path in self._fetching)

    def _next(self) -> str | None:
        """What to fetch now; None where there is nothing, or no room. The lock is held."""
        for path in sorted((p for p, count in self._wanted.items() if count), key=lambda p: self._order.get(p, 0)):
            if path not in self._held and path not in self._fetching:
                return path if self._make_room(self._stamps[path].size_bytes) else None
        for among in (self._soon(), self._needed()):
            for path in self._order:
                if path in among and path not in self._held and path not in self._fetching:
                    return path if self._stamps[path].size_bytes <= self._room() else None
        return None

    def _make_room(self, size_bytes: int) -> bool:
        """For a file that is waited for: give up what is read later, and fetch that again then. What outputs in work
        need is given up only where all of them wait."""
        soon = self._soon()
        waiting = sum(count for path, count in self._wanted.items() if path not in self._held)
        stuck = waiting >= len(self._active) and not self._fetching
        for path in sorted(self._held, key=lambda path: -self._order.get(path, 0)):
            if size_bytes <= self._room():
                break
            if path not in soon or stuck:
                self._drop(path)
        return size_bytes <= self._room()

    # --- fetching -----------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        """One thread that fetches."""
        while True:
            with self._changed:
                while self._goes_on() and (path := self._next()) is None:
                    self._changed.wait(0.5)
                if not self._goes_on() or path is None:
                    return
                self._fetching.add(path)
            try:
                held = self._fetch(path)
            except BaseException as exc:
                with self._changed:
                    if not isinstance(exc, Interrupted):
                        self._failure = self._failure or exc
                    self._fetching.discard(path)
                    self._changed.notify_all()
                return
            with self._changed:
                self._fetching.discard(path)
                self._held[path] = held
                self._changed.notify_all()

    def _goes_on(self) -> bool:
        return self._failure is None and not self._closed and not self._remote.stop.is_set()

    def _fetch(self, path: str) -> _Held:
        """A file as it is recorded. Raises ``ChecksumError``."""
        stamp, place = self._stamps[path], self._place(path)
        file = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            there, found = min(os.fstat(file).st_size, stamp.size_bytes), ""
            for _ in range(ATTEMPTS + bool(there)):
                found = self._fill(file, path, stamp, there)
                if found == stamp.sha256:
                    self._count(path)
                    return _Held(file, stamp.size_bytes)
                there = 0
                os.ftruncate(file, 0)
            place.unlink(missing_ok=True)
            raise ChecksumError(
                "the content of the source file is not what is recorded for it",
                where=path,
                expected=f"SHA-256 {stamp.sha256}",
                found=f"{found}, {ATTEMPTS} times",
                fix="The source is damaged: name another one. Nothing was made from this file.",
            )
        except BaseException:
            os.close(file)
            raise

    def _fill(self, file: int, path: str, stamp: Stamp, there: int) -> str:
        """Hash the first ``there`` bytes of the file, and fetch the others. Its SHA-256."""
        digest, at = sha256(stamp.size_bytes), 0
        buffer = np.empty(min(CHUNK_BYTES, stamp.size_bytes), np.uint8)
        while at < stamp.size_bytes:
            if not self._goes_on():
                raise Interrupted("stopped", where=path)
            end = min(at + CHUNK_BYTES, there if at < there else stamp.size_bytes)
            chunk = buffer[: end - at].data
            if at < there:
                _read_whole(file, at, chunk)
            else:
                self._remote.read(path, stamp.version, at, chunk)
                _write_whole(file, at, chunk)
                with self._changed:
                    self.fetched_bytes += len(chunk)
            digest.update(chunk)
            at = end
        return digest.hexdigest()

    def _count(self, path: str) -> None:
        self._verified(path)
        with self._changed:
            self._fetched[path] += 1
            again = self._fetched[path]
        if again == 2:
            self._tell(f"{path}: fetched again; a larger --spool, or more --jobs, would have kept it")

    def _place(self, path: str) -> Path:
        return self._folder / str(self._stamps[path].sha256)

    def _keep_useful(self) -> None:
        """Remove what an earlier run left and this one does not need, or has no room for."""
        wanted = {str(self._stamps[path].sha256) for path in self._needed()}
        left = self._limit
        for place in sorted(self._folder.iterdir(), key=lambda place: -place.stat().st_size):
            left -= place.stat().st_size
            if place.name not in wanted or left < 0:
                with suppress(OSError):
                    place.unlink()


def _read_whole(file: int, offset: int, out: memoryview) -> None:
    done = 0
    while done < len(out) and (count := os.preadv(file, [out[done:]], offset + done)):
        done += count


def _write_whole(file: int, offset: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)


def clear_spool(folder: Path) -> None:
    """Remove the spool with all that is in it."""
    shutil.rmtree(folder, ignore_errors=True)


class SpoolingReader(Reader):
    """A ``Reader`` that reads the files of a spool from there."""

    def __init__(
        self, stamps: Mapping[str, Stamp], spool: Callable[[RemoteFiles], Spool], *, ahead_bytes: int = 0
    ) -> None:
        super().__init__(stamps, ahead_bytes=ahead_bytes)
        self.spool = spool(self._remote_files())

    def close(self) -> None:
        self.spool.close()
        super().close()

    def _read_remote(self, address: str, offset: int, out: Bytes) -> int:
        if address not in self.spool:
            return super()._read_remote(address, offset, out)
        self.spool.read(address, offset, out)
        return 0
