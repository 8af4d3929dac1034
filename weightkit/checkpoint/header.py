"""The safetensors header: read as untrusted input, and written.

A file is an unsigned 64-bit little-endian length N, N bytes of JSON that begin with ``{`` and may end in spaces, and
the data. The JSON maps each tensor's name to its dtype, shape and ``data_offsets`` [begin, end) from the start of the
data, and ``__metadata__`` to strings. The tensors tile the data: no holes, no overlaps, nothing after the last.
Source: https://github.com/huggingface/safetensors#format

    HeaderError
    ├── HeaderLengthError        the length field is not there, beyond the file, or over 100 MB
    ├── HeaderTextError          not UTF-8, or not a JSON object
    ├── HeaderDepthError         nested deeper than the format is
    ├── DuplicateNameError       one name twice
    ├── MetadataError            __metadata__ is not strings to strings
    ├── EntryError               an entry lacks a field or has a wrong one
    ├── DtypeError               a dtype that the format does not have
    ├── ShapeError               a shape that is not a list of sizes
    ├── OffsetsError             offsets that are no range
    ├── SizeError                the range is not what dtype and shape need
    ├── OverlapError             a tensor begins within another
    ├── GapError                 bytes that belong to no tensor
    ├── TruncatedError           the file ends before its data does
    └── TrailingBytesError       the file goes on after its data
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod
from operator import mul
from pathlib import Path
from stat import S_ISREG
from typing import TypeGuard

from weightkit.checkpoint.dtypes import DTYPE_BITS, size_bytes
from weightkit.checkpoint.json_file import repeated_key
from weightkit.errors import HeaderError, MissingFileError
from weightkit.remote.path import RemotePath

MAX_HEADER_BYTES = 100_000_000
#: Read at once of a remote file: all of most headers.
FIRST_BYTES = 256 << 10
#: {file {entry [shape: no valid header is deeper.
MAX_DEPTH = 3
#: Sizes and offsets beyond this are no real file's; it keeps products in range.
MAX_SIZE = 1 << 62
#: As many dimensions as an array may have in torch and numpy.
MAX_DIMENSIONS = 64
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_INTEGERS = frozenset({int})
#: Where data starts is padded to this, so that O_DIRECT readers and writers find it aligned.
ALIGNMENT = 4096


class HeaderLengthError(HeaderError):
    """The length field is missing, beyond the file, or over the format's limit."""


class HeaderTextError(HeaderError):
    """The header is not UTF-8, or not a JSON object."""


class HeaderDepthError(HeaderError):
    """The header is nested deeper than the format."""


class DuplicateNameError(HeaderError):
    """One name stands twice."""


class MetadataError(HeaderError):
    """``__metadata__`` is not a map of strings to strings."""


class EntryError(HeaderError):
    """A tensor's entry lacks a field or has one too many."""


class DtypeError(HeaderError):
    """A dtype that the format does not have."""


class ShapeError(HeaderError):
    """A shape that is not a list of sizes."""


class OffsetsError(HeaderError):
    """Offsets that are no range of bytes."""


class SizeError(HeaderError):
    """The range of bytes is not what dtype and shape need."""


class OverlapError(HeaderError):
    """A tensor begins within another."""


class GapError(HeaderError):
    """Bytes that belong to no tensor."""


class TruncatedError(HeaderError):
    """The file ends before its data does."""


class TrailingBytesError(HeaderError):
    """The file goes on after its data."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: ``begin`` and ``end`` are byte offsets from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A file's header: entries in the order of their bytes, which tile ``[data_offset, file_size)``."""

    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    data_offset: int
    file_size: int


def read_header(path: Path) -> Header:
    """Read and check a file's header; no tensor data is read, and no more is allocated than the header needs.

    Raises:
        MissingFileError: there is no such file.
        HeaderError: one of its subclasses names the defect, with the tensor it concerns.
        HubError, SourceChangedError: of a remote file, which cannot be read, or is another by now.
    """
    if isinstance(path, RemotePath):
        return _read_remote_header(path)
    try:
        if not S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise HeaderError("not a regular file", where=path)
        with path.open("rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            raw = file.read(_header_length(file.read(8), file_size, path))
    except FileNotFoundError as exc:
        raise MissingFileError("no such file", where=path) from exc
    except OSError as exc:
        raise HeaderError(f"cannot be read ({exc.strerror})", where=path) from exc
    return parse_header(raw, file_size, path)


def _read_remote_header(path: RemotePath) -> Header:
    """By one or two ranges."""
    entry = path.entry
    if entry is None:
        raise MissingFileError("no such file", where=path)
    first = path.read_range(0, min(FIRST_BYTES, entry.size_bytes))
    length = _header_length(first[:8], entry.size_bytes, path)
    raw = first[8 : 8 + length]
    if len(raw) < length:
        raw += path.read_range(len(first), 8 + length)
    return parse_header(raw, entry.size_bytes, path)


def _header_length(prefix: bytes, file_size: int, path: Path) -> int:
    """The length of the JSON, by the first 8 bytes of a file."""
    if len(prefix) < 8:
        raise HeaderLengthError(
            "too short for a safetensors file", where=path, expected="at least 10 bytes", found=file_size
        )
    length: int = struct.unpack("<Q", prefix)[0]
    if length > MAX_HEADER_BYTES:
        raise HeaderLengthError(
            "header length over the format's limit",
            where=path,
            expected=f"at most {MAX_HEADER_BYTES:,}",
            found=f"{length:,}",
        )
    if 8 + length > file_size:
        raise HeaderLengthError(
            "the header ends after the file",
            where=path,
            expected=f"{8 + length:,} bytes or more",
            found=f"{file_size:,}",
            fix="Fetch the file again.",
        )
    return length


def parse_header(raw: bytes, file_size: int, where: object) -> Header:
    """Check the JSON of a header against a file of ``file_size`` bytes. ``where`` is the file's name for errors."""
    fields = _parse_json(raw, where)
    metadata = _metadata(fields.pop("__metadata__", {}), where)
    data_offset = 8 + len(raw)
    entries = sorted(
        (_entry(name, value, where) for name, value in fields.items()), key=lambda entry: (entry.begin, entry.end)
    )
    _check_tiling(entries, file_size - data_offset, where)
    return Header(tuple(entries), metadata, data_offset, file_size)


def _parse_json(raw: bytes, where: object) -> dict[str, object]:
    if not raw.startswith(b"{"):
        raise HeaderTextError("the header is not a JSON object", where=where, expected="'{' first", found=repr(raw[:1]))
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise HeaderTextError(f"the header is not UTF-8 at byte {exc.start}", where=where) from exc
    _check_depth(text, where)
    try:
        fields = json.loads(text, object_pairs_hook=_object)
    except ValueError as exc:
        raise HeaderTextError(f"the header is not JSON ({exc})", where=where) from exc
    if isinstance(fields, _Repeated):
        raise DuplicateNameError(f"{fields.key!r} stands twice", where=where)
    if not isinstance(fields, dict):
        raise HeaderTextError("the header is not a JSON object", where=where, found=type(fields).__name__)
    return fields


@dataclass(frozen=True, slots=True)
class _Repeated:
    """An object that names ``key`` twice. It stands in for the object, so that the error can name the tensor."""

    key: str


def _object(pairs: list[tuple[str, object]]) -> dict[str, object] | _Repeated:
    fields = dict(pairs)
    return fields if len(fields) == len(pairs) else _Repeated(repeated_key(pairs))


_ESCAPE = re.compile(r"\\.", re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def _check_depth(text: str, where: object) -> None:
    """Each step passes over the text once, whatever it holds: an unfinished string ends with the text."""
    if "\\" in text:
        text = _ESCAPE.sub("", text)
    outside = "".join(text.split('"')[::2])
    brackets = outside.encode().translate(None, _NO_BRACKETS).decode()
    if brackets.replace("[]", "").replace("{}", "") in ("", "{}"):  # lists in entries in the file: as good as all
        return
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise HeaderDepthError(
                "the header is nested too deeply", where=where, expected=f"at most {MAX_DEPTH} levels"
            )


def _metadata(value: object, where: object) -> dict[str, str]:
    if isinstance(value, _Repeated):
        raise DuplicateNameError(f"__metadata__: {value.key!r} stands twice", where=where)
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise MetadataError("__metadata__ must map strings to strings", where=where)
    return value


def _entry(name: str, value: object, where: object) -> Entry:
    if not _is_unicode(name):
        raise HeaderTextError(f"{name!r}: half of a surrogate pair in a name", where=where)
    if isinstance(value, _Repeated):
        raise DuplicateNameError(f"{name!r}: {value.key!r} stands twice", where=where)
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        found = _short(sorted(value)) if isinstance(value, dict) else type(value).__name__
        raise EntryError(
            f"{name!r}: a malformed entry", where=where, expected="dtype, shape, data_offsets", found=found
        )
    dtype, shape, offsets = value["dtype"], _shape(value["shape"]), value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise DtypeError(
            f"{name!r}: unknown dtype", where=where, expected="one of " + ", ".join(DTYPE_BITS), found=_short(dtype)
        )
    if shape is None:
        raise ShapeError(
            f"{name!r}: not a shape", where=where, expected="a list of sizes", found=_short(value["shape"])
        )
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise OffsetsError(
            f"{name!r}: not a range of bytes", where=where, expected="[begin, end]", found=_short(offsets)
        )
    begin, end = offsets
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (end - begin):
        raise SizeError(
            f"{name!r}: data_offsets do not hold {dtype} {list(shape)}",
            where=where,
            expected=f"{bits / 8:,.0f} bytes",
            found=f"{end - begin:,}",
        )
    return Entry(name, dtype, shape, begin, end)


def _shape(value: object) -> tuple[int, ...] | None:
    """A list of sizes, of which there may be as many as a tensor has dimensions, and whose product is in range."""
    return _in_range(tuple(value)) if _are_sizes(value) and len(value) <= MAX_DIMENSIONS else None


@lru_cache(maxsize=4096)  # tens of thousands of tensors have a few dozen shapes
def _in_range(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape, where each product on the way is in range too, as the library has it."""
    return shape if all(product <= MAX_SIZE for product in accumulate(shape, mul)) else None


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    """Whether it is a list of whole numbers that sizes and offsets may be; a bool is none."""
    if type(value) is not list or not _INTEGERS.issuperset(map(type, value)):
        return False
    return not value or (min(value) >= 0 and max(value) <= MAX_SIZE)


def _is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8: JSON's escapes can spell halves of surrogate pairs, too."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: object) -> str:
    """The beginning of what may be a list of millions."""
    return repr(value[:8] if isinstance(value, list) else value)[:80]


def _check_tiling(entries: list[Entry], data_bytes: int, where: object) -> None:
    position, previous = 0, None
    for entry in entries:
        if entry.begin < position:
            raise OverlapError(
                f"{entry.name!r} begins within {previous!r}",
                where=where,
                expected=f"begin at {position:,}",
                found=f"{entry.begin:,}",
            )
        if entry.begin > position:
            raise GapError(
                f"a hole before {entry.name!r}",
                where=where,
                expected=f"begin at {position:,}",
                found=f"{entry.begin:,}",
            )
        position, previous = entry.end, entry.name
    if position > data_bytes:
        raise TruncatedError(
            f"{previous!r} and what precedes it need more data than the file has",
            where=where,
            expected=f"{position:,} bytes of data",
            found=f"{data_bytes:,}",
            fix="Fetch the file again.",
        )
    if position < data_bytes:
        raise TrailingBytesError(
            "bytes after the last tensor",
            where=where,
            expected=f"{position:,} bytes of data",
            found=f"{data_bytes:,}",
            fix="Fetch the file again.",
        )


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data: length and JSON, padded so that data starts at a multiple of 4096.

    Args:
        tensors: name, dtype and shape in the order of their bytes.
        metadata: goes into ``__metadata__``; loaders want ``format: pt`` there.

    Raises:
        HeaderLengthError: the header would be over the format's limit.
    """
    fields: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for name, dtype, shape in tensors:
        end = position + size_bytes(dtype, shape)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-(8 + len(raw)) % ALIGNMENT)
    if len(raw) > MAX_HEADER_BYTES:
        raise HeaderLengthError(
            "the header to be written is over the format's limit",
            expected=f"at most {MAX_HEADER_BYTES:,}",
            found=f"{len(raw):,}",
        )
    return struct.pack("<Q", len(raw)) + raw
