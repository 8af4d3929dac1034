"""What lies in a checkpoint's folder: which paths may be read, and the small files that travel with the weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from weightkit.checkpoint.index import INDEX_NAME
from weightkit.errors import FormatError
from weightkit.remote.path import is_remote

CONFIG_NAME = "config.json"
LOCK_NAME = "weightkit.lock.json"
CHUNK_BYTES = 1 << 20
#: Weights in any format, and what downloads leave behind: not side files.
WEIGHT_SUFFIXES = frozenset(
    (
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".gguf",
        ".onnx",
        ".h5",
        ".msgpack",
        ".npz",
        ".partial",
        ".incomplete",
        ".lock",
        ".aria2",
    )
)


@dataclass(frozen=True, slots=True)
class SideFile:
    """A small file of the folder (tokenizer, chat template, code): copied from ``path``, or ``content`` itself."""

    path: Path | None = None
    content: bytes | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes as it stands."""
        if self.path is None:
            return len(self.content or b"")
        return self.path.stat().st_size

    def chunks(self) -> Iterator[bytes]:
        """The content in pieces, so that a large file among the small ones costs no memory.

        Raises ``FormatError`` for a file that cannot be read.
        """
        if self.path is None:
            yield self.content or b""
            return
        try:
            with self.path.open("rb", buffering=0) as file:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
        except OSError as exc:
            raise FormatError(f"cannot be read ({exc.strerror})", where=self.path) from exc

    def read(self) -> bytes:
        """All of it."""
        return b"".join(self.chunks())


def side_files(folder: Path) -> Mapping[str, SideFile]:
    """Relative POSIX path to file, sorted: all but weights, the index, the config, our own files and hidden ones."""
    return {path.relative_to(folder).as_posix(): SideFile(path) for path in _side_paths(folder)}


def _side_paths(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _side_paths(entry)
        elif (
            entry.is_file()
            and entry.suffix not in WEIGHT_SUFFIXES
            and entry.name not in (INDEX_NAME, CONFIG_NAME, LOCK_NAME)
        ):
            require_inside(folder, entry)
            yield entry


def require_inside(folder: Path, path: Path) -> None:
    """Raise ``FormatError`` where ``path`` leads out of ``folder`` through a link.

    The hub client's cache is a known exception: its snapshots link into ``blobs`` of the same repository.
    """
    if is_remote(folder):
        return  # it has no links
    real, roots = Path(os.path.realpath(path)), [Path(os.path.realpath(folder))]
    if folder.absolute().parent.name == "snapshots":
        roots.append(Path(os.path.realpath(folder.absolute().parent.parent / "blobs")))
    if not any(real.is_relative_to(root) for root in roots):
        raise FormatError(
            "a link that leads out of the checkpoint's folder",
            where=path,
            found=real,
            fix="Copy the file into the folder, or open the folder where it lies.",
        )
