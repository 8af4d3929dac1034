"""A Ray cluster: found, reached, its nodes. The only module that imports ray."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from weightkit.errors import ClusterError

#: How long the head of a cluster may take to answer.
ANSWER_S = 5.0
#: An object store as small as Ray allows: tasks send a few hundred bytes, and no tensors.
STORE_BYTES = 100 << 20
_START = "Start one (`ray start --head`, and `ray start --address HEAD:6379` on other nodes), or use --address local."
#: What every HTTP/2 client begins with, and so every client of gRPC: the preface and an empty SETTINGS frame.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_SETTINGS = 4


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, or a part of one.

    Attributes:
        name: for people: the host, and the beginning of the id.
        ip: how other nodes reach it.
        cpus, gpus, memory_bytes: what Ray may give to tasks there.
    """

    id: str
    name: str
    ip: str
    cpus: float
    gpus: float
    memory_bytes: float


def load() -> Any:
    """The module ``ray``. Raises ``ClusterError`` where it is not installed."""
    # raylets' reports of deaths would go to standard output, between what a command prints for scripts; we tell our own
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")
    try:
        return import_module("ray")
    except ModuleNotFoundError as exc:
        raise ClusterError(
            "Ray is not installed", where="--executor ray", fix="Install it: pip install 'weightkit[ray]'"
        ) from exc


def connect(address: str | None = None) -> Any:
    """``ray``, connected. A process that is connected already stays so, whatever the address.

    Args:
        address: ``HOST:PORT`` of the head, from a node of the cluster; ``local`` to start a cluster of this machine
            alone, which ends with this process; None for what ``RAY_ADDRESS`` names or runs on this machine.

    Raises:
        ClusterError: no cluster, no answer, or one that this process cannot join.
    """
    ray = load()
    if ray.is_initialized():
        return ray
    found = "local" if address == "local" else find(ray, address)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if found == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options |= {"include_dashboard": False, "object_store_memory": STORE_BYTES}
    else:
        require_answer(found)
    with _signals_kept():
        try:
            ray.init(address=found, **options)
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as exc:
            raise _refusal(exc, found) from exc
    return ray


def nodes(ray: Any) -> list[Node]:
    """The nodes that are alive."""
    found = []
    for node in ray.nodes():
        if node["Alive"]:
            resources = node["Resources"]
            found.append(
                Node(
                    node["NodeID"],
                    f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})",
                    node["NodeManagerAddress"],
                    resources.get("CPU", 0.0),
                    resources.get("GPU", 0.0),
                    resources.get("memory", 0.0),
                )
            )
    return found


def find(ray: Any, address: str | None) -> str:
    """The address of the head as ``HOST:PORT``; see ``connect``. Raises ``ClusterError`` where none is known."""
    given = address or os.environ.get("RAY_ADDRESS")
    if given and "://" in given:
        raise ClusterError(
            "Ray's client protocol is not enough: this process must see the files that it names",
            where=given,
            expected="HOST:PORT of the head",
            fix="Run the command on a node of the cluster.",
        )
    found = given or "auto"
    with suppress(Exception):  # not public: without it ray.init itself finds what there is, and the address of loopback
        found = ray._private.services.canonicalize_bootstrap_address(found)
    if found is None:
        raise ClusterError("no Ray cluster runs on this machine, and RAY_ADDRESS is not set", fix=_START)
    return str(found)


def require_answer(address: str) -> None:
    """Ask the head for the first bytes of its protocol: ray.init itself would try for minutes.

    Raises:
        ClusterError: nobody answers within ``ANSWER_S``, or somebody else does.
    """
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if not host or not port.isdigit():
        raise ClusterError("not an address", where="--address", expected="HOST:PORT", found=address)
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S) as line:
            if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
                return
            line.sendall(_HELLO)
            answer = line.recv(9)
    except (OSError, OverflowError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise ClusterError(f"no Ray cluster can be reached ({reason})", where=address, fix=_START) from exc
    if len(answer) < 4 or answer[3] != _SETTINGS:
        raise ClusterError("what answers there is not the head of a Ray cluster", where=address, fix=_START)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """ray.init takes SIGTERM over and exits on it; here it stops a command as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _refusal(error: BaseException, address: str) -> ClusterError:
    """Why the head does not take this process."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    if any("AuthenticationError" in f"{type(cause).__name__}: {cause}" for cause in causes):
        return ClusterError(
            "the cluster asks for a token",
            where=address,
            fix="Set RAY_AUTH_MODE=token, with the cluster's token in ~/.ray/auth_token (`ray get-auth-token`).",
        )
    return ClusterError(
        f"the cluster cannot be joined ({_first_line(error)})",
        where=address,
        fix="Run the command on a node of the cluster, with the same versions of Ray and Python.",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
