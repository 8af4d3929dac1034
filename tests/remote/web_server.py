"""A web server on loopback: the files of a folder, with ranges and entity tags, and whatever a test has it do wrong."""

from __future__ import annotations

import base64
import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Web:
    """What the server does.

    Attributes:
        folder: what it serves below ``/models/tiny/``.
        ranges: whether it honours Range.
        tags: whether it sends entity tags.
        page: sent for the folder itself, as HTML; None for 404.
        password: of the user ``me``; empty for none.
        statuses: answers in place of the next ones for paths that end so: (ending, status, headers).
        cuts: bytes after which the next bodies of .safetensors end early.
        requests: path and Range of each request that came.
    """

    folder: Path
    ranges: bool = True
    tags: bool = True
    page: str | None = None
    password: str = ""
    statuses: list[tuple[str, int, dict[str, str]]] = field(default_factory=list)
    cuts: list[int] = field(default_factory=list)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, path: str) -> tuple[str, int, dict[str, str]] | None:
        with self._lock:
            found = next((item for item in self.statuses if path.endswith(item[0])), None)
            if found is not None:
                self.statuses.remove(found)
            return found

    def cut(self, path: str, size_bytes: int) -> int | None:
        """After how many bytes a body of this size ends early; None where it does not."""
        with self._lock:
            due = self.cuts and path.endswith(".safetensors") and size_bytes > self.cuts[0]
            return self.cuts.pop(0) if due else None


@contextmanager
def web_server(folder: Path) -> Iterator[Web]:
    """Serve while the block lasts."""
    web = Web(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            spelled = self.headers.get("Range")
            web.requests.append((self.path, spelled))
            fault = web.fault(self.path)
            if fault is not None:
                return self.answer(fault[1], b"", fault[2])
            expected = "Basic " + base64.b64encode(f"me:{web.password}".encode()).decode()
            if web.password and self.headers.get("Authorization") != expected:
                return self.answer(401, b"who?", {"WWW-Authenticate": "Basic"})
            name = self.path.removeprefix("/models/tiny/")
            if not name and web.page is not None:
                return self.answer(200, web.page.encode(), {"Content-Type": "text/html; charset=utf-8"})
            path = web.folder / name
            if not name or name == self.path or not path.is_file():
                return self.answer(404, b"no", {})
            self.send(path.read_bytes(), spelled if web.ranges else None)

        def send(self, content: bytes, spelled: str | None) -> None:
            headers = {"ETag": f'"{hashlib.md5(content).hexdigest()}"'} if web.tags else {}
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", spelled or "")
            if asked is None:
                return self.answer(200, content, headers)
            begin, end = int(asked[1]), min(int(asked[2]), len(content) - 1)
            if begin >= len(content):
                return self.answer(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
            self.answer(206, content[begin : end + 1], headers)

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            cut = web.cut(self.path, len(body))
            self.close_connection |= cut is not None
            self.wfile.write(body[:cut])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    web.url = f"http://127.0.0.1:{server.server_address[1]}/models/tiny"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
