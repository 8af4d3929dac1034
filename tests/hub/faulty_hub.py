"""The loopback hub of the tests: the mirror that ships, with faults put between it and its client.

    with FaultyHub({"org/name": folder}) as hub:
        hub.fail(Cut(after=100_000), path="*.safetensors", times=None)      # each body, always
        hub.fail(rate_limited(1), route="metadata", protocol="huggingface")  # the next question, once
        ...  # a client with HF_ENDPOINT=hub.endpoint or MODELSCOPE_ENDPOINT=hub.endpoint
        assert hub.sent_bytes() < 1.1 * size

Rules are tried in the order given; each that matches and has occurrences left is applied, so a throttle and a cut
combine. What depends on a place in a file (``at=``) counts as an occurrence only where a response reaches that place.

As a process of its own, for tests that kill: ``with spawn_hub({"org/name": folder}) as hub`` (the same calls, over
HTTP), or ``python tests/hub/faulty_hub.py org/name=FOLDER --port 8090``.
"""

from __future__ import annotations

import argparse
import asyncio
import fnmatch
import hashlib
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

import uvicorn
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from weightkit.hub.mirror import Catalog, Repository, hash_folder
from weightkit.hub.mirror.app import build_app
from weightkit.hub.mirror.catalog import NoRepository, NoRevision
from weightkit.hub.mirror.server import endpoint_of, in_thread, listen

#: Routes by the words that rules use. ``signed`` is the storage host that ``Redirect`` leads to.
METADATA = ("info", "tree", "paths-info", "refs", "revisions")
ROUTES = (*METADATA, "head", "body", "signed")

_HF_API = re.compile(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree|paths-info|refs)(?:/.*)?)?")
_HF_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", re.DOTALL)
_MS_API = re.compile(r"/api/v1/models/([^/]+/[^/]+?)(?:/(revisions|repo/files|repo))?")
_SIGNED = re.compile(r"/signed/([0-9a-f]+)(/.+)", re.DOTALL)


# --- faults ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """Base of all; ``fail`` says when it happens."""


@dataclass(frozen=True)
class Status(Fault):
    """An answer instead of the real one; with 200, a body that is not what was asked for."""

    code: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = "a fault of the tests' hub"
    error_code: str | None = None


@dataclass(frozen=True)
class Delay(Fault):
    """Seconds before the answer begins."""

    seconds: float


@dataclass(frozen=True)
class Gather(Fault):
    """No answer begins before so many requests wait for theirs."""

    count: int


@dataclass(frozen=True)
class IgnoreRange(Fault):
    """The whole file with 200, whatever range was asked for."""


@dataclass(frozen=True)
class NoLength(Fault):
    """No Content-Length: the body is chunked, and ends when it ends."""


@dataclass(frozen=True)
class Short(Fault):
    """A well-formed answer that is ``by`` bytes short of the file, Content-Length included."""

    by: int = 1


@dataclass(frozen=True)
class Throttle(Fault):
    """A response at so many bytes a second, in small pieces: what was sent is what the client has, to within one.

    Attributes:
        after: bytes that come at full speed before.
    """

    bytes_per_s: float
    piece_bytes: int = 16 << 10
    after: int = 0


@dataclass(frozen=True)
class Redirect(Fault):
    """302 to the storage host, with a signature that expires.

    Attributes:
        lifetime_s: seconds until the signed URL answers 403; None for never.
        uses: requests that it answers; None for any number.
        host: under which name the storage host is reached.
    """

    lifetime_s: float | None = None
    uses: int | None = None
    host: str = "localhost"


@dataclass(frozen=True)
class Placed(Fault):
    """Happens after so many bytes of a response, or at a place in the file that a response reaches."""

    after: int | None = None
    at: int | None = None

    def place(self, start: int, stop: int) -> int | None:
        """Where in the file it happens to a response with bytes [start, stop), or None."""
        place = self.at if self.at is not None else start + (self.after or 0)
        return place if start <= place < stop else None


@dataclass(frozen=True)
class Cut(Placed):
    """The connection ends (FIN) before the announced length."""


@dataclass(frozen=True)
class Reset(Placed):
    """The connection ends with RST."""


@dataclass(frozen=True)
class Flip(Placed):
    """The lowest bit of one byte is wrong."""


@dataclass(frozen=True)
class Stall(Placed):
    """Nothing comes for so many seconds, and then the rest."""

    seconds: float = 3600.0


@dataclass(frozen=True)
class Swap(Placed):
    """The object is replaced by another of the same size, and the connection cut: the next request meets the new one.

    Attributes:
        moves_branch: whether that is a new commit, while the old one still serves the old bytes; otherwise the old
            commit itself now has other bytes, ETag and hash.
    """

    moves_branch: bool = False


FAULTS: Mapping[str, type[Fault]] = {
    kind.__name__: kind
    for kind in (Status, Delay, Gather, IgnoreRange, NoLength, Short, Throttle, Redirect, Cut, Reset, Flip, Stall, Swap)
}


def rate_limited(seconds: int, *, style: str = "retry-after") -> Status:
    """429, with the time to wait in ``Retry-After`` or, as the Hugging Face hub does, in ``RateLimit`` alone."""
    headers = {"Retry-After": str(seconds)} if style == "retry-after" else {}
    if style == "ratelimit":
        headers = {"RateLimit": f'"api";r=0;t={seconds}', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
    return Status(429, headers, "slow down")


def gated(code: int = 403) -> Status:
    """A gated repository: 401 without a token, 403 with one that may not read it."""
    return Status(code, {"X-Error-Message": "Access to this model is restricted."}, "gated", "GatedRepo")


@dataclass
class Rule:
    """When a fault happens: ``left`` occurrences (None: always) after the first ``skip``, of requests that match;
    ``taken`` so far."""

    fault: Fault
    routes: tuple[str, ...]
    path: str
    protocol: str | None
    left: int | None
    skip: int
    taken: int = 0

    def matches(self, exchange: Exchange) -> bool:
        return (
            exchange.route in self.routes
            and self.left != 0
            and (self.protocol is None or self.protocol == exchange.protocol)
            and (self.path == "*" or fnmatch.fnmatchcase(exchange.path, self.path))
        )

    def take(self) -> bool:
        """Whether it happens this time."""
        if self.skip:
            self.skip -= 1
            return False
        if self.left is not None:
            self.left -= 1
        self.taken += 1
        return True


@dataclass
class Exchange:
    """One request and what came of it.

    Attributes:
        server: ``hub``, or ``storage``, the host that ``Redirect`` leads to.
        protocol: ``huggingface`` or ``modelscope``; of a signed URL, the one that redirected.
        route: one of ``ROUTES``, or ``other``.
        path: of the file; empty for metadata.
        range: the Range header.
        authorization: the Authorization header.
        status: 0 until the answer begins.
        sent_bytes: of the body, as given to the socket.
    """

    at_s: float
    server: str
    protocol: str
    route: str
    method: str
    repo: str
    path: str
    range: str | None
    authorization: str | None
    cookie: str | None
    status: int = 0
    sent_bytes: int = 0
    finished: bool = False


# --- the hub --------------------------------------------------------------------------------------------------------


class _Shelf(Catalog):
    """A catalog whose repositories can move on to new commits, the old ones staying reachable."""

    def __init__(self, repositories: Sequence[Repository]) -> None:
        super().__init__(repositories)
        self.states = {name: [repository] for repository in repositories for name in repository.ids}

    def __iter__(self) -> Iterator[tuple[str, Repository]]:
        return ((name, states[0]) for name, states in self.states.items())

    def find(self, name: str, revision: str) -> Repository:
        if name not in self.states:
            raise NoRepository("no such repository", where=name)
        for state in self.states[name]:
            if state.answers_to(revision):
                return state
        raise NoRevision("no such revision", where=name)


class FaultyHub:
    """Serves folders under ids on a free loopback port.

    Args:
        folders: path by ``owner/name``; every file that is not hidden is served, whatever it is.
        port: 0 for a free one.
        page_size: entries a page of a Hugging Face listing.
        token: what the Authorization header must carry; without it, 401 as for a gated repository.
    """

    def __init__(
        self, folders: Mapping[str, Path | str], *, port: int = 0, page_size: int = 1000, token: str | None = None
    ) -> None:
        self._shelf = _Shelf([hash_folder(Path(folder), [name]) for name, folder in folders.items()])
        self._token = token
        self._rules: list[Rule] = []
        self._edits: dict[str, dict[str, Any]] = {}
        self._added: dict[str, bytes] = {}
        self._signed: dict[str, tuple[str, float, int | None]] = {}
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        self._under_way = 0
        #: How often all faults were cleared.
        self.cleared = 0
        self._port, self._storage_port = port, 0
        self._reserved: list[socket.socket] = []
        self._running: ExitStack | None = None
        self._servers: list[uvicorn.Server] = []
        self._replaced = tempfile.TemporaryDirectory(prefix="faulty-hub-")
        self._app = build_app(self._shelf, page_size=page_size)
        self.log: list[Exchange] = []

    def __enter__(self) -> FaultyHub:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for reserved in self._reserved:
            reserved.close()
        self._replaced.cleanup()

    def start(self) -> None:
        """Listen; after ``stop``, on the same port again."""
        hub, storage = listen("127.0.0.1", self._port), listen("127.0.0.1", self._storage_port)
        self._port, self._storage_port = hub.getsockname()[1], storage.getsockname()[1]
        if not self._reserved:  # bound beside the listeners, so that nobody is given the ports while the hub is down
            self._reserved = [listen("127.0.0.1", port) for port in (self._port, self._storage_port)]
        self.endpoint = endpoint_of(hub)
        self._running = ExitStack()
        self._servers = [
            self._running.enter_context(in_thread(_Middleware(self, name), listener, http=_Protocol))
            for name, listener in (("hub", hub), ("storage", storage))
        ]

    def stop(self) -> None:
        """Down: connections are refused, open ones end."""
        if self._running is not None:
            for server in self._servers:
                server.should_exit = True  # both at once: each takes a moment
            self._running.close()
            self._running = None

    # what a test says

    def fail(
        self,
        fault: Fault,
        *,
        route: str | Sequence[str] = "body",
        path: str = "*",
        times: int | None = 1,
        skip: int = 0,
        protocol: str | None = None,
    ) -> None:
        """Let a fault happen.

        Args:
            fault: what.
            route: one of ``ROUTES``, several, ``metadata`` for all that list, or ``*`` for all.
            path: a pattern of the files' paths; metadata has the empty path.
            times: how often; None for always.
            skip: how many matching requests go well first.
            protocol: ``huggingface`` or ``modelscope``; None for both.
        """
        routes = {"metadata": METADATA, "*": ROUTES}.get(route, (route,)) if isinstance(route, str) else tuple(route)
        if unknown := set(routes) - set(ROUTES):
            raise ValueError(f"no such route: {unknown}")
        with self._lock:
            self._rules.append(Rule(fault, routes, path, protocol, times, skip))

    def clear(self) -> None:
        """No faults and no edits any more, and answers that are slow or stalled go on at full speed; the log stays."""
        with self._lock:
            self.cleared += 1
            self._rules.clear()
            self._edits.clear()
            self._added.clear()

    def edit_listing(self, path: str, **changes: Any) -> None:
        """Let listings lie about a file: ``sha256=``, ``size=``, ``oid=`` (git's SHA-1), ``path=``, ``drop=True``."""
        with self._lock:
            self._edits.setdefault(path, {}).update(changes)

    def add_to_listing(self, path: str, content: bytes = b"planted") -> None:
        """List a file that no folder has, such as ``../../outside``, and serve ``content`` for it."""
        with self._lock:
            self._added[path] = content

    def replace(self, name: str, path: str, content: bytes | None = None, *, moves_branch: bool = True) -> str:
        """Put another content (default: random, of the same size) at a path; the commit that ``main`` is then."""
        with self._lock:
            head = self._shelf.states[name][0]
            size = head.files[path].size_bytes
            data = random.randbytes(size) if content is None else content
            folder = Path(tempfile.mkdtemp(dir=self._replaced.name))
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
            new = hash_folder(folder, [name]).files[path]
            changed = Repository(head.ids, head.folder, {**head.files, path: new})
            if moves_branch:
                self._shelf.states[name].insert(0, changed)
            else:
                state = replace(changed, revisions=head.revisions | {head.commit})
                state.__dict__["commit"] = head.commit  # the very lie: another content, the same commit
                self._shelf.states[name][0] = state
            return self._shelf.states[name][0].commit

    # what a test asks

    def commit(self, name: str) -> str:
        """The commit that the branch points to."""
        return self._shelf.states[name][0].commit

    def requests(self, **wanted: object) -> list[Exchange]:
        """Exchanges whose fields equal ``wanted``; ``path`` is a pattern."""
        path = str(wanted.pop("path", "*"))
        with self._lock:
            return [
                exchange
                for exchange in self.log
                if (path == "*" or fnmatch.fnmatchcase(exchange.path, path))
                and all(getattr(exchange, key) == value for key, value in wanted.items())
            ]

    def sent_bytes(self, path: str = "*") -> int:
        """Bytes of files that were sent, by pattern of their path."""
        bodies = [e for e in self.requests(path=path) if e.route in ("body", "signed") and e.status in (200, 206)]
        return sum(exchange.sent_bytes for exchange in bodies)

    def settle(self) -> None:
        """Wait until no answer is under way, so that what was sent is all that will have been."""
        with self._idle:
            assert self._idle.wait_for(lambda: not self._under_way, 120)

    # what the middleware asks

    def _begin(self, exchange: Exchange) -> list[Rule]:
        with self._lock:
            self._under_way += 1
            self.log.append(exchange)
            return [rule for rule in self._rules if rule.matches(exchange)]

    def _end(self) -> None:
        with self._idle:
            self._under_way -= 1
            self._idle.notify_all()

    def _admits(self, exchange: Exchange) -> bool:
        return self._token is None or exchange.authorization == f"Bearer {self._token}"

    def _sign(self, target: str, fault: Redirect) -> str:
        token = os.urandom(8).hex()
        expires = float("inf") if fault.lifetime_s is None else time.monotonic() + fault.lifetime_s
        with self._lock:
            self._signed[token] = (target, expires, fault.uses)
        return f"http://{fault.host}:{self._storage_port}/signed/{token}{quote(target, safe='/?=&%')}"

    def _use_signed(self, token: str) -> bool:
        with self._lock:
            target, expires, uses = self._signed.get(token, ("", 0.0, None))
            if time.monotonic() >= expires or uses == 0:
                return False
            self._signed[token] = (target, expires, None if uses is None else uses - 1)
            return True


class _Protocol(H11Protocol):
    """Lets the middleware find the connection of a request."""

    transports: dict[tuple[Any, Any], asyncio.Transport] = {}  # noqa: RUF012 - one for all, on purpose

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.transports[self.client, self.server] = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.transports.pop((self.client, self.server), None)
        super().connection_lost(exc)


class _Middleware:
    """Between the server and the mirror's application."""

    def __init__(self, hub: FaultyHub, server: str) -> None:
        self._hub, self._server = hub, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith("/-/"):
            await _control(self._hub, scope, receive, send)
            return
        exchange = _exchange(scope, self._server)
        rules = self._hub._begin(exchange)
        try:
            await _Answer(self._hub, scope, exchange, rules, receive, send).run()
        finally:
            self._hub._end()


class _Answer:
    """One request on its way through the rules that match it."""

    def __init__(
        self, hub: FaultyHub, scope: Scope, exchange: Exchange, rules: list[Rule], receive: Receive, send: Send
    ) -> None:
        self.hub, self.scope, self.exchange, self.rules = hub, scope, exchange, rules
        self.receive, self._send = receive, send
        self.ended = asyncio.Event()
        self.cleared = hub.cleared
        self.placed: list[tuple[int, Placed]] = []
        self.position = 0
        self.left: int | None = None
        self.rate: Throttle | None = None
        self.json: bytearray | None = None
        self.start: Message = {}

    async def run(self) -> None:
        if self.exchange.server == "storage":
            match = _SIGNED.fullmatch(self.scope["path"])
            if match is None or not self.hub._use_signed(match[1]):
                await self.reply(Status(403, {}, "<Error><Code>AccessDenied</Code>Request has expired</Error>"))
                return
            self.scope = {**self.scope, "path": match[2]}
        if self.exchange.server == "hub" and not self.hub._admits(self.exchange):
            await self.reply(gated(401))
            return
        for rule in self.rules:
            if await self.before(rule):
                return
        planted = self.hub._added.get(self.exchange.path)
        if planted is not None:
            await self.reply(
                Status(200, {"ETag": f'"{hashlib.sha256(planted).hexdigest()}"'}, planted.decode("latin-1"))
            )
            return
        await self.hub._app(self.scope, self.hear, self.tell)

    async def before(self, rule: Rule) -> bool:
        """Faults that show before the application is asked; whether they are the whole answer."""
        match rule.fault:
            case Status() as fault if rule.take():
                await self.reply(fault)
                return True
            case Delay(seconds=seconds) if rule.take():
                await self.sleep(seconds)
            case Gather(count=count) if rule.take():
                while rule.taken < count and self.lasts():
                    await self.sleep(0.01)
            case IgnoreRange() if self.exchange.range is not None and rule.take():
                self.scope = {**self.scope, "headers": [h for h in self.scope["headers"] if h[0] != b"range"]}
            case Redirect() as fault if self.exchange.server == "hub" and rule.take():
                await self.redirect(fault)
                return True
        return False

    async def reply(self, fault: Status) -> None:
        headers = {"Content-Type": "text/plain", **fault.headers}
        if fault.error_code is not None:
            headers["X-Error-Code"] = fault.error_code
        body = fault.body.encode("latin-1", "replace")
        raw = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
        raw.append((b"content-length", str(len(body)).encode()))
        await self.send({"type": "http.response.start", "status": fault.code, "headers": raw})
        await self.send({"type": "http.response.body", "body": body})
        self.exchange.finished = True

    async def redirect(self, fault: Redirect) -> None:
        """The headers of the file itself, as the hub gives them, and the signed address."""
        found: list[Message] = []

        async def keep(message: Message) -> None:
            found.append(message)

        await self.hub._app({**self.scope, "method": "HEAD"}, self.hear, keep)
        target = f"/{self.exchange.repo}/resolve/{_revision(self.scope)}/{self.exchange.path}"
        headers = {k.decode(): v.decode() for k, v in found[0]["headers"]}
        if found[0]["status"] >= 400:
            await self.reply(Status(found[0]["status"], {k: v for k, v in headers.items() if k.startswith("x-")}))
            return
        kept = {k: v for k, v in headers.items() if k in ("x-repo-commit", "x-linked-etag", "x-linked-size", "etag")}
        await self.reply(Status(302, {**kept, "Location": self.hub._sign(target, fault)}, ""))

    async def hear(self) -> Message:
        """What the application receives: the client's messages, or, once the answer is cut, that nobody listens."""
        if self.ended.is_set():
            return {"type": "http.disconnect"}
        incoming = asyncio.ensure_future(self.receive())
        ended = asyncio.ensure_future(self.ended.wait())
        try:
            await asyncio.wait((incoming, ended), return_when=asyncio.FIRST_COMPLETED)
            return incoming.result() if incoming.done() else {"type": "http.disconnect"}
        finally:
            incoming.cancel()
            ended.cancel()

    async def tell(self, message: Message) -> None:
        """What the application sends."""
        if self.ended.is_set():
            return
        if message["type"] == "http.response.start":
            self.start = message
            if self.exchange.route in METADATA and message["status"] == 200 and (self.hub._edits or self.hub._added):
                self.json = bytearray()
                return
            await self.send(self.begin(message))
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if self.json is not None:
            self.json += body
            if not more:
                await self.send_edited(bytes(self.json))
            return
        await self.send_body(body, more)

    def begin(self, message: Message) -> Message:
        """Faults of the body are decided when it is known which bytes it has."""
        headers = {key.lower(): value for key, value in message["headers"]}
        length = int(headers.get(b"content-length", b"0"))
        content_range = re.fullmatch(rb"bytes (\d+)-(\d+)/(\d+)", headers.get(b"content-range", b""))
        self.position = int(content_range[1]) if content_range else 0
        if message["status"] not in (200, 206) or self.exchange.method == "HEAD":
            return message
        stop = self.position + length
        for rule in self.rules:
            match rule.fault:
                case Short(by=by) if length > by and rule.take():
                    stop -= by
                    self.left = length - by
                    headers[b"content-length"] = str(self.left).encode()
                    if content_range:
                        span = f"bytes {self.position}-{stop - 1}/{int(content_range[3])}"
                        headers[b"content-range"] = span.encode()
                case NoLength() if rule.take():
                    headers.pop(b"content-length", None)
                case Throttle() as fault if rule.take():
                    self.rate = fault
                case Placed() as fault if (place := fault.place(self.position, stop)) is not None and rule.take():
                    self.placed.append((place, fault))
        self.placed.sort(key=lambda item: item[0])
        return {**message, "headers": list(headers.items())}

    async def send_body(self, body: bytes, more: bool) -> None:
        if self.left is not None:
            body, more = body[: self.left], more and self.left > len(body)
            self.left -= len(body)
        while self.placed and self.placed[0][0] < self.position + len(body):
            place, fault = self.placed.pop(0)
            split = place - self.position
            if isinstance(fault, Flip):
                body = body[:split] + bytes([body[split] ^ 1]) + body[split + 1 :]
                continue
            await self.send_pieces(body[:split])
            body = body[split:]
            match fault:
                case Stall(seconds=seconds):
                    await self.sleep(seconds)
                case Reset():
                    await self.reset()
                case Swap(moves_branch=moves):
                    self.hub.replace(self.exchange.repo, self.exchange.path, moves_branch=moves)
                    self.ended.set()
                case _:
                    self.ended.set()
            if self.ended.is_set():
                return
        await self.send_pieces(body)
        if not more and not self.ended.is_set():
            await self.send({"type": "http.response.body", "body": b""})
            self.exchange.finished = True
            if self.left is not None:
                self.ended.set()

    async def send_pieces(self, body: bytes) -> None:
        # small pieces even at full speed: what counts as sent should be what the socket took
        size = self.rate.piece_bytes if self.rate is not None else 64 << 10
        for at in range(0, len(body), size):
            piece = body[at : at + size]
            if self.rate is not None and self.exchange.sent_bytes >= self.rate.after:
                await self.sleep(len(piece) / self.rate.bytes_per_s)
            if self.ended.is_set():
                return
            await self.send({"type": "http.response.body", "body": piece, "more_body": True})
            self.position += len(piece)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.exchange.status = message["status"]
        elif self.exchange.method != "HEAD":
            transport = self.transport()
            if transport is not None and transport.is_closing():
                self.ended.set()
                return
            self.exchange.sent_bytes += len(message.get("body", b""))
        await self._send(message)

    async def sleep(self, seconds: float) -> None:
        """Sleep as long as the client is there, and no longer than the faults are."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and self.lasts():
            await asyncio.sleep(min(left, 0.05))
            transport = self.transport()
            if transport is None or transport.is_closing():
                self.ended.set()

    def lasts(self) -> bool:
        """Whether the client is there, and so are the faults."""
        return not self.ended.is_set() and self.cleared == self.hub.cleared

    async def reset(self) -> None:
        transport = self.transport()
        if transport is not None:
            while transport.get_write_buffer_size() and not transport.is_closing():
                await asyncio.sleep(0.005)
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        self.ended.set()

    def transport(self) -> asyncio.Transport | None:
        return _Protocol.transports.get((self.scope["client"], self.scope["server"]))

    async def send_edited(self, raw: bytes) -> None:
        body = json.dumps(self.edited(json.loads(raw))).encode()
        headers = [h for h in self.start["headers"] if h[0] != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self.send({**self.start, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})
        self.exchange.finished = True

    def edited(self, value: Any) -> Any:
        """A listing of either protocol with the hub's edits made."""
        if isinstance(value, list):
            last_page = not any(key == b"link" for key, _ in self.start["headers"])
            return _edit_entries(self.hub, value, "path", added=last_page and self.exchange.route == "tree")
        if "siblings" in value:
            return {**value, "siblings": _edit_entries(self.hub, value["siblings"], "rfilename", added=True)}
        data = value.get("Data") or {}
        if "Files" in data:
            return {**value, "Data": {**data, "Files": _edit_entries(self.hub, data["Files"], "Path", added=True)}}
        return value


def _edit_entries(hub: FaultyHub, entries: list[dict[str, Any]], key: str, *, added: bool) -> list[dict[str, Any]]:
    edited = [_edit(entry, key, hub._edits.get(entry[key], {})) for entry in entries]
    kept = [entry for entry in edited if entry is not None]
    if added:
        kept += [_new_entry(path, content, key) for path, content in hub._added.items()]
    return kept


def _edit(entry: dict[str, Any], key: str, changes: Mapping[str, Any]) -> dict[str, Any] | None:
    if changes.get("drop"):
        return None
    entry = dict(entry)
    lfs = dict(entry["lfs"]) if isinstance(entry.get("lfs"), dict) else None
    for change, new in changes.items():
        if change == "path":
            entry[key] = new
        elif change == "size":
            entry["Size" if key == "Path" else "size"] = new
            if lfs is not None:
                lfs["size"] = new
        elif change == "sha256" and key == "Path":
            entry["Sha256"] = new
        elif change == "sha256" and lfs is not None:
            lfs["sha256" if key == "rfilename" else "oid"] = new
        elif change == "oid" and key != "Path":
            entry["blobId" if key == "rfilename" else "oid"] = new
    return entry if lfs is None else {**entry, "lfs": lfs}


def _new_entry(path: str, content: bytes, key: str) -> dict[str, Any]:
    sha256, size = hashlib.sha256(content).hexdigest(), len(content)
    if key == "Path":
        return {"Path": path, "Name": path.rpartition("/")[2], "Type": "blob", "Size": size, "Sha256": sha256}
    digest = "sha256" if key == "rfilename" else "oid"
    lfs = {digest: sha256, "size": size, "pointerSize": 130}
    if key == "rfilename":
        return {"rfilename": path, "size": size, "blobId": "0" * 40, "lfs": lfs}
    return {"type": "file", "path": path, "size": size, "oid": "0" * 40, "lfs": lfs}


def _exchange(scope: Scope, server: str) -> Exchange:
    headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
    path, method = scope["path"], scope["method"]
    protocol, route, repo, file = "huggingface", "other", "", ""
    if (found := _SIGNED.fullmatch(path)) and (inner := _HF_FILE.fullmatch(found[2])):
        route, repo, file = "signed", inner[1], inner[3]
    elif found := _MS_API.fullmatch(path):
        protocol, repo = "modelscope", found[1]
        route = {None: "info", "revisions": "revisions", "repo/files": "tree"}.get(found[2], "body")
        if route == "body":
            file = parse_qs(scope["query_string"].decode("latin-1")).get("FilePath", [""])[0]
    elif path.startswith("/api/v1/"):
        protocol = "modelscope"
    elif found := _HF_API.fullmatch(path):
        repo, route = found[1], {None: "info", "revision": "info"}.get(found[2], found[2] or "info")
    elif found := _HF_FILE.fullmatch(path):
        repo, route, file = found[1], "body", found[3]
    if route == "body" and method == "HEAD":
        route = "head"
    asked = (headers.get(b"range"), headers.get(b"authorization"), headers.get(b"cookie"))
    return Exchange(time.monotonic(), server, protocol, route, method, repo, file, *asked)


def _revision(scope: Scope) -> str:
    if found := _HF_FILE.fullmatch(scope["path"]):
        return found[2]
    query: str = scope["query_string"].decode("latin-1")
    return parse_qs(query).get("Revision", ["main"])[0]


# --- a process of its own -------------------------------------------------------------------------------------------


async def _control(hub: FaultyHub, scope: Scope, receive: Receive, send: Send) -> None:
    """``/-/NAME``: calls of a ``FaultyHub`` from another process."""
    raw = bytearray()
    while (message := await receive())["type"] == "http.request":
        raw += message.get("body", b"")
        if not message.get("more_body"):
            break
    question = json.loads(raw or b"{}")
    answers: dict[str, Callable[[], Any]] = {
        "log": lambda: [asdict(exchange) for exchange in hub.log],
        "fail": lambda: hub.fail(FAULTS[question.pop("fault")](**question.pop("values")), **question),
        "clear": hub.clear,
        "edit_listing": lambda: hub.edit_listing(**question),
        "sent_bytes": lambda: hub.sent_bytes(**question),
        "commit": lambda: hub.commit(**question),
        "replace": lambda: hub.replace(**question),
    }
    body = json.dumps(answers[scope["path"].removeprefix("/-/")]()).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class SpawnedHub:
    """The calls of a ``FaultyHub`` that runs in another process."""

    def __init__(self, endpoint: str, process: subprocess.Popen[str]) -> None:
        self.endpoint, self.process = endpoint, process

    def _call(self, method: str, /, **question: object) -> Any:
        request = urllib.request.Request(f"{self.endpoint}/-/{method}", json.dumps(question).encode())
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    @property
    def log(self) -> list[Exchange]:
        return [Exchange(**entry) for entry in self._call("log")]

    def fail(self, fault: Fault, **when: Any) -> None:
        values = {item.name: getattr(fault, item.name) for item in fields(fault)}
        self._call("fail", fault=type(fault).__name__, values=values, **when)

    def clear(self) -> None:
        self._call("clear")

    def edit_listing(self, path: str, **changes: Any) -> None:
        self._call("edit_listing", path=path, **changes)

    def sent_bytes(self, path: str = "*") -> int:
        return int(self._call("sent_bytes", path=path))

    def commit(self, name: str) -> str:
        return str(self._call("commit", name=name))


@contextmanager
def spawn_hub(folders: Mapping[str, Path | str], *, port: int = 0) -> Iterator[SpawnedHub]:
    """A ``FaultyHub`` in a process of its own, so that it neither shares our interpreter nor dies with a client."""
    named = [f"{name}={folder}" for name, folder in folders.items()]
    command = [sys.executable, __file__, *named, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            endpoint = process.stdout.readline().strip() if process.stdout is not None else ""
            if not endpoint:
                raise RuntimeError("the hub did not start")
            yield SpawnedHub(endpoint, process)
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folders", nargs="+", metavar="OWNER/NAME=FOLDER")
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    folders = dict(item.split("=", 1) for item in arguments.folders)
    with FaultyHub(folders, port=arguments.port) as hub:
        print(hub.endpoint, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
