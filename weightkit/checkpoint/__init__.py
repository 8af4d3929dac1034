"""What lies on disk: safetensors headers, indexes, side files, and lazy tensors. Importing it imports no torch.

``Reader`` is imported when it is asked for: it needs numpy, and most of what looks at a checkpoint reads no data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weightkit.checkpoint.checkpoint import Checkpoint
from weightkit.checkpoint.header import Entry, Header, build_header, read_header
from weightkit.checkpoint.index import INDEX_NAME, Index, read_index
from weightkit.checkpoint.tensors import Cast, Concat, Dequantized, GroupDequantized, LazyTensor, Narrow, Stored

if TYPE_CHECKING:
    from weightkit.checkpoint.reading import Reader

__all__ = [
    "INDEX_NAME",
    "Cast",
    "Checkpoint",
    "Concat",
    "Dequantized",
    "Entry",
    "GroupDequantized",
    "Header",
    "Index",
    "LazyTensor",
    "Narrow",
    "Reader",
    "Stored",
    "build_header",
    "read_header",
    "read_index",
]


def __getattr__(name: str) -> object:
    if name == "Reader":
        from weightkit.checkpoint.reading import Reader

        return Reader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
