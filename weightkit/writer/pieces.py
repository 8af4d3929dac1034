"""A file's content in order, as pieces: contiguous byte ranges to be copied, and strips of rows to be made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from weightkit.checkpoint.copies import Copy, copies
from weightkit.checkpoint.reading import Bytes
from weightkit.checkpoint.tensors import BlockQuantized, LazyTensor, Promised, is_plain, size_bytes
from weightkit.compute import strips
from weightkit.errors import WriteError

#: Largest piece that is evaluated at once; bounds the memory of a worker.
STRIP_BYTES = 8 << 20
#: Longest run that is copied in one go.
COPY_BYTES = 64 << 20

_F16_INF = 0x7C00


@dataclass(frozen=True, slots=True)
class Copied:
    """A contiguous range of a source file, which may hold several tensors."""

    copy: Copy

    @property
    def size_bytes(self) -> int:
        return self.copy.run_bytes


@dataclass(frozen=True, slots=True)
class Made:
    """Rows of the tensor ``name`` that are computed, or gathered from several places."""

    name: str
    strip: LazyTensor

    @property
    def size_bytes(self) -> int:
        return size_bytes(self.strip)


def pieces(tensors: Mapping[str, LazyTensor]) -> Iterator[Copied | Made]:
    """The content of a file that holds ``tensors`` in their order; each piece is small beside a worker's memory."""
    pending: list[Copy] = []
    for name, tensor in tensors.items():
        runs = copies(tensor) if is_plain(tensor) else None
        if runs is not None and _is_contiguous(runs):
            pending += runs
            continue
        yield from _copied(pending)
        pending = []
        whole = isinstance(tensor, Promised)  # it comes in one piece
        for strip in [tensor] if whole else strips(tensor, STRIP_BYTES):
            yield Made(name, strip)
    yield from _copied(pending)


def _is_contiguous(runs: Iterable[Copy]) -> bool:
    """Whether the runs, one after the other, are the tensor."""
    position = 0
    for run in runs:
        if run.rows > 1 or run.out_offset != position:
            return False
        position += run.run_bytes
    return True


def _copied(runs: Iterable[Copy]) -> Iterator[Copied]:
    """The runs, neighbours in the source joined, cut into pieces of at most ``COPY_BYTES``."""
    for run in _joined(runs):
        for start in range(0, run.run_bytes, COPY_BYTES):
            count = min(COPY_BYTES, run.run_bytes - start)
            yield Copied(replace(run, offset=run.offset + start, run_bytes=count))


def _joined(runs: Iterable[Copy]) -> Iterator[Copy]:
    last: Copy | None = None
    for run in runs:
        if last is not None and last.path == run.path and last.offset + last.run_bytes == run.offset:
            last = replace(last, run_bytes=last.run_bytes + run.run_bytes)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last


def may_leave_range(piece: Made) -> bool:
    """Whether ``require_in_range`` looks at the values."""
    if isinstance(piece.strip, BlockQuantized) and piece.strip.scales:
        return True
    return piece.strip.dtype == "F16" and not is_plain(piece.strip)


def require_in_range(piece: Made, data: Bytes) -> None:
    """Raise ``WriteError`` where F16 holds an Inf, the cast of a value over 65504 that BF16 and F32 can hold, or where
    a scale is not finite."""
    if isinstance(piece.strip, BlockQuantized) and piece.strip.scales and not np.isfinite(data.view(np.float32)).all():
        raise WriteError(
            "values that are not finite",
            where=piece.name,
            found="Inf among the weights",
            fix="weightkit verify --values lists all such weights.",
        )
    if piece.strip.dtype != "F16" or not may_leave_range(piece):
        return
    overflown = int(np.count_nonzero((data.view(np.uint16) & 0x7FFF) == _F16_INF))
    if overflown:
        raise WriteError(
            "values do not fit F16",
            where=piece.name,
            expected="at most 65504",
            found=f"{overflown:,} that became Inf",
            fix="Use --to bf16, which has the range of the source.",
        )
