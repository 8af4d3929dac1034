"""Open whatever lies at a path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from weightkit.checkpoint import INDEX_NAME, Checkpoint
from weightkit.checkpoint.folder import CONFIG_NAME
from weightkit.checkpoint.json_file import read_json_object
from weightkit.errors import ConfigError, FormatError, NotACheckpointError
from weightkit.layouts.published import SINGLE_NAME, open_published, open_single
from weightkit.layouts.ranks import open_ranks, rank_sets


def open_checkpoint(path: str | Path, *, config: str | Path | Mapping[str, object] | None = None) -> Checkpoint:
    """Open a checkpoint in any layout. Headers are read, tensor data is not.

    Args:
        path: a folder in the published layout or of rank files, or one safetensors file.
        config: the model's ``config.json`` (a path or its content) where the folder has none.

    Raises:
        NotACheckpointError: nothing recognisable at the path; says what was found.
        CheckpointError, FormatError: files are missing, damaged or contradict each other; all problems at once.
        ConfigError: no config, or a broken one.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise NotACheckpointError("no such file or folder", where=path)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise NotACheckpointError("not a safetensors file", where=path)
        return open_single(path, _config(folder, config))
    if (path / INDEX_NAME).is_file():
        return open_published(path, _config(folder, config))
    if rank_sets(path):
        return open_ranks(path, _config(folder, config))
    if (path / SINGLE_NAME).is_file():
        return open_single(path / SINGLE_NAME, _config(folder, config))
    raise NotACheckpointError(
        "no checkpoint in this folder",
        where=path,
        expected=f"{INDEX_NAME}, {SINGLE_NAME}, or rank files such as model0-mp8.safetensors",
        found=_contents(path),
    )


def _config(folder: Path, config: str | Path | Mapping[str, object] | None) -> Mapping[str, object]:
    if isinstance(config, Mapping):
        return config
    path = folder / CONFIG_NAME if config is None else Path(config)
    if not path.is_file():
        raise ConfigError(
            "no config.json", where=path, fix="Copy the model's config.json there, or name one with --config."
        )
    return read_json_object(path, FormatError)


def _contents(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return "an empty folder"
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
