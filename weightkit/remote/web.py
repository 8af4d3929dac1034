"""One response over HTTP: redirects, ranges, stalls. What can be tried again is told from what cannot."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from weightkit.remote.patience import Hiccup, Patience
from weightkit.version import __version__

if TYPE_CHECKING:
    import requests

MAX_REDIRECTS = 8
_CONTENT_RANGE = re.compile(r"bytes\s+(\d+)-(\d+)/(\d+|\*)")
_REDIRECTS = (301, 302, 303, 307, 308)
#: What may be otherwise the next time.
TRANSIENT = (408, 425, 429)


def origin_of(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port: what a token may be sent to. Raises ``Hiccup`` for what is no URL."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError as exc:
        raise Hiccup(f"a malformed address ({exc})") from exc
    return parts.scheme, parts.hostname, port


@dataclass(frozen=True)
class Answer:
    """A response after all redirects.

    Attributes:
        at_home: whether the host that was asked gave it, rather than one that it named.
        announced: what that host calls the object.
    """

    response: requests.Response
    at_home: bool
    announced: str | None

    @property
    def status(self) -> int:
        return self.response.status_code

    @property
    def headers(self) -> Mapping[str, str]:
        return self.response.headers


class Stream:
    """The body of one response, from byte ``start`` of the file on.

    ``etag`` names the object on the host ``host``; ``whole`` says that the body is the whole file, asked for or not.
    """

    def __init__(self, response: requests.Response, start: int) -> None:
        self.start, self.etag = start, response.headers.get("ETag")
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
            raise Hiccup(words(exc)) from exc

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


class Connection:
    """One thread's connections.

    Args:
        patience: how long to wait for a connection and for bytes.
        netrc: whether passwords in ~/.netrc are sent to the hosts that they are for.
    """

    def __init__(self, patience: Patience, *, netrc: bool = False) -> None:
        import requests  # not before it is needed

        self._timeout = (patience.connect_s, patience.stall_s)
        self._session = requests.Session()
        if not netrc:
            # Without a hook of its own, requests would look there and replace the token by what it finds.
            self._session.auth = lambda request: request

    def close(self) -> None:
        self._session.close()

    def get(
        self, url: str, span: tuple[int, int] | None, headers: Callable[[], Mapping[str, str]] = dict, home: str = ""
    ) -> Answer:
        """The response after all redirects, its body not read yet.

        Args:
            span: [start, end) of the bytes; None for all.
            headers: sent to the host of ``home``, and to no other: the token, where there is one.
            home: an address; default ``url``.

        Raises ``Hiccup``.
        """
        at, announced = origin_of(home or url), None
        for _ in range(MAX_REDIRECTS):
            at_home = origin_of(url) == at
            sent = {"User-Agent": f"weightkit/{__version__}", "Accept-Encoding": "identity"}
            sent |= {"Range": f"bytes={span[0]}-{span[1] - 1}"} if span is not None else {}
            sent |= dict(headers()) if at_home else {}
            response = self._get(url, sent)
            if at_home:
                tag = response.headers.get("X-Linked-ETag") or response.headers.get("ETag") or ""
                announced = plain_tag(tag) or announced
            location = response.headers.get("Location")
            if response.status_code not in _REDIRECTS or not location:
                return Answer(response, at_home, announced)
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
            raise Hiccup(words(exc), unreachable=True) from exc
        except (exceptions.RequestException, _http_error(), OSError, ValueError) as exc:
            raise Hiccup(words(exc)) from exc
        finally:
            self._session.cookies.clear()  # a server's cookies are no business of the next request


def plain_tag(tag: str) -> str:
    """An entity tag without what stands around it."""
    return tag.removeprefix("W/").strip('"')


def total_of(answer: Answer) -> int | None:
    """The size of the whole file, as a response to a range says it; None where it does not."""
    if answer.status == 206:
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", "").strip())
        return None if found is None or found[3] == "*" else int(found[3])
    if answer.status == 416:  # of an empty file no range can be had
        found = re.fullmatch(r"bytes\s+\*/(\d+)", answer.headers.get("Content-Range", "").strip())
        return None if found is None else int(found[1])
    length = answer.headers.get("Content-Length", "")
    return int(length) if answer.status == 200 and length.isdigit() and not _encoded(answer) else None


def first_byte(answer: Answer, start: int, end: int, size_bytes: int) -> int:
    """Where the body begins. Raises ``Hiccup`` where it is not of a file of this size."""
    if answer.status == 206:
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", "").strip())
        if found is None or int(found[1]) != start or int(found[2]) >= end:
            raise Hiccup(f"another range than asked for ({answer.headers.get('Content-Range')})")
        if found[3] != "*" and int(found[3]) != size_bytes:
            raise Hiccup(f"the object has {int(found[3]):,} bytes, not {size_bytes:,}")
        return start
    length = answer.headers.get("Content-Length")
    # Less than the file is taken: the rest is asked for then. More is another object.
    if length is not None and length.isdigit() and not _encoded(answer) and int(length) > size_bytes:
        raise Hiccup(f"the object has {length} bytes, not {size_bytes:,}")
    return 0


def _encoded(answer: Answer) -> bool:
    return bool(answer.headers.get("Content-Encoding"))


def _http_error() -> type[Exception]:
    from urllib3.exceptions import HTTPError

    return HTTPError


def words(error: BaseException) -> str:
    """An error for people: the innermost cause says most."""
    inner: Any = error
    while (deeper := getattr(inner, "reason", None) or inner.__cause__ or inner.__context__) is not None:
        if not isinstance(deeper, BaseException):
            break
        inner = deeper
    return f"{type(inner).__name__}: {inner}" if str(inner) else type(inner).__name__
