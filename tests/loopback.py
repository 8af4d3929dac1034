"""Ports of this machine, for servers that tests start."""

from __future__ import annotations

import random
import socket

#: Below those that the system gives away by itself (from 32768 on), so that one that is free stays so.
PORTS = range(20_000, 32_000)


def free_port() -> int:
    """A TCP port that nothing is bound to. Raises ``OSError`` where there is none."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError("no port is free")
