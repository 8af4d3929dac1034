"""Processes on the nodes of a Ray cluster that find each other as torchrun's do, each with a GPU of its own.

Ray reserves the GPUs, starts one task a node and says which node died; the task starts that node's ranks and passes on
what they print. What ranks send each other goes over ``torch.distributed``, not through Ray.
"""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from weightkit.checkpoint.stamp import Stamp
from weightkit.cluster.connection import Node, connect, nodes
from weightkit.cluster.crew import of_node, on_node
from weightkit.cluster.sight import SHARE, require_build, require_seen
from weightkit.compute.engines import DeviceName
from weightkit.errors import ClusterError, DeviceError, Interrupted, RankError
from weightkit.remote.address import endpoints
from weightkit.version import build

#: How often a task passes on what its ranks print.
EVERY_S = 0.5
#: How long ranks have to end by themselves, after a signal or once another failed.
END_S = 15.0
#: Lines of a rank that are kept in case it is the first to fail.
LAST_LINES = 40
#: A rank ends with the task that started it, whatever ends that: PR_SET_PDEATHSIG.
_RANK = """
import ctypes, runpy
system = ctypes.CDLL(None)
if hasattr(system, "prctl"):
    system.prctl(1, 9)
runpy.run_module('weightkit', run_name='__main__')
"""
CONTINUE = "Run the same command again: it continues where it stopped."


@dataclass(frozen=True)
class Post:
    """A node's share: ``count`` ranks from rank ``first`` on."""

    node: Node
    first: int
    count: int


@dataclass(frozen=True)
class Order:
    """What the task of one node starts.

    Attributes:
        arguments: of ``weightkit``.
        folder: where it runs.
        environment: for all ranks, of those variables that torchrun sets.
        first, count: its ranks.
    """

    arguments: tuple[str, ...]
    folder: Path
    environment: Mapping[str, str]
    first: int
    count: int


@dataclass(frozen=True)
class Said:
    """A line that a rank printed, on standard error or output."""

    rank: int
    line: str
    is_error: bool


@dataclass(frozen=True)
class Ended:
    """All ranks of a task are through. ``code`` is the first of their exit codes that is not 0, and ``rank`` whose."""

    code: int = 0
    rank: int = 0


def start(
    arguments: Sequence[str],
    *,
    ranks: int | None,
    address: str | None,
    device: DeviceName,
    sources: Mapping[str, Stamp],
    say: Callable[[Said], None],
) -> int:
    """Run ``weightkit`` with ``arguments`` on ranks all over a cluster. The first exit code that is not 0.

    Args:
        arguments: the command and its options; relative paths in them are of this process's folder.
        ranks: how many; default the cluster's GPUs, and where it has none, or with device ``cpu``, one a node.
        address: see ``connect``.
        sources: files that each node must see, absolute.
        say: is told what rank 0 prints, and where another is the first to fail, what that one said last.

    Raises:
        ClusterError: no cluster, or a node that does not see the files.
        DeviceError: fewer GPUs or CPUs than ranks.
        RankError: a node died.
        Interrupted: by Ctrl-C.
    """
    ray = connect(address)
    posts = share_out(nodes(ray), ranks, device)
    on_gpus = device != "cpu" and any(post.node.gpus for post in posts)
    folder = Path.cwd()
    looked = [
        ray.remote(look).options(num_cpus=0, **on_node(ray, post.node)).remote(folder, sources, build())
        for post in posts
    ]
    for post, answer in zip(posts, looked, strict=True):
        try:
            port = ray.get(answer)
        except ray.exceptions.RayError as exc:
            raise of_node(exc, post.node) from exc
        if post is posts[0]:
            environment = _environment(posts, port)
    streams: dict[Any, Post] = {}
    for number, post in enumerate(posts):
        own = environment | {"LOCAL_WORLD_SIZE": str(post.count), "GROUP_RANK": str(number)}
        order = Order(tuple(arguments), folder, own, post.first, post.count)
        needs = {"num_cpus": 1 if on_gpus else post.count, "num_gpus": post.count if on_gpus else 0}
        task = ray.remote(run_ranks).options(num_returns="streaming", **needs, **on_node(ray, post.node))
        streams[task.remote(order)] = post
    try:
        return _listen(ray, streams, say)
    except KeyboardInterrupt as exc:
        raise Interrupted("stopped; what was written is kept", where="--executor ray", fix=CONTINUE) from exc
    finally:
        for stream in streams:
            with suppress(Exception):
                ray.cancel(stream)


def share_out(found: Sequence[Node], ranks: int | None, device: DeviceName) -> list[Post]:
    """Ranks for nodes, neighbours on one node, the largest node first.

    Raises:
        DeviceError: there is room for fewer.
    """
    on_gpus = device == "cuda" or (device == "auto" and any(node.gpus >= 1 for node in found))
    room = {node.id: int(node.gpus if on_gpus else node.cpus) for node in found}
    if ranks is None:
        ranks = sum(room.values()) if on_gpus else sum(count > 0 for count in room.values())
        room = room if on_gpus else {id: min(1, count) for id, count in room.items()}
    if not 0 < ranks <= sum(room.values()):
        raise DeviceError(
            f"not as many {'GPUs' if on_gpus else 'CPUs'} in the cluster as ranks",
            where="--ranks",
            expected=f"at most {sum(room.values())}",
            found=ranks,
        )
    posts: list[Post] = []
    for node in sorted(found, key=lambda node: -room[node.id]):
        first = sum(post.count for post in posts)
        if count := min(room[node.id], ranks - first):
            posts.append(Post(node, first, count))
    return posts


def _environment(posts: Sequence[Post], port: int) -> dict[str, str]:
    """What torchrun sets for all ranks, and what of ours they need."""
    size = sum(post.count for post in posts)
    ours = {name: value for name, value in os.environ.items() if name.startswith(("WEIGHTKIT_", "NCCL_", "GLOO_"))}
    return ours | endpoints() | {"MASTER_ADDR": posts[0].node.ip, "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}


def _listen(ray: Any, streams: Mapping[Any, Post], say: Callable[[Said], None]) -> int:
    """Say what ranks print until all have ended, or one has failed and the others had time to."""
    running, failed, until = dict(streams), Ended(), float("inf")
    last: dict[int, deque[Said]] = defaultdict(lambda: deque(maxlen=LAST_LINES))
    while running and time.monotonic() < until:
        for stream in ray.wait(list(running), num_returns=1, timeout=0.2)[0]:
            news = _next(ray, stream, running[stream], failed)
            if not isinstance(news, Ended):
                for said in news:
                    last[said.rank].append(said)
                    if said.rank == 0:
                        say(said)
                continue
            del running[stream]
            if news.code and not failed.code:
                failed, until = news, time.monotonic() + END_S
    for said in last[failed.rank] if failed.rank else ():
        say(said)
    return failed.code


def _next(ray: Any, stream: Any, post: Post, failed: Ended) -> list[Said] | Ended:
    try:
        news: list[Said] | Ended = ray.get(next(stream))
    except (StopIteration, ray.exceptions.RayError) as exc:
        if failed.code:
            return failed
        raise RankError(
            f"the node or its task died ({type(exc).__name__})",
            where=f"ranks {post.first} to {post.first + post.count - 1}, on {post.node.name}",
            fix=CONTINUE,
        ) from exc
    return news


# --- what runs on a node ----------------------------------------------------------------------------------------------


def look(folder: Path, sources: Mapping[str, Stamp], expected: str) -> int:
    """A free port of this node, where it can do the work. Raises ``ClusterError``."""
    require_build(expected)
    if not folder.is_dir():
        raise ClusterError("this node does not see the folder that the command runs in", where=folder, fix=SHARE)
    require_seen(sources)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def run_ranks(order: Order) -> Iterator[list[Said] | Ended]:
    """Start this node's ranks; what they print, and how they ended."""
    said: queue.SimpleQueue[Said] = queue.SimpleQueue()
    readers: list[threading.Thread] = []
    ranks = [_start(order, local, said, readers) for local in range(order.count)]
    failed_at = None
    try:
        while any(rank.poll() is None for rank in ranks):
            time.sleep(EVERY_S)
            if lines := _drained(said):
                yield lines
            if failed_at is None and any(rank.poll() for rank in ranks):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > END_S:
                break
        _hear_out(readers, EVERY_S if any(rank.poll() is None for rank in ranks) else END_S)
        yield _drained(said)
        codes = {order.first + local: rank.poll() for local, rank in enumerate(ranks)}
        yield next((Ended(_code(code), rank) for rank, code in codes.items() if code), Ended())
    finally:
        _end(ranks)


def _start(
    order: Order, local: int, said: queue.SimpleQueue[Said], readers: list[threading.Thread]
) -> subprocess.Popen[str]:
    """One rank; ``readers`` gets the threads that read what it prints."""
    rank = order.first + local
    own = {"RANK": str(rank), "LOCAL_RANK": str(local)}
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // order.count))}
    process = subprocess.Popen(
        [sys.executable, "-c", _RANK, *order.arguments],
        env={**os.environ, **threads, **order.environment, **own},
        cwd=order.folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    for stream, is_error in ((process.stdout, False), (process.stderr, True)):
        readers.append(threading.Thread(target=_pass_on, args=(stream, rank, is_error, said), daemon=True))
        readers[-1].start()
    return process


def _pass_on(stream: IO[str], rank: int, is_error: bool, said: queue.SimpleQueue[Said]) -> None:
    for line in stream:
        said.put(Said(rank, line.rstrip("\n"), is_error))


def _hear_out(readers: Sequence[threading.Thread], at_most_s: float) -> None:
    """Wait for the last lines. Their end may not come: a process that a rank left behind can hold the pipe open."""
    until = time.monotonic() + at_most_s
    for reader in readers:
        reader.join(max(0.0, until - time.monotonic()))


def _drained(said: queue.SimpleQueue[Said]) -> list[Said]:
    lines = []
    with suppress(queue.Empty):
        while True:
            lines.append(said.get_nowait())
    return lines


def _code(code: int) -> int:
    """As a shell has it: 128 and the number of the signal that ended a process."""
    return code if code > 0 else 128 - code


def _end(ranks: Sequence[subprocess.Popen[str]]) -> None:
    """Those that still run are told to stop, and have a moment to keep what they have."""
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()  # Ray's workers ignore SIGINT, and so do their children
    until = time.monotonic() + END_S
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < until:
        time.sleep(0.1)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
            rank.wait()
