"""HTTP by hand: paths go out as they are written, and whatever comes back is kept."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass, field
from email.message import Message
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Got:
    """An answer.

    Attributes:
        status: 0 where there was none.
        body: as far as it came.
        error: the exception that ended the connection, or ``short`` for a body that is not as long as announced.
    """

    status: int = 0
    headers: Message = field(default_factory=Message)
    body: bytes = b""
    error: str | None = None

    def json(self) -> Any:
        return json.loads(self.body)


def get(url: str, headers: dict[str, str] | None = None, *, method: str = "GET", data: bytes | None = None) -> Got:
    """One request on a connection of its own; no redirect is followed, nothing is normalised."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
    got, body = Got(), bytearray()
    try:
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        connection.request(method, target, data, headers or {})
        response = connection.getresponse()
        got.status, got.headers = response.status, response.headers
        while chunk := response.read1(1 << 16):
            body += chunk
        if response.length:
            got.error = "short"
    except (OSError, http.client.HTTPException) as exc:
        got.error = type(exc).__name__
    finally:
        connection.close()
    got.body = bytes(body)
    return got
