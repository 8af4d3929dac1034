"""Compare two checkpoints tensor by tensor, bit by bit. Exit 1 on any difference.

    python tests/benchmarks/compare.py A B        # folders, published layout or rank files

In the published layout tensors are matched by name whichever files they lie in; rank files are matched file by file.
The first mismatch is shown with its coordinate and both values. Streams: memory does not grow with the checkpoint.
Independent of weightkit: it reads headers by itself.

Two NaNs of different bits count as different; random checkpoints of full_width.py hold none.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

CHUNK_BYTES = 8 << 20
WIDTHS = {"F8_E4M3": 1, "U8": 1, "I8": 1, "BOOL": 1, "BF16": 2, "F16": 2, "I16": 2, "F32": 4, "I32": 4, "I64": 8}
_RANK_FILE = re.compile(r"model\d+-(mp|ep)\d+\.safetensors")
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie."""

    path: Path
    offset: int
    size_bytes: int
    dtype: str
    shape: tuple[int, ...]

    def chunks(self) -> list[tuple[int, int]]:
        """Start and length of each piece that is compared at once."""
        starts = range(0, self.size_bytes, CHUNK_BYTES)
        return [(start, min(CHUNK_BYTES, self.size_bytes - start)) for start in starts]

    def read(self, start: int, count: int) -> Bytes:
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start)
            data = np.empty(count, np.uint8)
            done = 0
            while done < count:
                got = file.readinto(data[done:].data)
                if not got:
                    raise SystemExit(f"{self.path} ends early")
                done += got
        return data


def places(folder: Path) -> dict[str, Place]:
    """Tensor name (after the file's name, for rank files) to its place."""
    found: dict[str, Place] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        prefix = f"{path.name}: " if _RANK_FILE.fullmatch(path.name) else ""
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            key = prefix + name
            if key in found:
                raise SystemExit(f"{key} lies in {found[key].path.name} and in {path.name}")
            found[key] = Place(path, 8 + length + begin, end - begin, entry["dtype"], tuple(entry["shape"]))
    if not found:
        raise SystemExit(f"{folder}: no tensors")
    return found


def first_difference(a: Place, b: Place) -> str | None:
    """A line about the first element that differs, or None."""
    for start, count in a.chunks():
        left, right = a.read(start, count), b.read(start, count)
        if np.array_equal(left, right):
            continue
        width = WIDTHS.get(a.dtype, 1)
        byte = int(np.argmax(left != right))
        element = byte // width
        coordinate = np.unravel_index(start // width + element, a.shape) if prod(a.shape) else ()
        where = ", ".join(str(int(index)) for index in coordinate)
        both = [raw[element * width : (element + 1) * width] for raw in (left, right)]
        values = " and ".join(f"{value_of(raw, a.dtype)} ({raw[::-1].tobytes().hex()})" for raw in both)
        return f"[{where}]: {values}; {np.count_nonzero(left != right):,} bytes differ in this piece of {count:,}"
    return None


def value_of(raw: Bytes, dtype: str) -> str:
    """The element as a number where numpy can spell it."""
    if dtype == "BF16":
        return f"{(raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)[0]:.9g}"
    if dtype in ("F16", "F32"):
        return f"{raw.view({'F16': np.float16, 'F32': np.float32}[dtype])[0]:.9g}"
    return str(int.from_bytes(raw.tobytes(), "little"))


def compare(a: Path, b: Path, threads: int) -> tuple[int, list[str]]:
    """Tensors compared, and a line for each that differs."""
    first, second = places(a), places(b)
    problems = [f"{name}: only in the first" for name in first if name not in second]
    problems += [f"{name}: only in the second" for name in second if name not in first]
    shared = [name for name in first if name in second]

    def one(name: str) -> str | None:
        left, right = first[name], second[name]
        if (left.dtype, left.shape) != (right.dtype, right.shape):
            return f"{name}: {left.dtype} {list(left.shape)} and {right.dtype} {list(right.shape)}"
        difference = first_difference(left, right)
        return difference and f"{name} {difference}"

    with ThreadPoolExecutor(threads) as pool:
        problems += [problem for problem in pool.map(one, shared) if problem]
    return len(shared), problems


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare two checkpoints bit by bit.")
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--threads", type=int, default=min(16, len(os.sched_getaffinity(0))))
    args = parser.parse_args()
    count, problems = compare(args.first, args.second, args.threads)
    for problem in problems[:20]:
        print(problem)
    print(f"{count:,} tensors compared, {len(problems):,} differences")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
