"""Open whatever lies at a path."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from weightkit.checkpoint import INDEX_NAME, Checkpoint
from weightkit.checkpoint.folder import CONFIG_NAME
from weightkit.checkpoint.json_file import read_json_object
from weightkit.checkpoint.remote import locate
from weightkit.durable import STATE_DIR
from weightkit.errors import (
    ConfigError,
    FormatError,
    IndexFileError,
    MissingFileError,
    MissingTensorError,
    NotACheckpointError,
    Problems,
    WeightkitError,
)
from weightkit.layouts.published import SINGLE_NAME, open_published, open_single
from weightkit.layouts.ranks import open_ranks, rank_sets
from weightkit.remote.path import is_remote
from weightkit.units import counted

NOT_FINISHED = "the writing of this folder was not finished"
CONTINUE = "Run the command that fills this folder again: it continues where it stopped."
FETCH = "Fetch the file again."
FETCH_INDEX = "Fetch the index again; if that does not help, the file too."
READABLE = "Check the permissions of file and folder, and the disk that they lie on."
#: As the hubs name the files of a checkpoint that an index belongs to.
_SHARD = re.compile(r"model-\d{5}-of-\d{5,6}\.safetensors")


def open_checkpoint(
    path: str | Path, *, config: str | Path | Mapping[str, object] | None = None, replicas_of: int = 0
) -> Checkpoint:
    """Open a checkpoint in any layout. Headers are read, tensor data is not.

    Args:
        path: a folder in the published layout or of rank files, or one safetensors file; here, or at an address
            (``hf://owner/name[@revision]``, ``s3://bucket/folder``, ``https://host/folder``).
        config: the model's ``config.json`` (a path or its content) where the folder has none.
        replicas_of: of rank files, the rank whose file what all of them hold is read from.

    Raises:
        NotACheckpointError: nothing recognisable at the path; says what was found.
        CheckpointError, FormatError: files are missing, damaged or contradict each other; all problems at once.
        ConfigError: no config, or a broken one.
        HubError: an address that nothing can be had from; says why.
    """
    path = locate(path)
    try:
        with readable(path):
            return _open(path, config, replicas_of)
    except WeightkitError as error:
        if not is_remote(path):
            advise(error)
        raise


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raises ``NotACheckpointError`` for what the system refuses to list or to look at."""
    try:
        yield
    except OSError as exc:
        what = f"cannot be read ({exc.strerror})"
        raise NotACheckpointError(what, where=exc.filename or path, fix=READABLE) from exc


def advise(error: WeightkitError) -> None:
    """Give defects of files that name no next step the usual one."""
    for problem in error.problems if isinstance(error, Problems) else (error,):
        if problem.fix is None and isinstance(problem, (FormatError, MissingFileError, MissingTensorError)):
            usual = FETCH_INDEX if isinstance(problem, (IndexFileError, MissingTensorError)) else FETCH
            problem.fix = READABLE if is_unreadable(problem) else usual


def is_unreadable(problem: WeightkitError) -> bool:
    """Whether the system refused to read a file, of whose contents nothing is known then."""
    return problem.what.startswith("cannot be read (")


def _open(path: Path, config: str | Path | Mapping[str, object] | None, replicas_of: int) -> Checkpoint:
    if path.is_file() and path.suffix == ".safetensors":
        return open_single(path, _config(path.parent, config))
    if not path.is_dir():
        raise nothing_at(path)
    if (path / INDEX_NAME).is_file():
        return open_published(path, _config(path, config))
    if rank_sets(path):
        return open_ranks(path, _config(path, config), replicas_of=replicas_of)
    if (path / SINGLE_NAME).is_file():
        return open_single(path / SINGLE_NAME, _config(path, config))
    raise nothing_at(path)


def nothing_at(path: Path) -> NotACheckpointError:
    """What to raise where no checkpoint lies at ``path``: it says what was found there."""
    if not path.is_dir():
        what = "not a safetensors file" if path.exists() else "no such file or folder"
        return NotACheckpointError(what, where=path, fix="Name a checkpoint's folder, or one safetensors file.")
    names = sorted(entry.name for entry in path.iterdir())
    if STATE_DIR in names:
        return NotACheckpointError(NOT_FINISHED, where=path, fix=CONTINUE)
    shards = sum(_SHARD.fullmatch(name) is not None for name in names)
    if shards:
        return NotACheckpointError(
            "no index of the files here",
            where=path,
            expected=INDEX_NAME,
            found=f"{counted(shards, 'file')} such as {next(filter(_SHARD.fullmatch, names))}",
            fix=f"Fetch {INDEX_NAME} into the folder.",
        )
    return NotACheckpointError(
        "no checkpoint in this folder",
        where=path,
        expected=f"{INDEX_NAME}, {SINGLE_NAME}, or rank files such as model0-mp8.safetensors",
        found=_some(names),
        fix="Name the folder that holds these files.",
    )


def _config(folder: Path, config: str | Path | Mapping[str, object] | None) -> Mapping[str, object]:
    if isinstance(config, Mapping):
        return config
    path = folder / CONFIG_NAME if config is None else Path(config)
    if not path.is_file():
        what, fix = "no config.json", "Copy the model's config.json there, or name one with --config."
        if config is not None:
            what, fix = "no such file" if not path.exists() else "not a file", "Name the model's config.json."
        raise ConfigError(what, where=path, fix=fix)
    return read_json_object(path, FormatError)


def _some(names: Sequence[str]) -> str:
    if not names:
        return "an empty folder"
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
