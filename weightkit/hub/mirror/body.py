"""A file, or a range of it, as an HTTP response in bounded memory (RFC 9110: ranges, conditions)."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import anyio
from anyio import to_thread
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from weightkit.hub.mirror.contents import ChangedError, ServedFile

#: Read and sent at once: large pieces cost half the processor time of small ones. A connection holds about two of them,
#: one as read or framed and one in the socket's queue.
CHUNK_BYTES = 4 << 20
#: All connections together hold so much as read: of many, each reads less at once.
BUDGET_BYTES = 64 << 20
MIN_CHUNK_BYTES = 256 << 10
_RANGE = re.compile(r"\s*bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*", re.IGNORECASE)
_log = logging.getLogger("weightkit.mirror")


class UnsatisfiableRange(ValueError):  # noqa: N818 - it is an answer, not a failure of ours
    """A range that begins behind the end."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes [start, stop) of a file."""

    start: int
    stop: int


def parse_range(header: str | None, size: int) -> Span | None:
    """The one range that a ``Range`` header asks for; None for the whole file.

    A header in another unit, of several ranges, or that is no range at all is ignored, as RFC 9110 wants it. Raises
    ``UnsatisfiableRange``.
    """
    match = _RANGE.fullmatch(header) if header is not None and len(header) < 128 else None
    if match is None:
        return None
    first, last = match.groups()
    if first:
        start, stop = int(first), int(last) + 1 if last else size
        if last and stop <= start:
            return None
    elif last:
        start, stop = max(0, size - int(last)), size
        if int(last) == 0:
            raise UnsatisfiableRange
    else:
        return None
    if start >= size:
        raise UnsatisfiableRange
    return Span(start, min(stop, size))


def file_response(request: Request, file: ServedFile, headers: Mapping[str, str]) -> Response:
    """The answer to a GET or HEAD for ``file``, with the protocol's own ``headers`` added.

    Raises ``ChangedError`` where the file is no longer the verified one.
    """
    etag = f'"{file.etag}"'
    common = {"ETag": etag, "Accept-Ranges": "bytes", **headers}
    if etag in [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=common)
    condition = request.headers.get("if-range")
    asked = request.headers.get("range") if condition in (None, etag) else None
    try:
        span = parse_range(asked, file.size_bytes)
    except UnsatisfiableRange:
        return Response(status_code=416, headers={**common, "Content-Range": f"bytes */{file.size_bytes}"})
    if span is not None:
        common["Content-Range"] = f"bytes {span.start}-{span.stop - 1}/{file.size_bytes}"
    descriptor = file.open()
    if request.method == "HEAD":
        os.close(descriptor)
        length = file.size_bytes if span is None else span.stop - span.start
        common |= {"Content-Length": str(length), "Content-Type": "application/octet-stream"}
        return Response(status_code=200 if span is None else 206, headers=common)
    return _FileBody(file, descriptor, span or Span(0, file.size_bytes), 200 if span is None else 206, common)


class _FileBody(Response):
    """Sends a span of an open file and closes it; ends early, so that the client notices, when the file changes."""

    media_type = "application/octet-stream"
    #: Files being sent.
    active = 0

    def __init__(
        self, file: ServedFile, descriptor: int, span: Span, status_code: int, headers: Mapping[str, str]
    ) -> None:
        self._file, self._descriptor, self._span = file, descriptor, span
        self.status_code = status_code
        self.background: BackgroundTask | None = None
        self.body = b""
        self.init_headers({**headers, "Content-Length": str(span.stop - span.start)})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        _FileBody.active += 1
        try:
            async with anyio.create_task_group() as group:

                async def stop_when_nobody_listens() -> None:
                    while (await receive())["type"] != "http.disconnect":
                        pass
                    group.cancel_scope.cancel()

                group.start_soon(stop_when_nobody_listens)
                await self._send(send)
                group.cancel_scope.cancel()
        finally:
            _FileBody.active -= 1
            os.close(self._descriptor)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        offset, stop = self._span.start, self._span.stop
        while offset < stop:
            share = max(MIN_CHUNK_BYTES, min(CHUNK_BYTES, BUDGET_BYTES // max(1, _FileBody.active)))
            chunk = await to_thread.run_sync(self._read, offset, min(share, stop - offset))
            if not chunk:
                return  # the response stays short of its Content-Length, and the server drops the connection
            offset += len(chunk)
            await send({"type": "http.response.body", "body": chunk, "more_body": offset < stop})
        if self._span.start == stop:
            await send({"type": "http.response.body", "body": b""})

    def _read(self, offset: int, length: int) -> bytes:
        try:
            chunk = os.pread(self._descriptor, length, offset)
            self._file.check(self._descriptor)  # after the read: what was read before a write is right
        except (ChangedError, OSError) as exc:
            _log.warning("%s: sent in part: %s", self._file.path, exc)
            return b""
        return chunk
