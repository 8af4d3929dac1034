"""The way to one file's bytes: whatever happens to a stream, the next byte that arrives is the one that was due."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from weightkit.errors import HubError, UnreachableError
from weightkit.hub.listing import RemoteFile
from weightkit.hub.transport import Source, Transport
from weightkit.remote.patience import Hiccup, Patience, Stopped, Throttle
from weightkit.remote.web import Stream

#: What is read from a socket at once, at most.
READ_BYTES = 1 << 20
#: How often a stream's rate is judged, and what is too slow where another hub has the same bytes.
JUDGED_EVERY_S = 2.0
SLOW = 0.4
#: Nothing is changed for what is done in a moment anyway.
WORTH_A_CHANGE_S = 5.0

Sink = Callable[[int, bytes], None]


class RangeIgnored(Exception):  # noqa: N818 - no failure: the whole file comes instead
    """The server sends the whole file where a part was asked for."""


@dataclass
class Health:
    """How a hub has fared in this fetch. Threads share it; a stale value only costs a detour."""

    resting_until: float = 0.0
    #: Bytes a second of one stream, smoothed; None before the first is known.
    rate: float | None = None
    streams: int = 0
    bytes_fetched: int = 0

    def measured(self, rate: float) -> None:
        self.rate = rate if self.rate is None else 0.7 * self.rate + 0.3 * rate


@dataclass
class Shared:
    """What all lines of one fetch have in common.

    Attributes:
        stop: set when the fetch is being stopped; ends all waits.
        health: by hub.
        spread: use all hubs at once, rather than the faster one.
        read_bytes: read from a socket at once, at most.
        tell: told what the user is to know, as it comes.
        counting: guards the counters in ``health``.
    """

    patience: Patience
    stop: threading.Event
    throttle: Throttle
    health: dict[str, Health]
    spread: bool = False
    read_bytes: int = READ_BYTES
    tell: Callable[[str], None] = lambda note: None
    counting: threading.Lock = field(default_factory=threading.Lock)


class Line:
    """One file and the hubs that have it. Threads that fetch several ranges of it share the line."""

    def __init__(self, file: RemoteFile, sources: Sequence[Source], shared: Shared) -> None:
        self.file, self.sources, self.shared = file, tuple(sources), shared
        #: Hubs that will not give this file, with the reason.
        self.refused: dict[str, HubError] = {}
        self.whole_only = False
        #: The last failure of each hub: what is told when all of them fail.
        self.last: dict[str, str] = {}
        #: Bytes that came from each hub.
        self.given: dict[str, int] = {}
        self._etags: dict[tuple[str, str | None], str] = {}
        self.replaced = False

    def pour(
        self,
        transport: Transport,
        begin: int,
        end: int,
        sink: Sink,
        *,
        whole_ok: bool = True,
        only: Source | None = None,
    ) -> None:
        """Give ``sink`` the bytes ``[begin, end)`` in order, each once, as ``(offset, data)``.

        A stream that fails is taken up again at the next byte, from the hub that does best then.

        Args:
            whole_ok: skip what comes before ``begin`` where a server ignores ranges; else raise ``RangeIgnored``.
            only: from this hub, none else.

        Raises:
            HubError: no hub gives the bytes.
            Stopped: the fetch is being stopped.
            RangeIgnored: see above.
        """
        run = _Pour(self, transport, begin, end, sink, whole_ok, (only,) if only is not None else self.sources)
        while run.position < end:
            run.attempt()

    def note_etag(self, source: Source, stream: Stream) -> None:
        """Notice an object that was replaced. Its bytes may be right all the same: the checksum decides."""
        if stream.etag is None:
            return
        before = self._etags.setdefault((source.name, stream.host), stream.etag)
        if before != stream.etag and not self.replaced:
            self.replaced = True
            self.shared.tell(f"{self.file.path}: the object on {source.name} was replaced while it was fetched")


class _Pour:
    """One call of ``pour``: where it stands, and how its hubs have failed since the last byte."""

    def __init__(
        self,
        line: Line,
        transport: Transport,
        begin: int,
        end: int,
        sink: Sink,
        whole_ok: bool,
        sources: Sequence[Source],
    ) -> None:
        self.line, self.shared, self.transport = line, line.shared, transport
        self.position, self.end, self.sink, self.whole_ok = begin, end, sink, whole_ok
        self.sources = sources
        self.failures: dict[str, int] = {}
        self.since: dict[str, float] = {}
        self.resting: dict[str, float] = {}
        self.over: set[str] = set()

    def attempt(self) -> None:
        """One stream, as far as it goes."""
        source = self._choose()
        health, before = self.shared.health[source.name], self.position
        with self.shared.counting:
            health.streams += 1
        try:
            self._copy(source, health)
        except Hiccup as hiccup:
            self._failed(source, hiccup, progress=self.position > before)
        except HubError as error:
            self.line.refused[source.name] = error
        finally:
            with self.shared.counting:
                health.streams -= 1

    def _choose(self) -> Source:
        """The hub to ask now, after the wait that it needs. Raises ``HubError`` where none is left."""
        left = [s for s in self.sources if s.name not in self.line.refused and s.name not in self.over]
        if not left:
            raise self._defeat()
        ready = {source.name: self._ready_at(source) for source in left}
        now = time.monotonic()
        fit = [source for source in left if ready[source.name] <= now]
        source = self._best(fit) if fit else min(left, key=lambda source: ready[source.name])
        if self.shared.stop.wait(max(0.0, ready[source.name] - now)) or self.shared.stop.is_set():
            raise Stopped
        return source

    def _ready_at(self, source: Source) -> float:
        return max(self.resting.get(source.name, 0.0), self.shared.health[source.name].resting_until)

    def _best(self, fit: Sequence[Source]) -> Source:
        """The fastest; those of unknown rate are tried with as many streams as the others."""
        health = self.shared.health
        if len(fit) == 1 or self.line.file.sha256 is None:
            return fit[0]  # of files without a SHA-256, other hubs' copies are a last resort
        unknown = [source for source in fit if health[source.name].rate is None]
        if self.shared.spread or unknown:
            return min(fit, key=lambda source: health[source.name].streams)
        return max(fit, key=lambda source: health[source.name].rate or 0.0)

    def _copy(self, source: Source, health: Health) -> None:
        stream = self.transport.open(source, self.line.file, self.position, self.end)
        done = False
        try:
            self.line.note_etag(source, stream)
            skip = self.position - stream.start
            if stream.whole and (skip or self.end < self.line.file.size_bytes):
                self.line.whole_only = True
                if not self.whole_ok:
                    raise RangeIgnored
            self._drain(stream, source, health, skip)
            done = True
        finally:
            stream.close(reusable=done)
            self.transport.current = None

    def _drain(self, stream: Stream, source: Source, health: Health, skip: int) -> None:
        piece = self.shared.throttle.piece(self.shared.read_bytes)
        judged_at, judged_bytes = time.monotonic(), 0
        while self.position < self.end:
            if self.shared.stop.is_set():
                raise Stopped
            data = stream.read(min(piece, skip + self.end - self.position))
            if not data:
                raise Hiccup(f"the body ended {self.end - self.position:,} bytes early")
            with self.shared.counting:
                health.bytes_fetched += len(data)
                self.line.given[source.name] = self.line.given.get(source.name, 0) + len(data)
            judged_bytes += len(data)
            self.shared.throttle.took(len(data))
            if skip:
                dropped = min(skip, len(data))
                skip, data = skip - dropped, data[dropped:]
            if data:
                self.sink(self.position, data)
                self.position += len(data)
                if self.failures:
                    self._progressed()
            now = time.monotonic()
            if now - judged_at >= JUDGED_EVERY_S:
                health.measured(judged_bytes / (now - judged_at))
                self._require_pace(source, judged_bytes / (now - judged_at))
                judged_at, judged_bytes = now, 0
        if health.rate is None and judged_bytes >= self.shared.read_bytes:
            health.measured(judged_bytes / max(1e-6, time.monotonic() - judged_at))

    def _require_pace(self, source: Source, rate: float) -> None:
        """Leave a hub that is much slower than another one which has the same bytes."""
        if self.shared.spread or (self.end - self.position) / max(rate, 1.0) < WORTH_A_CHANGE_S:
            return
        for other in self.sources:
            known = self.shared.health[other.name]
            usable = other.name not in self.line.refused and other.name not in self.over
            usable = usable and other is not source and self._ready_at(other) <= time.monotonic()
            if usable and (known.rate is None or rate < SLOW * known.rate):
                raise Hiccup(f"{rate:,.0f} bytes a second, where {other.name} may be faster")

    def _progressed(self) -> None:
        """A byte arrived: earlier failures are forgotten."""
        self.failures.clear()
        self.since.clear()
        self.resting.clear()
        self.over.clear()

    def _failed(self, source: Source, hiccup: Hiccup, *, progress: bool) -> None:
        name, patience = source.name, self.shared.patience
        self.line.last[name] = hiccup.reason
        now = time.monotonic()
        self.failures[name] = self.failures.get(name, 0) + 1
        self.since.setdefault(name, now)
        wait = patience.wait_s(self.failures[name], hiccup)
        self.resting[name] = now + (0.0 if progress and hiccup.after_s is None and len(self.sources) == 1 else wait)
        health = self.shared.health[name]
        if hiccup.after_s is not None:  # the hub's limits hold for all files
            health.resting_until = max(health.resting_until, now + wait)
        if patience.is_over(self.failures[name], self.since[name], hiccup):
            self.over.add(name)

    def _defeat(self) -> HubError:
        """Why no hub gives the file: the refusal, or what failed last."""
        refusals = [self.line.refused[s.name] for s in self.sources if s.name in self.line.refused]
        if refusals and len(refusals) == len(self.sources):
            return refusals[0]
        reasons = [
            f"{s.name}: {self.line.refused[s.name].what if s.name in self.line.refused else self.line.last.get(s.name)}"
            for s in self.sources
        ]
        return UnreachableError(
            f"could not be fetched ({'; '.join(reasons)})",
            where=self.line.file.path,
            fix="Run the same command again: it continues where it stopped.",
        )
