"""SHA-256 of large files, two of them on one core where cores are few.

On few cores most of a conversion's time went into SHA-256. A core that hashes one file waits in every round for the
round before; with a second file's rounds in between it does nearly twice as much (``kernels.sha256_x86``). So as many
threads as cores hash all files of a process, and where more files wait each of them takes a second one. On as many
cores as files in work nothing is gained: hashlib hashes them.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np

from weightkit.checkpoint.reading import Bytes
from weightkit.kernels.sha256_x86 import BLOCK_BYTES, NEVER, Compiled, compiled, digest_of, initial_state
from weightkit.machine import JOBS, usable_cores

#: So many bytes or fewer are hashed by who has them.
SHORT_BYTES = 256 << 10
#: A smaller file is not worth the time until the code is compiled: 0.15 s, once a process.
SMALL_BYTES = 256 << 20
_NOTHING = np.empty(0, np.uint8)


class Digest(Protocol):
    """What ``hashlib.sha256()`` returns. One thread at a time may use it."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Take in a flat run of bytes."""
        ...

    def digest(self) -> bytes:
        """The SHA-256 of all bytes so far."""
        ...

    def hexdigest(self) -> str:
        """The same in hexadecimal digits."""
        ...

    def copy(self) -> Digest:
        """Another of the same bytes so far."""
        ...


def sha256(size_bytes: int = SMALL_BYTES) -> Digest:
    """The digest of a file of about ``size_bytes``, of which no byte is taken in yet."""
    code = compiled() if size_bytes >= SMALL_BYTES and hashers().apart < JOBS else None
    return hashlib.sha256() if code is None else Pairable(code)


def hash_apart() -> None:
    """From now on leave all files to hashlib: this process has one in work at a time."""
    hashers().apart = JOBS


class Pairable:
    """A digest that can be brought on together with another. What it takes in is begun, and then gone on with."""

    def __init__(self, code: Compiled) -> None:
        self._code = code
        self._state = np.array(initial_state(), np.uint32)
        self._bytes = 0
        self._tail = b""  # less than a block
        self._data = _NOTHING
        self.blocks = 0  # of the data, not taken in yet

    def begin(self, data: Bytes) -> None:
        """Take in what completes a block and keep what begins one; ``blocks`` whole ones are left."""
        self._bytes += len(data)
        if self._tail:
            missing = BLOCK_BYTES - len(self._tail)
            self._tail += data[:missing].tobytes()
            data = data[missing:]
            if len(self._tail) < BLOCK_BYTES:
                return
            self._take(np.frombuffer(self._tail, np.uint8))
        self.blocks = len(data) // BLOCK_BYTES
        self._tail = data[self.blocks * BLOCK_BYTES :].tobytes()
        self._data = data if self.blocks else _NOTHING

    def go_on(self, stop: int = NEVER) -> None:
        """Take in the blocks left, until the I32 at the address ``stop`` is not 0."""
        if self.blocks:
            self._took(self._code.one(self._into, self._at, self.blocks, stop))

    def go_on_with(self, other: Pairable) -> None:
        """Both take in their blocks, until one of them has none left."""
        count = min(self.blocks, other.blocks)
        if count:
            self._code.two(self._into, self._at, other._into, other._at, count, NEVER)
        self._took(count)
        other._took(count)

    def update(self, data: bytes | memoryview, /) -> None:
        """Take in a flat run of bytes, on another thread if it is long."""
        flat = np.frombuffer(data, np.uint8)
        if len(flat) > SHORT_BYTES:
            taken = threading.Semaphore(0)
            hashers().put(Line(self), flat, taken.release)
            taken.acquire()
        else:
            self.begin(flat)
            self.go_on()

    def digest(self) -> bytes:
        """The SHA-256 of all bytes so far."""
        padding = b"\x80" + bytes((55 - self._bytes) % BLOCK_BYTES) + (8 * self._bytes).to_bytes(8, "big")
        twin = self.copy()
        twin._take(np.frombuffer(self._tail + padding, np.uint8))
        return digest_of(twin._state.tolist())

    def hexdigest(self) -> str:
        """The same in hexadecimal digits."""
        return self.digest().hex()

    def copy(self) -> Pairable:
        """Another of the same bytes so far."""
        twin = Pairable(self._code)
        twin._state, twin._tail, twin._bytes = self._state.copy(), self._tail, self._bytes
        return twin

    def _took(self, count: int) -> None:
        self.blocks -= count
        if not self.blocks:
            self._data = _NOTHING  # it belongs to who gave it, and may be large

    def _take(self, blocks: Bytes) -> None:
        self._code.one(self._into, blocks.ctypes.data, len(blocks) // BLOCK_BYTES, NEVER)

    @property
    def _into(self) -> int:
        return self._state.ctypes.data

    @property
    def _at(self) -> int:
        return self._data.ctypes.data + len(self._data) // BLOCK_BYTES * BLOCK_BYTES - self.blocks * BLOCK_BYTES


class Line:
    """What is to be hashed of one file, in order."""

    def __init__(self, digest: Digest) -> None:
        self.digest = digest
        self.waiting: deque[tuple[Bytes, Callable[[], None]]] = (
            deque()
        )  # the first is at work, if a thread has the line


class Hashers:
    """The threads that hash.

    Args:
        most: so many there are at most.
        apart: while fewer are at work, a thread takes one file.
    """

    def __init__(self, most: int, apart: int) -> None:
        self._most, self.apart = most, apart
        self._changed = threading.Condition()
        self._threads = self._idle = 0
        self._lines: deque[Line] = deque()  # that no thread has
        self._taken: list[list[Line]] = []  # by each thread at work
        self._second_waits = np.zeros(1, np.int32)  # stops who hashes one file, to take a second

    def put(self, line: Line, data: Bytes, done: Callable[[], None]) -> None:
        """Hash a flat run of bytes after those before it in the line; then call ``done``, on the thread that did.

        Raises ``RuntimeError`` where the system has no thread for it.
        """
        with self._changed:
            line.waiting.append((data, done))
            if len(line.waiting) > 1:
                return
            self._lines.append(line)
            try:
                self._call_another()
            except RuntimeError:
                self._lines.pop()
                line.waiting.pop()
                raise

    def _call_another(self) -> None:
        """Unless there is nothing to take, or a thread at work will take it."""
        if not self._lines:
            return
        if self._may_pair() and any(map(self._takes_second, self._taken)):
            self._second_waits[0] = 1
        elif self._idle:
            self._changed.notify()
        elif self._threads < self._most:
            self._start()

    def _start(self) -> None:
        """One more thread. Raises ``RuntimeError`` where there can be none, and none is there that takes its work."""
        self._threads += 1
        try:
            threading.Thread(target=self._work, daemon=True, name="sha256").start()
        except RuntimeError:
            self._threads -= 1
            if not self._threads:
                raise

    def _may_pair(self) -> bool:
        return sum(map(bool, self._taken)) >= self.apart

    def _takes_second(self, lines: list[Line]) -> bool:
        both = [*lines, self._lines[0]]
        return len(both) == 2 and all(isinstance(line.digest, Pairable) for line in both)

    def _work(self) -> None:
        lines: list[Line] = []
        while True:
            with self._changed:
                new = self._take(lines)
            for line in new:
                if isinstance(line.digest, Pairable):
                    line.digest.begin(line.waiting[0][0])
            for line in _hash(lines, self._second_waits.ctypes.data):
                lines.remove(line)
                line.waiting[0][1]()
                with self._changed:
                    line.waiting.popleft()
                    if line.waiting:
                        self._lines.append(line)

    def _take(self, lines: list[Line]) -> list[Line]:
        """Add to a thread's lines what it is to hash now; wait while it has none. Those that were added."""
        before = len(lines)
        if not lines:
            self._taken = [others for others in self._taken if others is not lines]
            while not self._lines:
                self._idle += 1
                self._changed.wait()
                self._idle -= 1
            lines.append(self._lines.popleft())
            self._taken.append(lines)
        if self._lines and self._may_pair() and self._takes_second(lines):
            lines.append(self._lines.popleft())
        self._second_waits[0] = 0
        self._call_another()
        return lines[before:]


def _hash(lines: list[Line], second_waits: int) -> list[Line]:
    """Go on with one or two lines. Those of which the first run of bytes is taken in."""
    match [line.digest for line in lines]:
        case [Pairable() as first, Pairable() as second]:
            first.go_on_with(second)
        case [Pairable() as alone]:
            alone.go_on(second_waits)
        case [plain]:
            plain.update(lines[0].waiting[0][0].data)
    return [line for line in lines if not isinstance(line.digest, Pairable) or not line.digest.blocks]


def _make() -> Hashers:
    cores = usable_cores()
    return Hashers(most=cores, apart=cores)


_hashers = _make()


def hashers() -> Hashers:
    """Those of this process."""
    return _hashers


def _make_again() -> None:
    """A process that was forked has none of the threads, and perhaps a lock that nobody will release."""
    global _hashers
    _hashers = _make()


os.register_at_fork(after_in_child=_make_again)
