"""Headers of many files, read together; every defect found is kept, so that all are reported at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from weightkit.checkpoint import Header, Index, read_header
from weightkit.checkpoint.folder import require_inside
from weightkit.checkpoint.stamp import Stamp, stamp_file
from weightkit.errors import IndexFileError, MissingTensorError, WeightkitError

#: Headers are read by several threads, to hide the latency of network filesystems.
READERS = 8


@dataclass(frozen=True)
class Scan:
    """Headers and stamps by file name; ``problems`` are the files that have none, each with its reason."""

    folder: Path
    headers: Mapping[str, Header]
    stamps: Mapping[str, Stamp]
    problems: tuple[WeightkitError, ...]


def scan_files(folder: Path, names: Iterable[str]) -> Scan:
    """Read the headers of ``names`` in ``folder``."""
    names = list(names)

    def scan(name: str) -> tuple[Header, Stamp] | WeightkitError:
        path = folder / name
        try:
            require_inside(folder, path)
            return read_header(path), stamp_file(path)
        except WeightkitError as exc:
            return exc

    with ThreadPoolExecutor(READERS) as pool:
        results = dict(zip(names, pool.map(scan, names), strict=True))
    good = {name: result for name, result in results.items() if isinstance(result, tuple)}
    return Scan(
        folder,
        {name: header for name, (header, _) in good.items()},
        {str(folder / name): stamp for name, (_, stamp) in good.items()},
        tuple(result for result in results.values() if isinstance(result, WeightkitError)),
    )


def index_problems(scan: Scan, index: Index, index_path: Path) -> list[WeightkitError]:
    """The index held against the headers, both ways, and its ``total_size``."""
    return [*placement_problems(scan, index, index_path), *total_size_problems(scan, index, index_path)]


def placement_problems(scan: Scan, index: Index, index_path: Path) -> list[WeightkitError]:
    """Where index and headers contradict each other about which file holds which tensor."""
    problems: list[WeightkitError] = []
    holders: dict[str, str] = {}
    for file, header in scan.headers.items():
        for entry in header.entries:
            if entry.name in holders:
                problems.append(
                    IndexFileError(
                        f"{entry.name!r} is in two files", where=index_path, found=f"{holders[entry.name]}, {file}"
                    )
                )
            holders[entry.name] = file
    for name, file in index.weight_map.items():
        if file in scan.headers and holders.get(name) != file:
            problems.append(
                MissingTensorError(
                    f"{name}: not in the file that the index names", where=scan.folder / file, found=holders.get(name)
                )
            )
    for name, file in holders.items():
        if name not in index.weight_map:
            problems.append(IndexFileError(f"{name}: in {file}, but not in the index", where=index_path))
    return problems


def total_size_problems(scan: Scan, index: Index, index_path: Path) -> list[WeightkitError]:
    """A ``total_size`` that is missing or not true; it is not judged where files are missing."""
    problems: list[WeightkitError] = []
    if index.total_size is None:
        problems.append(IndexFileError("metadata.total_size is missing", where=index_path))
    elif not scan.problems:
        total = sum(header.file_size - header.data_offset for header in scan.headers.values())
        if index.total_size != total:
            problems.append(
                IndexFileError(
                    "metadata.total_size is not the bytes of tensor data",
                    where=index_path,
                    expected=f"{total:,}",
                    found=f"{index.total_size:,}",
                )
            )
    return problems


def unlisted_files(folder: Path, index: Index) -> list[str]:
    """Safetensors files beside the index that it does not name."""
    listed = set(index.weight_map.values())
    return sorted(path.name for path in folder.glob("*.safetensors") if path.name not in listed)
