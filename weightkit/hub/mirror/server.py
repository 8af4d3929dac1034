"""The application on a socket: until Ctrl-C, or in a thread for as long as a block lasts."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from weightkit.errors import PlanError

#: More connections than this at once are told to come again: each holds memory.
MAX_CONNECTIONS = 256


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address, which takes connections once the server runs: until then they are refused, not
    left waiting. Raises ``PlanError`` for an address that cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
        return listener
    except OSError as exc:
        raise PlanError(
            f"cannot listen there ({exc.strerror or exc})",
            where=f"{host}:{port}",
            fix="Choose another --port; --host must be an address of this machine.",
        ) from exc


def endpoint_of(listener: socket.socket) -> str:
    """The URL under which clients reach a listening socket; this machine's name stands for all its addresses."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine reaches it."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


class _Server(uvicorn.Server):
    """Says when it takes connections."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()


def run(app: ASGIApp, listener: socket.socket, *, on_ready: Callable[[], object], log_requests: bool = False) -> None:
    """Serve until a signal, then end at once: clients resume, so there is nothing to wait for.

    ``on_ready`` is called once connections are taken. Raises ``KeyboardInterrupt`` for SIGINT, as Python does.
    """
    _Server(_config(app, log_requests=log_requests), on_ready).run(sockets=[listener])


@contextmanager
def in_thread(
    app: ASGIApp, listener: socket.socket, *, http: type[asyncio.Protocol] | str = "auto"
) -> Iterator[uvicorn.Server]:
    """Serve in a thread while the block lasts."""
    server = uvicorn.Server(_config(app, http=http))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True, name="mirror")
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise RuntimeError("the mirror's thread ended while it was starting")
            time.sleep(0.005)
        yield server
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def _config(app: ASGIApp, *, log_requests: bool = False, http: type[asyncio.Protocol] | str = "auto") -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_level="info" if log_requests else "critical",
        access_log=log_requests,
        http=http,
        ws="none",
        lifespan="off",
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=0,
        h11_max_incomplete_event_size=64 << 10,
    )
