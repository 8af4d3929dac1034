"""A file whose checksum is wrong, made right by fetching as little again as possible.

What its damage is like is not known at first, so the cheap ways come first:

1. Hash it again against what its chunks hashed to when they arrived. That finds damage of the disk; only the damaged
   chunks are fetched.
2. Fetch chunks again and compare them with those on the disk, the doubtful ones first. Where one differs, take the new
   one and see whether the whole is right now; it is, for a byte that was flipped once, and the rest is not fetched.
3. Where two hubs have the file, the other one first: what one sends wrong always, the other may not.
4. Where a pass found differences and the whole is still wrong, the second pass may have been the bad one: fetch what
   differed a third time, and let two of three decide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from weightkit.errors import ContentError, HubError
from weightkit.hub.line import Line
from weightkit.hub.partial import Partial
from weightkit.hub.transport import Source, Transport


class _Right(Exception):  # noqa: N818 - good news
    """The whole is right: what is being fetched need not be."""


class Mender:
    """Mends one file.

    Args:
        check: called now and then; may raise, to stop.
    """

    def __init__(self, partial: Partial, line: Line, transport: Transport, check: Callable[[], None]) -> None:
        self.partial, self.line, self.transport, self.check = partial, line, transport, check
        self.grain = partial.grain.chunk_bytes
        self.size = partial.file.size_bytes

    def hash_on(self, seen: Callable[[int], None] = lambda count: None) -> None:
        """Hash as far as the file is there, mending chunks that no longer hash to what they did.

        Raises as ``Line.pour``.
        """
        last = None
        while (chunk := self.partial.catch_up(self.check, seen)) is not None:
            if chunk == last:  # fetched anew, and still another: then what was known of it was wrong
                self.partial.accept(chunk)
                continue
            last = chunk
            begin, end = self._span(chunk)
            self.line.shared.tell(
                f"{self.line.file.path}: damaged on the disk at {begin:,} to {end:,}; fetched again from there to there"
            )
            self.line.pour(self.transport, begin, end, self.partial.mend)

    def is_right(self) -> bool:
        """Whether the whole file has its listed checksum. It is hashed as far as it is not yet."""
        self.hash_on()
        return self.partial.hashed == self.size and self.partial.digests.match(self.partial.file)

    def mend(self) -> None:
        """Make the file right.

        Raises:
            ContentError: what the hubs send is consistently something else.
            HubError, Stopped: as ``Line.pour``.
        """
        self.partial.restart_hashing()
        if self.is_right():
            return
        differed, failures = False, list[HubError]()
        for source in self._order():
            try:
                differed |= self._compare(source)
            except _Right:
                return
            except HubError as error:
                failures.append(error)
        if failures and len(failures) == len(self.line.sources):
            raise failures[0]
        raise ContentError(
            "the checksum is wrong, however often it is fetched",
            where=self.line.file.path,
            expected=self.line.file.content,
            found=f"sha256:{self.partial.digests.sha256.hexdigest()}"
            + (", and other bytes each time" if differed else ", the same each time"),
            fix="It was replaced on the hub, or the listing is wrong. Run fetch again later, or name another --hub.",
        )

    def _order(self) -> Sequence[Source]:
        """Those that gave least of it first."""
        given = self.line.given
        return sorted(self.line.sources, key=lambda source: given.get(source.name, 0))

    def _compare(self, source: Source) -> bool:
        """Fetch the file again until it is right, chunk by chunk. Whether anything differed; ``_Right`` where it is."""
        before: dict[int, bytes] = {}

        def compare(chunk: int, fresh: bytes) -> None:
            begin, _ = self._span(chunk)
            there = self.partial.read(begin, len(fresh))
            if there == fresh:
                return
            before[chunk] = hashlib.sha256(there).digest()
            self.partial.overwrite(begin, fresh)
            # After the 1st, 2nd, 4th, ...: hashing the whole each time would cost more than it could save.
            if len(before) & (len(before) - 1) == 0:
                self._raise_if_right()

        for first, last in self._runs():
            self._chunks(source, first, last, compare)
        if before:
            self._raise_if_right()
            self._vote(source, before)
        return bool(before)

    def _vote(self, source: Source, before: dict[int, bytes]) -> None:
        """Of chunks that came in two versions, take the one that comes a second time."""

        def decide(chunk: int, fresh: bytes) -> None:
            begin, _ = self._span(chunk)
            if hashlib.sha256(fresh).digest() == before[chunk]:
                self.partial.overwrite(begin, fresh)

        for chunk in sorted(before):
            self._chunks(source, chunk, chunk + 1, decide)
        self._raise_if_right()

    def _raise_if_right(self) -> None:
        self.partial.restart_hashing()
        if self.is_right():
            raise _Right

    def _chunks(self, source: Source, first: int, last: int, use: Callable[[int, bytes], None]) -> None:
        """Fetch chunks ``[first, last)``, each given whole."""
        held = bytearray()
        begin, end = self._span(first)[0], self._span(last - 1)[1]

        def gather(offset: int, data: bytes) -> None:
            self.check()
            view, position = memoryview(data), offset
            while len(view):
                chunk = position // self.grain
                count = min(len(view), self._span(chunk)[1] - position)
                held.extend(view[:count])
                view, position = view[count:], position + count
                if position == self._span(chunk)[1]:
                    fresh = bytes(held)
                    held.clear()
                    use(chunk, fresh)

        self.line.pour(self.transport, begin, end, gather, only=source)

    def _runs(self) -> list[tuple[int, int]]:
        """Chunks in the order to look at them, as runs: those that nothing vouches for, and the others from front to
        back."""
        doubtful = sorted({n for b, e in self.partial.suspects for n in range(b // self.grain, -(-e // self.grain))})
        others = sorted(set(range(self.partial.chunks)) - set(doubtful))
        return [*_runs(doubtful), *_runs(others)]

    def _span(self, chunk: int) -> tuple[int, int]:
        return chunk * self.grain, min(self.size, (chunk + 1) * self.grain)


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """``[1, 2, 3, 7]`` as ``[(1, 4), (7, 8)]``."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs
