"""A file on its way: bytes under a partial name, and a map of which have arrived and what they hash to.

The map lies in ``.weightkit/parts``. It is written through the page cache after the bytes it speaks of, so a kill loses
nothing; after a power cut it may say more than the disk holds, which the digests in it bring to light:

    32 bytes   SHA-256 of what the map is of: content, size, segment and chunk sizes
     8 bytes   a segment: how many bytes of it have arrived, from its start on (little-endian)
     8 bytes   a chunk: the first bytes of the SHA-256 of the file *up to the chunk's end*; zeros where not yet known

Digests of prefixes cost nothing: they fall off the one SHA-256 that runs over the file. Rehashing a file against them
finds its first damaged chunk; with that one mended, the next.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weightkit.durable import FULL, PARTIAL, STATE_DIR, no_space, sync_folder
from weightkit.errors import PlanError, TargetError, WriteError
from weightkit.hub.listing import RemoteFile
from weightkit.sha256 import sha256

PARTS = "parts"
DIGEST_BYTES = 8
_READ_BYTES = 1 << 20
_NONE = bytes(DIGEST_BYTES)
_SYNC_FILE_RANGE_WRITE = 2  # <linux/fs.h>; fcntl(2)'s sync_file_range, which Python does not have


def _find_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """The system call, where there is one. A hint: what it returns does not matter."""
    found = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if found is not None:
        found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return found


_sync_file_range = _find_sync_file_range()


@dataclass(frozen=True)
class Grain:
    """How finely a file is divided.

    Attributes:
        segment_bytes: fetched by one request; several of one file at once. A multiple of ``chunk_bytes``.
        chunk_bytes: what is fetched again where a byte of it is damaged.
    """

    segment_bytes: int = 256 << 20
    chunk_bytes: int = 8 << 20

    def __post_init__(self) -> None:
        if self.chunk_bytes < 1 or self.segment_bytes % self.chunk_bytes or self.segment_bytes < 1:
            raise PlanError(
                "segments that are no multiple of chunks",
                expected="segment_bytes = n * chunk_bytes, both at least 1",
                found=f"{self.segment_bytes:,} and {self.chunk_bytes:,}",
            )


class Digests:
    """The checksums of a file, fed from front to back."""

    def __init__(self, file: RemoteFile) -> None:
        self.sha256 = sha256(file.size_bytes)
        # Git's id of a blob; a hub that lists it lists no SHA-256.
        self.git: Any = hashlib.sha1(f"blob {file.size_bytes}\0".encode()) if file.sha256 is None else None

    def update(self, data: bytes | memoryview) -> None:
        self.sha256.update(data)
        if self.git is not None:
            self.git.update(data)

    def copy(self) -> Digests:
        twin = object.__new__(Digests)
        twin.sha256, twin.git = self.sha256.copy(), None if self.git is None else self.git.copy()
        return twin

    def match(self, file: RemoteFile) -> bool:
        """Whether these are the listed ones."""
        if file.sha256 is not None:
            return self.sha256.hexdigest() == file.sha256
        return bool(self.git.hexdigest() == file.git_sha1)

    def prefix(self) -> bytes:
        """What the map keeps of the state."""
        return self.sha256.digest()[:DIGEST_BYTES]


class Partial:
    """One file that is being fetched. Threads may write different segments of it.

    Args:
        target: the folder.
        file: what it is to become.
        kept: prefix digests that are known from when the file was whole.
    """

    def __init__(self, target: Path, file: RemoteFile, grain: Grain, kept: bytes = b"") -> None:
        self.file, self.grain = file, grain
        self.final = target / file.path
        self.path = self.final.with_name(self.final.name + PARTIAL)
        self._map_path = map_path(target, file)
        self.segments = max(1, -(-file.size_bytes // grain.segment_bytes))
        self.chunks = -(-file.size_bytes // grain.chunk_bytes)
        self._head = hashlib.sha256(f"{file.content} {file.size_bytes} {grain}".encode()).digest()
        self._lock, self._hashing = threading.Lock(), threading.Lock()
        make_folder(self.path.parent, target)
        self._map_path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open(self.path)
        try:
            self._map = _open(self._map_path)
        except BaseException:
            os.close(self._file)
            raise
        #: Ranges that nothing vouches for but the whole file's checksum: they arrived in an earlier run, after its last
        #: digest. Where the checksum is wrong they are looked at first.
        self.suspects: list[tuple[int, int]] = []
        self.arrived, self.known = self._load(kept)
        self.hashed = 0
        self.digests = Digests(file)

    def close(self) -> None:
        for handle in (self._file, self._map):
            with suppress(OSError):
                os.close(handle)

    # what has arrived

    def start_of(self, segment: int) -> int:
        return segment * self.grain.segment_bytes

    def end_of(self, segment: int) -> int:
        return min(self.file.size_bytes, (segment + 1) * self.grain.segment_bytes)

    def next_of(self, segment: int) -> int:
        """The first byte of a segment that has not arrived; its end where all have."""
        return self.start_of(segment) + self.arrived[segment]

    @property
    def arrived_bytes(self) -> int:
        return sum(self.arrived)

    @property
    def whole(self) -> bool:
        return self.arrived_bytes == self.file.size_bytes

    def front(self) -> int:
        """How far the file is there without a gap."""
        for segment in range(self.segments):
            if self.next_of(segment) < self.end_of(segment):
                return self.next_of(segment)
        return self.file.size_bytes

    # writing

    def write(self, offset: int, data: bytes) -> None:
        """Bytes that are due: the next of their segment; they may reach into the segments that follow."""
        self._put(offset, data)
        view = memoryview(data)
        position = offset
        while position < offset + len(data):
            segment = position // self.grain.segment_bytes
            stop = min(offset + len(data), self.end_of(segment))
            with self._lock:
                self.arrived[segment] = max(self.arrived[segment], stop - self.start_of(segment))
                self._store(32 + 8 * segment, struct.pack("<Q", self.arrived[segment]))
            position = stop
        if self._hashing.acquire(blocking=False):
            try:
                if self.hashed == offset:
                    self._hash(view)
            finally:
                self._hashing.release()

    def overwrite(self, offset: int, data: bytes) -> None:
        """Other bytes in place of some that had arrived. Hash anew afterwards."""
        self._forget(offset // self.grain.chunk_bytes)
        self._put(offset, data)

    def mend(self, offset: int, data: bytes) -> None:
        """Bytes of a chunk in place of damaged ones. It will be held to what it is known to hash to."""
        self._put(offset, data)

    def read(self, offset: int, count: int) -> bytes:
        """Bytes that have arrived."""
        data = os.pread(self._file, count, offset)
        while data and len(data) < count:
            more = os.pread(self._file, count - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def begin_writing_back(self, offset: int, count: int) -> None:
        """Let the kernel write a range to the disk now, without waiting for it, so that the last sync is short.

        A sync would wait, and for what other workers are writing of the same file, too.
        """
        if _sync_file_range is not None:
            _sync_file_range(self._file, offset, count, _SYNC_FILE_RANGE_WRITE)

    # hashing

    def catch_up(self, check: Callable[[], None], seen: Callable[[int], None] = lambda count: None) -> int | None:
        """Hash on from the disk, as far as the file is there without a gap.

        Stops at a chunk that does not hash to what it did when it arrived, and returns its number; the state then is
        that before the chunk, so that it can be mended and hashed again. None where all is well. Where another thread
        hashes, it is left to that.

        Args:
            check: called now and then; may raise.
            seen: told how many bytes were read.
        """
        if not self._hashing.acquire(blocking=False):
            return None
        try:
            while self.hashed < (front := self.front()):
                chunk = self.hashed // self.grain.chunk_bytes
                end = min(front, (chunk + 1) * self.grain.chunk_bytes)
                before, at = self.digests.copy(), self.hashed
                while self.hashed < end:
                    check()
                    data = self.read(self.hashed, min(_READ_BYTES, end - self.hashed))
                    if not data:
                        raise TargetError("was truncated by another process while it was fetched", where=self.path)
                    seen(len(data))
                    if not self._hash(memoryview(data)):
                        self.digests, self.hashed = before, at
                        return chunk
            return None
        finally:
            self._hashing.release()

    def restart_hashing(self) -> None:
        """Hash from the start when next asked to."""
        with self._hashing:
            self.digests, self.hashed = Digests(self.file), 0

    def accept(self, chunk: int) -> None:
        """Drop what is known of a chunk and all that follow: what is there now is taken for right until the checksum of
        the whole says otherwise."""
        self._forget(chunk)

    def _hash(self, data: memoryview) -> bool:
        """Go on over ``data``. False where a chunk ends otherwise than it is known to."""
        while len(data):
            chunk = self.hashed // self.grain.chunk_bytes
            end = min(self.file.size_bytes, (chunk + 1) * self.grain.chunk_bytes)
            piece = data[: end - self.hashed]
            self.digests.update(piece)
            self.hashed += len(piece)
            data = data[len(piece) :]
            if self.hashed == end:
                found, known = self.digests.prefix(), self._known(chunk)
                if known not in (_NONE, found):
                    return False
                if known == _NONE:
                    self._know(chunk, found)
        return True

    # finishing

    def finish(self) -> tuple[str, bytes, os.stat_result]:
        """The file is right: synced, under its final name, the map gone. SHA-256, prefix digests, stat."""
        self._guard(lambda: os.fsync(self._file))
        status = self._guard(lambda: (self.path.rename(self.final), os.fstat(self._file))[1])
        sync_folder(self.final.parent)
        self.close()
        self._map_path.unlink(missing_ok=True)
        return self.digests.sha256.hexdigest(), bytes(self.known), status

    # the map

    def _load(self, kept: bytes) -> tuple[list[int], bytearray]:
        size = os.fstat(self._file).st_size
        if size > self.file.size_bytes:
            os.ftruncate(self._file, self.file.size_bytes)
            size = self.file.size_bytes
        length = 32 + 8 * self.segments + DIGEST_BYTES * self.chunks
        raw = os.pread(self._map, length, 0)
        mapped = len(raw) == length and raw[:32] == self._head
        there = [max(0, min(size, self.end_of(n)) - self.start_of(n)) for n in range(self.segments)]
        if mapped:
            counts = struct.unpack(f"<{self.segments}Q", raw[32 : 32 + 8 * self.segments])
            arrived = [min(count, have) for count, have in zip(counts, there, strict=True)]
            known = bytearray(raw[32 + 8 * self.segments :])
        else:  # the partial file of another tool, or one whose map is lost: its bytes may do
            arrived = there
            known = bytearray(kept if len(kept) == DIGEST_BYTES * self.chunks else _NONE * self.chunks)
            self._guard(lambda: os.ftruncate(self._map, 0))
            self._store(0, self._head + struct.pack(f"<{self.segments}Q", *arrived) + bytes(known))
        self.suspects = list(self._unvouched(arrived, known))
        return arrived, known

    def _unvouched(self, arrived: list[int], known: bytearray) -> Iterator[tuple[int, int]]:
        size, grain = DIGEST_BYTES, self.grain.chunk_bytes
        last = max((n for n in range(self.chunks) if known[n * size : (n + 1) * size] != _NONE), default=-1)
        for segment, count in enumerate(arrived):
            begin = max(self.start_of(segment), (last + 1) * grain)
            end = self.start_of(segment) + count
            if begin < end:
                yield begin, end

    def _known(self, chunk: int) -> bytes:
        return bytes(self.known[chunk * DIGEST_BYTES : (chunk + 1) * DIGEST_BYTES])

    def _know(self, chunk: int, digest: bytes) -> None:
        self.known[chunk * DIGEST_BYTES : (chunk + 1) * DIGEST_BYTES] = digest
        self._store(32 + 8 * self.segments + DIGEST_BYTES * chunk, digest)

    def _forget(self, chunk: int) -> None:
        for number in range(chunk, self.chunks):
            if self._known(number) != _NONE:
                self._know(number, _NONE)

    def _store(self, offset: int, data: bytes) -> None:
        self._guard(lambda: _pwrite(self._map, data, offset))

    def _put(self, offset: int, data: bytes) -> None:
        self._guard(lambda: _pwrite(self._file, data, offset))

    def _guard(self, step: Callable[[], Any]) -> Any:
        """A step on the disk, its failure in words."""
        try:
            return step()
        except OSError as exc:
            raise disk_problem(exc, self.path) from exc


def disk_problem(error: OSError, path: Path) -> WriteError:
    """What to raise for a disk that does not take a file."""
    if error.errno in FULL:
        return no_space(path)
    return TargetError(
        f"cannot be written ({error.strerror})", where=path, fix="Name another target, or free this one."
    )


def map_path(target: Path, file: RemoteFile) -> Path:
    """Where the map of a file lies; by a hash of the path, so that folders need not be made."""
    return target / STATE_DIR / PARTS / hashlib.sha256(file.path.encode()).hexdigest()[:32]


def make_folder(folder: Path, target: Path) -> None:
    """A folder below the target. Raises ``TargetError`` where a link or a file is in the way."""
    for place in [*reversed(folder.relative_to(target).parents), folder.relative_to(target)]:
        path = target / place
        if os.path.lexists(path) and (not path.is_dir() or (path.is_symlink() and path != target)):
            raise TargetError("a link or a file where a folder must be", where=path, fix="Move it away.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise disk_problem(exc, folder) from exc


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as exc:
        raise disk_problem(exc, path) from exc


def _pwrite(handle: int, data: bytes, offset: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(handle, view[done:], offset + done)
