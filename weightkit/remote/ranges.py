"""Ranges of remote files, over as many responses and connections as it takes.

Whatever happens to a response, the next byte that arrives is the one that was due, and of the object that the file was
when it was opened.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from weightkit.errors import (
    AccessError,
    Interrupted,
    RepositoryError,
    SourceChangedError,
    UnreachableError,
    WeightkitError,
)
from weightkit.remote.address import parse_hub
from weightkit.remote.hugging_face import Repository
from weightkit.remote.patience import Hiccup, Patience, wait_from_headers
from weightkit.remote.web import TRANSIENT, Answer, Connection, Stream, first_byte, plain_tag, total_of

#: A long range is asked for in pieces of so much, so many at once.
PIECE_BYTES = 8 << 20
CONNECTIONS = 8
#: What is read from a socket at once, at most.
READ_BYTES = 1 << 20
_CONTENT = re.compile(r"sha256:([0-9a-f]{64})|git-sha1:([0-9a-f]{40})")
_HEX = re.compile(r"[0-9a-f]+")
CHANGED = "Run the command again with --force."
OFFLINE = "Check the network and the address, and run it again: a conversion continues where it stopped."


@dataclass(frozen=True, slots=True)
class Version:
    """A file's size, and what its server calls this version of it: an entity tag, or a hub's id of the content
    (``sha256:...``, ``git-sha1:...``). An empty tag says nothing."""

    size_bytes: int
    tag: str


class Ranges(Protocol):
    """Where ranges of one kind of address come from."""

    def read(self, address: str, version: Version, offset: int, out: memoryview, tries: Tries) -> None:
        """Fill ``out`` from byte ``offset`` of a file.

        Raises:
            SourceChangedError: the file is another one by now.
            HubError: it cannot be had.
        """
        ...

    def close(self) -> None: ...


class Tries:
    """How often one range was tried since its last byte."""

    def __init__(self, address: str, patience: Patience, stop: threading.Event) -> None:
        self._address, self._patience, self._stop = address, patience, stop
        self._failures, self._since = 0, 0.0

    def progressed(self) -> None:
        """A byte arrived: earlier failures are forgotten."""
        self._failures = 0

    def check_stop(self) -> None:
        if self._stop.is_set():
            raise Interrupted("stopped", where=self._address)

    def failed(self, hiccup: Hiccup) -> None:
        """Wait before the next try. Raises ``UnreachableError`` where there is none, ``Interrupted``."""
        self._failures += 1
        self._since = time.monotonic() if self._failures == 1 else self._since
        if self._patience.is_over(self._failures, self._since, hiccup):
            raise UnreachableError(
                f"cannot be read, {self._failures} times ({hiccup.reason})", where=self._address, fix=OFFLINE
            ) from hiccup
        if self._stop.wait(self._patience.wait_s(self._failures, hiccup)):
            raise Interrupted("stopped", where=self._address) from hiccup


class RemoteFiles:
    """Reads ranges of remote files, long ones in pieces over several connections. Threads may share it.

    Args:
        patience: how failures are met.
        connections: pieces at once, over all ranges together.
        stop: once set, it ends all waits.
    """

    def __init__(
        self,
        patience: Patience | None = None,
        *,
        connections: int = CONNECTIONS,
        stop: threading.Event | None = None,
    ) -> None:
        self.patience = patience or DEFAULT_PATIENCE
        self.stop, self._owns_stop = stop or threading.Event(), stop is None
        self._connections = connections
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._kinds: dict[str, Ranges] = {}

    def close(self) -> None:
        """End all connections."""
        if self._owns_stop:
            self.stop.set()
        with self._lock:
            pool, kinds = self._pool, list(self._kinds.values())
            self._pool, self._kinds = None, {}
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        for kind in kinds:
            kind.close()

    def read(self, address: str, version: Version, offset: int, out: memoryview) -> None:
        """Fill ``out`` (flat bytes) from byte ``offset`` of a file. See ``Ranges.read``."""
        if len(out) <= PIECE_BYTES:
            self._piece(address, version, offset, out)
            return
        pieces = [
            self._submit(address, version, offset + start, out[start : start + PIECE_BYTES])
            for start in range(0, len(out), PIECE_BYTES)
        ]
        problems = [problem for piece in pieces if (problem := piece.exception()) is not None]  # waits for all of them
        if problems:
            raise next((problem for problem in problems if not isinstance(problem, Interrupted)), problems[0])

    def _submit(self, address: str, version: Version, offset: int, out: memoryview) -> Future[None]:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._connections, thread_name_prefix="ranges")
            return self._pool.submit(self._piece, address, version, offset, out)

    def _piece(self, address: str, version: Version, offset: int, out: memoryview) -> None:
        self._kind(address).read(address, version, offset, out, Tries(address, self.patience, self.stop))

    def _kind(self, address: str) -> Ranges:
        scheme = address.partition("://")[0]
        with self._lock:
            if scheme not in self._kinds:
                self._kinds[scheme] = _make(scheme, self.patience)
            return self._kinds[scheme]


DEFAULT_PATIENCE = Patience()


def _make(scheme: str, patience: Patience) -> Ranges:
    if scheme == "s3":
        from weightkit.remote.store import StoreRanges

        return StoreRanges()
    return WebRanges(patience)


# --- over HTTP --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a file's bytes are asked for. ``headers`` go to the host of ``home`` alone."""

    url: str
    headers: Callable[[], Mapping[str, str]] = dict
    home: str = ""


def place_of(address: str) -> Place:
    """Of an ``hf://`` address with a commit, or an ``http(s)://`` one."""
    if not address.startswith("hf://"):
        return Place(address)
    hub = parse_hub(address)
    repository = Repository(hub.repo)
    return Place(repository.url(hub.revision or "main", hub.path), repository.headers, repository.endpoint)


class WebRanges:
    """``hf://``, ``https://`` and ``http://``."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._local = threading.local()
        self._lock = threading.Lock()
        self._made: list[Connection] = []
        self._places: dict[str, Place] = {}

    def close(self) -> None:
        with self._lock:
            for connection in self._made:
                connection.close()
            self._made.clear()

    def read(self, address: str, version: Version, offset: int, out: memoryview, tries: Tries) -> None:
        """See ``Ranges.read``."""
        done, place = 0, self._place(address)
        while done < len(out):
            before = done
            try:
                stream = self._open(address, place, version, offset + done, offset + len(out))
                try:
                    while done < len(out):
                        tries.check_stop()
                        data = stream.read(min(READ_BYTES, len(out) - done))
                        if not data:
                            raise Hiccup(f"the body ended {len(out) - done:,} bytes early")
                        out[done : done + len(data)] = data
                        done += len(data)
                finally:
                    stream.close(reusable=done == len(out))
            except Hiccup as hiccup:
                if done > before:
                    tries.progressed()
                tries.failed(hiccup)

    def probe(self, address: str) -> Answer:
        """The response to a range of one byte, closed: what a file is, and whether ranges of it can be had. Raises
        ``Hiccup``."""
        place = self._place(address)
        answer = self._connection(address).get(place.url, (0, 1), place.headers, place.home)
        with suppress(Exception):
            if answer.status == 206:
                _ = answer.response.content  # a connection that is read to the end is kept
            answer.response.close()
        return answer

    def _place(self, address: str) -> Place:
        place = self._places.get(address)
        if place is None:
            place = self._places[address] = place_of(address)
        return place

    def _connection(self, address: str) -> Connection:
        """This thread's. Passwords of ~/.netrc are for web servers; a hub has its token."""
        kind = "hub" if address.startswith("hf://") else "web"
        found: Connection | None = getattr(self._local, kind, None)
        if found is None:
            found = Connection(self._patience, netrc=kind == "web")
            setattr(self._local, kind, found)
            with self._lock:
                self._made.append(found)
        return found

    def _open(self, address: str, place: Place, version: Version, start: int, end: int) -> Stream:
        whole = start == 0 and end == version.size_bytes
        span = None if whole else (start, end)
        answer = self._connection(address).get(place.url, span, place.headers, place.home)
        try:
            require_ok(address, answer)
            _require_same(address, version, answer)
            if answer.status == 200 and not whole:
                raise no_ranges(address)
            return Stream(answer.response, first_byte(answer, start, end, version.size_bytes))
        except BaseException:
            answer.response.close()
            raise


def require_ok(address: str, answer: Answer) -> None:
    """Raise what a status other than 200 and 206 means."""
    status = answer.status
    if status in (200, 206):
        return
    if status in TRANSIENT or status >= 500:
        raise Hiccup(f"HTTP {status}", after_s=wait_from_headers(answer.headers))
    if not answer.at_home:  # a signed address that expired, as a rule
        raise Hiccup(f"HTTP {status} after a redirect")
    if status == 416:
        raise changed(address, "the range that was asked for", "a shorter file")
    raise refusal(address, status)


def refusal(address: str, status: int) -> WeightkitError:
    """What to raise for a file that is not given."""
    if status in (401, 403):
        hub = address.startswith("hf://")
        fix = (
            "`hf auth login` or set HF_TOKEN, and accept the repository's terms."
            if hub
            else "Put a password for it into ~/.netrc."
        )
        return AccessError(f"access refused (HTTP {status})", where=address, fix=fix)
    if status in (404, 410):
        return RepositoryError(f"no such file (HTTP {status})", where=address)
    return UnreachableError(f"an unexpected answer (HTTP {status})", where=address)


def no_ranges(address: str) -> UnreachableError:
    """For a server that sends whole files only."""
    return UnreachableError(
        "the server ignores Range, so nothing but whole files can be had from it",
        where=address,
        expected="HTTP 206",
        found="HTTP 200",
        fix="Copy the files to a local folder first.",
    )


def web_tag(headers: Mapping[str, str]) -> str:
    """What a web server calls a version: its entity tag, or when it was modified."""
    return plain_tag(headers.get("ETag", "")) or headers.get("Last-Modified", "")


def _require_same(address: str, version: Version, answer: Answer) -> None:
    """Raise ``SourceChangedError`` where the response is of another object than was opened."""
    content = _CONTENT.fullmatch(version.tag)
    expected = version.tag if content is None else content[1] or content[2]
    if content is None:
        found = web_tag(answer.headers)
    else:  # hubs call an object by its checksum, as a rule
        found = (
            answer.announced
            if answer.announced and re.fullmatch(f"[0-9a-f]{{{len(expected)}}}", answer.announced)
            else ""
        )
    if expected and found and found != expected:
        raise changed(address, expected, found)
    size = total_of(answer)
    if size is not None and answer.status == 206 and size != version.size_bytes:
        raise changed(address, f"{version.size_bytes:,} bytes", f"{size:,}")


def changed(address: str, expected: str, found: str) -> SourceChangedError:
    return SourceChangedError(
        "the file changed after it was opened", where=address, expected=expected, found=found, fix=CHANGED
    )
