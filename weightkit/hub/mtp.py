"""Which files hold MTP tensors alone, found out without fetching them; index and config of what is left."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weightkit.checkpoint.folder import CONFIG_NAME
from weightkit.checkpoint.header import MAX_HEADER_BYTES, Header, HeaderLengthError, parse_header
from weightkit.checkpoint.index import INDEX_NAME, index_bytes, read_index
from weightkit.checkpoint.json_file import json_bytes, read_json_object
from weightkit.errors import ContentError, PlanError
from weightkit.family import Architecture, is_mtp
from weightkit.hub.line import Line
from weightkit.hub.listing import RemoteFile
from weightkit.hub.partial import Digests
from weightkit.hub.transport import Transport
from weightkit.layouts.declare import declare_no_mtp


@dataclass(frozen=True)
class WithoutMtp:
    """What ``--no-mtp`` comes to.

    Attributes:
        skipped: files that hold MTP tensors alone.
        derived: content by path of the files that must say so: the index without these tensors, and, where no MTP
            tensor is left, the config with ``num_nextn_predict_layers`` 0.
        notes: what the user must know.
    """

    skipped: tuple[str, ...] = ()
    derived: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def leave_out_mtp(lines: Mapping[str, Line], transport: Transport) -> WithoutMtp:
    """Read config, index and the headers of the files in question, by ranges.

    Raises:
        PlanError: no config or no index, so that no file can be told.
        WeightkitError: of the hub, or of a damaged config, index or header.
    """
    missing = [name for name in (CONFIG_NAME, INDEX_NAME) if name not in lines]
    if missing:
        raise PlanError(
            f"--no-mtp needs {' and '.join(missing)}, which the repository or the selection lacks", where="--no-mtp"
        )
    with tempfile.TemporaryDirectory(prefix="weightkit-") as folder:
        config_path, index_path = Path(folder, CONFIG_NAME), Path(folder, INDEX_NAME)
        config_path.write_bytes(read_remote(lines[CONFIG_NAME], transport))
        index_path.write_bytes(read_remote(lines[INDEX_NAME], transport))
        config, index = read_json_object(config_path), read_index(index_path)
    arch = Architecture.from_config(config)
    mixed: dict[str, bool] = {}
    for name, file in index.weight_map.items():
        mixed[file] = mixed.get(file, False) or not is_mtp(name, arch)
    skipped: dict[str, Header] = {}
    for name, holds_more in sorted(mixed.items()):
        if not holds_more and name in lines:
            header = read_remote_header(lines[name], transport)
            if header.entries and all(is_mtp(entry.name, arch) for entry in header.entries):
                skipped[name] = header
    kept = {name: file for name, file in index.weight_map.items() if file not in skipped}
    left = sorted({file for name, file in kept.items() if is_mtp(name, arch)})
    if not skipped:
        return WithoutMtp(notes=("--no-mtp: no file holds MTP tensors alone; nothing is left out",))
    removed = sum(entry.end - entry.begin for header in skipped.values() for entry in header.entries)
    if index.total_size is None:  # none is made up, then
        derived = {INDEX_NAME: json_bytes({"weight_map": dict(sorted(kept.items()))})}
    else:
        derived = {INDEX_NAME: index_bytes(kept, index.total_size - removed)}
    if left:
        note = f"--no-mtp: MTP tensors remain in {', '.join(left)}, with others; `weightkit strip` takes them out"
        return WithoutMtp(tuple(skipped), derived, (note,))
    derived[CONFIG_NAME] = json_bytes(declare_no_mtp(config))
    return WithoutMtp(tuple(skipped), derived)


def read_remote(line: Line, transport: Transport) -> bytes:
    """A small file, verified. Raises ``ContentError`` for other bytes than listed, twice."""
    for _ in range(2):
        content = _read(line, transport, 0, line.file.size_bytes)
        digests = Digests(line.file)
        digests.update(content)
        if digests.match(line.file):
            return content
    raise ContentError("not what the listing says", where=line.file.path, expected=line.file.content)


def read_remote_header(line: Line, transport: Transport) -> Header:
    """A safetensors header, by ranges. Raises ``HeaderError``."""
    file: RemoteFile = line.file
    if file.size_bytes < 8:
        raise HeaderLengthError("too short for a safetensors file", where=file.path, found=file.size_bytes)
    (length,) = struct.unpack("<Q", _read(line, transport, 0, 8))
    if length > min(MAX_HEADER_BYTES, file.size_bytes - 8):
        raise HeaderLengthError("the header ends after the file", where=file.path, found=length)
    return parse_header(_read(line, transport, 8, 8 + length), file.size_bytes, file.path)


def _read(line: Line, transport: Transport, begin: int, end: int) -> bytes:
    content = bytearray()
    line.pour(transport, begin, end, lambda offset, data: content.extend(data))
    return bytes(content)
