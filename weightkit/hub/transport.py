"""One response of a hub: status codes, and whether it is of the object that was listed."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass

from weightkit.errors import AccessError, ContentError, RepositoryError, UnreachableError
from weightkit.hub.clients import Hub
from weightkit.hub.listing import RemoteFile
from weightkit.remote.patience import Hiccup, Patience, wait_from_headers
from weightkit.remote.web import TRANSIENT, Answer, Connection, Stream, first_byte

_HEX = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Source:
    """A repository on a hub at the commit that was listed."""

    hub: Hub
    commit: str
    revision: str

    @property
    def name(self) -> str:
        return self.hub.name


class Transport:
    """One worker's connections."""

    def __init__(self, patience: Patience, stop: threading.Event) -> None:
        self._connection = Connection(patience)
        self._stop = stop
        self.current: Stream | None = None

    def close(self) -> None:
        self._connection.close()

    def open(self, source: Source, file: RemoteFile, start: int, end: int) -> Stream:
        """A stream of bytes ``[start, end)``, or of the whole file where the server ignores ranges.

        A redirect is followed anew each time, since signed addresses expire; headers for the hub go to no other host.

        Raises:
            Hiccup: this time.
            HubError: this hub will not give the file.
        """
        hub, whole = source.hub, start == 0 and end == file.size_bytes
        url = hub.url(source.commit, source.revision, file.path)
        answer = self._connection.get(url, None if whole else (start, end), hub.headers, hub.endpoint)
        try:
            _require_ok(source, file, answer)
            first = first_byte(answer, start, end, file.size_bytes)
            _require_same_object(source, file, answer.announced)
        except BaseException:
            answer.response.close()
            raise
        self.current = Stream(answer.response, first)
        return self.current

    def abort(self) -> None:
        """End what this worker waits for. Called by another thread."""
        stream = self.current
        if stream is not None:
            stream.abort()


def _require_ok(source: Source, file: RemoteFile, answer: Answer) -> None:
    status = answer.status
    if status in (200, 206):
        return
    where = f"{source.name}: {source.hub.repo}: {file.path}"
    if status in TRANSIENT or status >= 500:
        raise Hiccup(f"HTTP {status}", after_s=wait_from_headers(answer.headers))
    if not answer.at_home:  # a signed address that expired, as a rule: the hub gives a fresh one
        raise Hiccup(f"HTTP {status} after a redirect")
    if status == 416:
        raise Hiccup("the range is not in the file, so the object is another one")
    if status in (401, 403):
        raise AccessError(
            f"access refused (HTTP {status})", where=where, fix="Log in with the hub's client, or ask for access."
        )
    if status in (404, 410):
        raise RepositoryError(f"no such file (HTTP {status})", where=where)
    raise UnreachableError(f"an unexpected answer (HTTP {status})", where=where)


def _require_same_object(source: Source, file: RemoteFile, announced: str | None) -> None:
    """Hubs call an object by its checksum. Where it is another than the listed one, not a byte need be fetched."""
    if announced is None or not _HEX.fullmatch(announced):
        return
    expected = file.sha256 if len(announced) == 64 else file.git_sha1
    if expected is not None and announced != expected:
        raise ContentError(
            "the hub has another object there than it listed",
            where=f"{source.name}: {source.hub.repo}: {file.path}",
            expected=expected,
            found=announced,
            fix="It was replaced, or the listing is wrong. Run fetch again later, or name another --hub.",
        )
