"""Plain tensors lowered to the byte ranges they consist of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from weightkit.checkpoint.dtypes import itemsize
from weightkit.checkpoint.tensors import Concat, LazyTensor, Narrow, Stored, size_bytes
from weightkit.remote.address import is_address

#: Runs at least this share of their stride are read with what lies between them; sparser ones each by itself. (So the
#: ranks' parts of rows of 16 KiB took three quarters of the CPU time for 16 ranks, two thirds for 32.)
DENSE = 1 / 8


@dataclass(frozen=True, slots=True)
class Copy:
    """``rows`` runs of ``run_bytes``; run i goes from ``offset + i * stride`` to ``out_offset + i * out_stride``.

    Offsets and strides are in bytes; a contiguous copy has one row.
    """

    path: str
    offset: int
    stride: int
    out_offset: int
    out_stride: int
    run_bytes: int
    rows: int = 1

    @property
    def is_dense(self) -> bool:
        """Whether its runs are read with the gaps between them; over a network always: a request a run would take
        forever."""
        return self.run_bytes >= self.stride * DENSE or is_address(self.path)

    @property
    def read_bytes(self) -> int:
        """Bytes of the file that are read for it, gaps included where they are."""
        return self.rows * (self.stride if self.is_dense else self.run_bytes)


def copies(tensor: LazyTensor) -> tuple[Copy, ...]:
    """The byte ranges of a plain tensor, in the order of the output where that is possible.

    Raises ``TypeError`` for a tensor that has to be computed.
    """
    return tuple(_lower(tensor))


def _lower(tensor: LazyTensor) -> Iterator[Copy]:
    match tensor:
        case Stored(path=path, offset=offset):
            size = size_bytes(tensor)
            if size:
                yield Copy(path, offset, size, 0, size, size)
        case Narrow(source=source, dim=dim, start=start, length=length):
            inner = prod(source.shape[dim + 1 :]) * itemsize(source.dtype)
            width = source.shape[dim] * inner
            for copy in _lower(source):
                for run in _by_row(copy, width):
                    yield from _crop(run, width, start * inner, length * inner)
        case Concat(parts=parts, dim=dim):
            inner = prod(tensor.shape[dim + 1 :]) * itemsize(tensor.dtype)
            width, column = tensor.shape[dim] * inner, 0
            for part in parts:
                part_width = part.shape[dim] * inner
                for copy in _lower(part):
                    yield from _place(copy, part_width, column, width)
                column += part_width
        case _:
            raise TypeError(f"{type(tensor).__name__} has to be computed")


def _by_row(copy: Copy, width: int) -> Iterator[Copy]:
    """The same copy, no run of it reaching over the end of an output row of ``width`` bytes."""
    column = copy.out_offset % width
    if column + copy.run_bytes <= width and (copy.rows == 1 or copy.out_stride % width == 0):
        yield copy
    elif copy.rows > 1:
        for row in range(copy.rows):
            run = replace(
                copy, offset=copy.offset + row * copy.stride, out_offset=copy.out_offset + row * copy.out_stride, rows=1
            )
            yield from _by_row(run, width)
    elif column:
        yield replace(copy, run_bytes=width - column)
        yield from _by_row(_skip(copy, width - column), width)
    else:
        rows, rest = divmod(copy.run_bytes, width)
        yield replace(copy, stride=width, out_stride=width, run_bytes=width, rows=rows)
        if rest:
            yield _skip(copy, rows * width)


def _skip(copy: Copy, count: int) -> Copy:
    return replace(
        copy, offset=copy.offset + count, out_offset=copy.out_offset + count, run_bytes=copy.run_bytes - count
    )


def _crop(copy: Copy, width: int, start: int, length: int) -> Iterator[Copy]:
    """What of a copy falls into columns [start, start + length) of rows of ``width``, placed in rows of ``length``."""
    row, column = divmod(copy.out_offset, width)
    low, high = max(start, column), min(start + length, column + copy.run_bytes)
    if low < high:
        yield replace(
            copy,
            offset=copy.offset + low - column,
            out_offset=row * length + low - start,
            out_stride=copy.out_stride // width * length,
            run_bytes=high - low,
        )


def _place(copy: Copy, part_width: int, column: int, width: int) -> Iterator[Copy]:
    """A copy into rows of ``part_width`` bytes, moved to ``column`` of rows of ``width`` bytes."""
    if part_width == width:
        yield copy
        return
    for run in _by_row(copy, part_width):
        row, within = divmod(run.out_offset, part_width)
        yield replace(run, out_offset=row * width + column + within, out_stride=run.out_stride // part_width * width)
