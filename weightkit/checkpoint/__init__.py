"""What lies on disk: safetensors headers, indexes, side files, and lazy tensors. Importing it imports no torch."""

from weightkit.checkpoint.checkpoint import Checkpoint
from weightkit.checkpoint.header import Entry, Header, build_header, read_header
from weightkit.checkpoint.index import INDEX_NAME, Index, read_index
from weightkit.checkpoint.reading import Reader
from weightkit.checkpoint.tensors import Cast, Concat, Dequantized, LazyTensor, Narrow, Stored

__all__ = [
    "INDEX_NAME",
    "Cast",
    "Checkpoint",
    "Concat",
    "Dequantized",
    "Entry",
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
