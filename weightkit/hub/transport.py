"""One response's bytes: redirects, ranges, status codes, stalls. What can be tried again is told from what cannot."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

from weightkit.errors import AccessError, ContentError, RepositoryError, UnreachableError
from weightkit.hub.clients import Hub, origin_of
from weightkit.hub.listing import RemoteFile
from weightkit.hub.patience import Hiccup, Patience, wait_from_headers

if TYPE_CHECKING:
    import requests

MAX_REDIRECTS = 8
_VERSION = version("weightkit")
_CONTENT_RANGE = re.compile(r"bytes\s+(\d+)-(\d+)/(\d+|\*)")
_HEX = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True)
class Source:
    """A repository on a hub at the commit that was listed."""

    hub: Hub
    commit: str
    revision: str

    @property
    def name(self) -> str:
        return self.hub.name


class Stream:
    """The body of one response, from byte ``start`` of the file on.

    ``etag`` names the object on the host ``host``; ``whole`` says that the body is the whole file, asked for or not.
    """

    def __init__(self, response: requests.Response, start: int, etag: str | None) -> None:
        self.start, self.etag = start, etag
        self.host = origin_of(response.url)[1]
        self.whole = response.status_code == 200
        self._response, self._raw = response, response.raw
        # Asked for plain bytes, and yet: a server may compress what it takes for text.
        self._decode = bool(response.headers.get("Content-Encoding"))

    def read(self, count: int) -> bytes:
        """Up to ``count`` bytes, as soon as there are any; none at the end. Raises ``Hiccup``."""
        try:
            return bytes(self._raw.read1(count, decode_content=self._decode))
        except (_http_error(), OSError, ValueError, AttributeError) as exc:
            # ValueError and AttributeError: the response was shut by another thread.
            raise Hiccup(_words(exc)) from exc

    def close(self, *, reusable: bool = False) -> None:
        """End it. A connection that was read to the end of the body is kept for the next request."""
        with suppress(Exception):
            if not reusable:
                self._raw.close()
            self._response.close()

    def abort(self) -> None:
        """End a read that another thread is blocked in."""
        with suppress(Exception):
            self._raw.shutdown()


class Transport:
    """One worker's connections."""

    def __init__(self, patience: Patience, stop: threading.Event) -> None:
        import requests  # not before it is needed: a finished target is found finished without it

        self._timeout = (patience.connect_s, patience.stall_s)
        self._stop = stop
        self._session = requests.Session()
        # Without a hook of its own, requests would look for passwords in ~/.netrc and replace the token by them.
        self._session.auth = lambda request: request
        self.current: Stream | None = None

    def close(self) -> None:
        self._session.close()

    def open(self, source: Source, file: RemoteFile, start: int, end: int) -> Stream:
        """A stream of bytes ``[start, end)``, or of the whole file where the server ignores ranges.

        A redirect is followed anew each time, since signed addresses expire; headers for the hub go to no other host.

        Raises:
            Hiccup: this time.
            HubError: this hub will not give the file.
        """
        whole = start == 0 and end == file.size_bytes
        response, at_hub, announced = self._follow(source, file, None if whole else (start, end))
        try:
            _require_ok(source, file, response, at_hub)
            first = _first_byte(file, response, start, end)
            _require_same_object(source, file, announced)
        except BaseException:
            response.close()
            raise
        stream = Stream(response, first, response.headers.get("ETag"))
        self.current = stream
        return stream

    def abort(self) -> None:
        """End what this worker waits for. Called by another thread."""
        stream = self.current
        if stream is not None:
            stream.abort()

    def _follow(
        self, source: Source, file: RemoteFile, span: tuple[int, int] | None
    ) -> tuple[requests.Response, bool, str | None]:
        """The response after all redirects, whether the hub itself gave it, and what the hub calls the object."""
        url = source.hub.url(source.commit, source.revision, file.path)
        home = origin_of(source.hub.endpoint)
        announced: str | None = None
        for _ in range(MAX_REDIRECTS):
            at_hub = origin_of(url) == home
            headers = {"User-Agent": f"weightkit/{_VERSION}", "Accept-Encoding": "identity"}
            headers |= {"Range": f"bytes={span[0]}-{span[1] - 1}"} if span is not None else {}
            headers |= dict(source.hub.headers()) if at_hub else {}
            response = self._get(url, headers)
            if at_hub:
                tag = response.headers.get("X-Linked-ETag") or response.headers.get("ETag") or ""
                announced = tag.removeprefix("W/").strip('"') or announced
            location = response.headers.get("Location")
            if response.status_code not in _REDIRECTS or not location:
                return response, at_hub, announced
            response.close()
            url = urljoin(url, location)
            if origin_of(url)[0] not in ("http", "https"):
                raise Hiccup("a redirect to what is no web address")
        raise Hiccup("too many redirects")

    def _get(self, url: str, headers: Mapping[str, str]) -> requests.Response:
        from requests import exceptions

        try:
            return self._session.get(
                url, headers=dict(headers), stream=True, allow_redirects=False, timeout=self._timeout
            )
        except (exceptions.ConnectTimeout, exceptions.ConnectionError) as exc:
            raise Hiccup(_words(exc), unreachable=True) from exc
        except (exceptions.RequestException, _http_error(), OSError, ValueError) as exc:
            raise Hiccup(_words(exc)) from exc
        finally:
            self._session.cookies.clear()  # a server's cookies are no business of the next request


def _require_ok(source: Source, file: RemoteFile, response: requests.Response, at_hub: bool) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    where = f"{source.name}: {source.hub.repo}: {file.path}"
    if status in (408, 425, 429) or status >= 500:
        raise Hiccup(f"HTTP {status}", after_s=wait_from_headers(response.headers))
    if not at_hub:  # a signed address that expired, as a rule: the hub gives a fresh one
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


def _first_byte(file: RemoteFile, response: requests.Response, start: int, end: int) -> int:
    """Where the body begins. Raises ``Hiccup`` where it is not of a file of this size."""
    if response.status_code == 206:
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
        if found is None or int(found[1]) != start or int(found[2]) >= end:
            raise Hiccup(f"another range than asked for ({response.headers.get('Content-Range')})")
        if found[3] != "*" and int(found[3]) != file.size_bytes:
            raise Hiccup(f"the object has {int(found[3]):,} bytes, not {file.size_bytes:,}")
        return start
    length = response.headers.get("Content-Length")
    # Less than the file is taken: the rest is asked for then. More is another object.
    encoded = bool(response.headers.get("Content-Encoding"))
    if length is not None and length.isdigit() and not encoded and int(length) > file.size_bytes:
        raise Hiccup(f"the object has {length} bytes, not {file.size_bytes:,}")
    return 0


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


def _http_error() -> type[Exception]:
    from urllib3.exceptions import HTTPError

    return HTTPError


def _words(error: BaseException) -> str:
    """An error for people: the innermost cause says most."""
    inner: Any = error
    while (deeper := getattr(inner, "reason", None) or inner.__cause__ or inner.__context__) is not None:
        if not isinstance(deeper, BaseException):
            break
        inner = deeper
    return f"{type(inner).__name__}: {inner}" if str(inner) else type(inner).__name__
