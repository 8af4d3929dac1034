"""Ray clusters of several raylets on loopback, each with processes of its own, started as users start them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loopback import free_port

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
#: Quick to notice a death, so that tests need not wait for it.
SYSTEM = '{"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 2}'


def environment() -> dict[str, str]:
    """Of everything that belongs to a cluster of the tests."""
    return os.environ | {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",  # whatever token lies in the home of who runs the tests
        "RAY_DISABLE_MEMORY_MONITOR": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])]),
    }


@dataclass
class Raylet:
    """One node: ``ray start --block``, in a session of its own."""

    process: subprocess.Popen[bytes]

    def members(self) -> dict[int, str]:
        """Its processes by id: the raylet, its agents and its workers."""
        found, parents = {}, {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except (OSError, ValueError):
                    continue
        mine, grown = {self.process.pid}, True
        while grown:
            more = {pid for pid, parent in parents.items() if parent in mine and pid in found} - mine
            mine |= more
            grown = bool(more)
        return {pid: found.get(pid, "") for pid in mine}

    def kill_raylet(self) -> None:
        """The raylet alone: its workers do not notice at once."""
        for pid, line in self.members().items():
            if "/raylet/raylet " in line:
                os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """As when the machine loses its power. Once: afterwards its number may be another process's."""
        if self.process.returncode is not None:
            return
        for pid in self.members():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


def start(*arguments: str, cpus: int, gpus: int = 0, prefix: tuple[str, ...] = ()) -> Raylet:
    """A node with so many CPUs and GPUs to give, whether there are any or not."""
    command = [
        *prefix, *RAY, "start", "--block", "--disable-usage-stats", "--num-cpus", str(cpus), "--num-gpus", str(gpus),
        "--object-store-memory", str(80 << 20), "--memory", str(8 << 30),
        # the system's choice: of one range two nodes of a machine take the same ports
        "--min-worker-port", "0", "--max-worker-port", "0", *arguments,
    ]  # fmt: skip
    return Raylet(
        subprocess.Popen(
            command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
    )


@contextmanager
def head(cpus: int) -> Iterator[str]:
    """The address of a cluster's first node. Ray takes loopback for the machine's first address."""
    from ray.util import get_node_ip_address

    port, ip = free_port(), get_node_ip_address()
    node = start(
        "--head", "--port", str(port), "--include-dashboard", "false", "--node-ip-address", ip,
        "--system-config", SYSTEM, cpus=cpus,
    )  # fmt: skip
    try:
        wait_for("the head did not start", lambda: _answers(ip, port))
        yield f"{ip}:{port}"
    finally:
        node.kill()


def _answers(ip: str, port: int) -> bool:
    try:
        socket.create_connection((ip, port), timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def second(address: str, cpus: int, gpus: int = 0, prefix: tuple[str, ...] = ()) -> Iterator[Raylet]:
    """Another node of the cluster at ``address``, once it has joined; the caller may kill it. Afterwards the cluster
    knows that it is gone."""
    import ray

    def alive() -> set[str]:
        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}

    before = alive()
    node = start("--address", address, cpus=cpus, gpus=gpus, prefix=prefix)
    try:
        wait_for("the node did not join", lambda: alive() - before)
        joined = alive() - before
        yield node
    finally:
        node.kill()
    wait_for("the node is still there", lambda: not joined & alive())


def lines(log: Path) -> list[list[str]]:
    """The words of each whole line of what is being written down."""
    return [line.split() for line in log.read_text().split("\n")[:-1]] if log.exists() else []


def wait_for(what: str, condition: object, timeout_s: float = 180.0) -> None:
    """Until ``condition()``."""
    assert callable(condition)
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, what
        time.sleep(0.02)
