"""The machine's own time: read so many bytes of a folder and write so many, in large pieces, and do nothing else.

    python tests/benchmarks/plain_io.py SRC DST READ_BYTES WRITE_BYTES [--threads N] [--direct] [--direct-reads]

A thread reads a piece of 8 MiB into a buffer that it keeps, then writes from it so many bytes as keep input and output
in step. Buffers lie in huge pages, where there are any. ``--direct`` writes with O_DIRECT into space that was reserved
(fallocate), else through the page cache; ``--direct-reads`` reads with it, for files that are not cached.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

PIECE_BYTES = 8 << 20
ALIGNMENT = 4096
HUGE_PAGE_BYTES = 2 << 20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("read_bytes", type=int, help="at most what the folder holds")
    parser.add_argument("write_bytes", type=int)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--direct", action="store_true")
    parser.add_argument("--direct-reads", action="store_true")
    args = parser.parse_args()
    args.target.mkdir(parents=True)
    sources = sorted(path for path in args.source.rglob("*") if path.is_file())
    pieces = iter([(path, start) for path in sources for start in range(0, path.stat().st_size, PIECE_BYTES)])
    ratio = args.write_bytes / args.read_bytes
    left = args.read_bytes
    lock = threading.Lock()

    def next_piece() -> tuple[Path, int, int] | None:
        """File, start and most bytes to read."""
        nonlocal left
        with lock:
            piece = next(pieces, None) if left > 0 else None
            if piece is None:
                return None
            count = min(PIECE_BYTES, left, piece[0].stat().st_size - piece[1])
            left -= count
            return *piece, count

    def work(number: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if args.direct else 0)
        output = os.open(args.target / f"{number}.bin", flags, 0o666)
        if args.direct:
            os.posix_fallocate(output, 0, max(1, args.write_bytes // args.threads))
        largest = -(-int(PIECE_BYTES * max(1.0, ratio)) // ALIGNMENT) * ALIGNMENT
        buffer = aligned(largest)
        owed, written = 0.0, 0
        while True:
            piece = next_piece()
            if piece is None:
                break
            file = os.open(piece[0], os.O_RDONLY | (os.O_DIRECT if args.direct_reads else 0))
            asked = -(-piece[2] // ALIGNMENT) * ALIGNMENT if args.direct_reads else piece[2]
            count = min(piece[2], os.preadv(file, [buffer[:asked]], piece[1]))
            os.close(file)
            owed += count * ratio
            step = min(largest, int(owed) // ALIGNMENT * ALIGNMENT)
            done = 0
            while done < step:
                done += os.pwrite(output, buffer[done:step], written + done)
            written += step
            owed -= step
        os.ftruncate(output, written)
        os.fsync(output)
        os.close(output)

    with ThreadPoolExecutor(args.threads) as pool:
        list(pool.map(work, range(args.threads)))


def aligned(size: int) -> memoryview:
    memory = mmap.mmap(-1, size + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE_BYTES
    return memoryview(memory)[start : start + size]


if __name__ == "__main__":
    main()
