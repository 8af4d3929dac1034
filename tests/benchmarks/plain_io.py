"""The machine's own time: read every byte of a folder and write so many bytes, in large pieces, and do nothing else.

    python tests/benchmarks/plain_io.py SRC DST WRITE_BYTES [--threads N] [--direct]

A thread reads a piece of 8 MiB into a buffer that it keeps, then writes from it so many bytes as keep input and output
in step. ``--direct`` writes with O_DIRECT into space that was reserved (fallocate), else through the page cache.
"""

from __future__ import annotations

import argparse
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PIECE_BYTES = 8 << 20
ALIGNMENT = 4096


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("write_bytes", type=int)
    parser.add_argument("--threads", type=int, default=min(8, len(os.sched_getaffinity(0))))
    parser.add_argument("--direct", action="store_true")
    args = parser.parse_args()
    args.target.mkdir(parents=True)
    sources = sorted(path for path in args.source.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in sources)
    pieces = iter([(path, start) for path in sources for start in range(0, path.stat().st_size, PIECE_BYTES)])
    ratio = args.write_bytes / total
    lock = threading.Lock()

    def work(number: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | (os.O_DIRECT if args.direct else 0)
        output = os.open(args.target / f"{number}.bin", flags, 0o666)
        if args.direct:
            os.posix_fallocate(output, 0, max(1, args.write_bytes // args.threads))
        largest = -(-int(PIECE_BYTES * max(1.0, ratio)) // ALIGNMENT) * ALIGNMENT
        buffer = memoryview(mmap.mmap(-1, largest))
        owed, written = 0.0, 0
        while True:
            with lock:
                piece = next(pieces, None)
            if piece is None:
                break
            file = os.open(piece[0], os.O_RDONLY)
            count = os.preadv(file, [buffer[:PIECE_BYTES]], piece[1])
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


if __name__ == "__main__":
    main()
