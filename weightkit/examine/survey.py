"""What lies at a path: its layout, its files and their headers. No defect stops it; each is kept."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from weightkit.checkpoint import INDEX_NAME, Entry, Index, read_index
from weightkit.checkpoint.folder import LOCK_NAME
from weightkit.durable import STATE_DIR
from weightkit.errors import (
    CheckpointError,
    FormatError,
    IndexFileError,
    MissingFileError,
    WeightkitError,
)
from weightkit.layouts.opening import (
    CONTINUE,
    FETCH,
    FETCH_INDEX,
    NOT_FINISHED,
    READABLE,
    is_unreadable,
    nothing_at,
    readable,
)
from weightkit.layouts.published import SINGLE_NAME
from weightkit.layouts.ranks import RankSet, rank_sets
from weightkit.layouts.scan import Scan, index_problems, scan_files, unlisted_files

Result = TypeVar("Result")
#: No checkpoint is cut into more; a file's name alone must not make a list of 10^12 names.
MAX_RANKS = 4096


@dataclass(frozen=True)
class Survey:
    """The files of a checkpoint.

    Attributes:
        path: what was asked for; ``folder`` is the folder that it is or lies in.
        layout: as in ``Report``.
        scan: headers by file name.
        index: None where the layout has none, or it could not be read.
        ranks: of rank files, which set they are.
        mixed: whether rank files of several sets lie together, so that no name says whose it is.
        whole: whether all files of the checkpoint were meant; False for one shard or one rank of several, where
            nothing can be called missing.
        problems: defects of files, headers and index.
    """

    path: Path
    folder: Path
    layout: str
    scan: Scan
    index: Index | None
    ranks: RankSet | None
    mixed: bool
    whole: bool
    problems: tuple[WeightkitError, ...]

    def held(self) -> Iterator[tuple[str, Entry]]:
        """Every tensor with the name of its file."""
        for file, header in self.scan.headers.items():
            for entry in header.entries:
                yield file, entry

    @property
    def complete(self) -> bool:
        """Whether a tensor that is not held is missing, rather than in a file that could not be read."""
        return self.whole and (self.index is not None or not self.scan.problems)


def attempt(function: Callable[[], Result], where: object) -> Result | WeightkitError:
    """The function's result, or the defect that it found; among them a value that no reader of a file thought of, and a
    file that the system does not let it read."""
    try:
        return function()
    except WeightkitError as problem:
        return problem
    except (ValueError, TypeError, OverflowError, RecursionError) as exc:
        return FormatError(f"a value that no checkpoint has there ({exc})", where=where, fix=FETCH)
    except OSError as exc:
        return FormatError(f"cannot be read ({exc.strerror})", where=where, fix="Let it be read, or fetch it again.")


def survey(path: Path) -> Survey:
    """Read index and headers of whatever lies at ``path``.

    Raises ``NotACheckpointError`` where there is nothing: no weight file, no index and no lock; and where the system
    does not let it look.
    """
    with readable(path):
        return _survey(path)


def _survey(path: Path) -> Survey:
    if path.is_file() and path.suffix == ".safetensors":
        return _survey_file(path)
    if not path.is_dir():
        raise nothing_at(path)
    if (path / INDEX_NAME).exists():
        return _survey_published(path)
    if sets := _rank_sets(path):
        return _survey_ranks(path, sets)
    if (path / SINGLE_NAME).exists():
        others = [name for name in _weight_files(path) if name != SINGLE_NAME]
        beside = _unlisted(path, others, f"a safetensors file beside {SINGLE_NAME}, and no index")
        return _survey_files(path, [SINGLE_NAME], "single file", [*_unfinished(path), *beside])
    return _survey_without_index(path)


def _survey_file(path: Path) -> Survey:
    folder = path.parent
    for ranks in _rank_sets(folder):
        if path.name in ranks.names():
            return _survey_files(
                folder, [path.name], "one rank file", [], path=path, ranks=ranks, whole=ranks.size == 1
            )
    index = attempt(lambda: read_index(folder / INDEX_NAME), path) if (folder / INDEX_NAME).is_file() else None
    shard = isinstance(index, Index) and path.name in index.weight_map.values()
    layout = "one shard" if shard else "single file"
    return _survey_files(folder, [path.name], layout, [], path=path, whole=not shard)


def _survey_published(folder: Path) -> Survey:
    path = folder / INDEX_NAME
    problems = _unfinished(folder)
    index = attempt(lambda: read_index(path), path) if path.is_file() else FormatError("not a file", where=path)
    if not isinstance(index, Index):
        return _survey_files(folder, _weight_files(folder), "published", [*problems, *_with_fix([index], FETCH_INDEX)])
    scan = scan_safely(folder, dict.fromkeys(index.weight_map.values()))
    problems += [*scan.problems, *_with_fix(index_problems(scan, index, path), FETCH_INDEX)]
    problems += _unlisted(folder, unlisted_files(folder, index), "a safetensors file that the index does not name")
    return Survey(folder, folder, "published", scan, index, None, False, True, tuple(problems))


def _unlisted(folder: Path, names: Iterable[str], what: str) -> list[WeightkitError]:
    return [
        CheckpointError(
            what,
            where=folder / name,
            fix="Loaders that read every file would load it too: move it away, or fetch the index that names it.",
        )
        for name in names
    ]


def _survey_ranks(folder: Path, sets: list[RankSet]) -> Survey:
    problems = _unfinished(folder)
    known = {name for ranks in sets for name in ranks.names()}
    problems += [
        CheckpointError("a safetensors file beside the rank files", where=folder / name, fix="Move it away.")
        for name in _weight_files(folder)
        if name not in known
    ]
    if len(sets) == 1:
        layout = f"{sets[0].size} {sets[0].kind} ranks"
        return _survey_files(folder, sets[0].names(), layout, problems, ranks=sets[0])
    mixed = CheckpointError(
        "rank files of several degrees in one folder",
        where=folder,
        expected="one set",
        found=", ".join(f"{ranks.size} {ranks.kind} ranks" for ranks in sets),
        fix="Move each set into a folder of its own.",
    )
    present = [name for name in _weight_files(folder) if name in known]
    return _survey_files(folder, present, "ranks of several degrees", [*problems, mixed], whole=False, mixed=True)


def _survey_without_index(folder: Path) -> Survey:
    names = _weight_files(folder)
    if not names and not (folder / LOCK_NAME).exists():
        raise nothing_at(folder)
    missing = MissingFileError("no index", where=folder / INDEX_NAME, fix="Fetch the index, or run the writer again.")
    return _survey_files(folder, names, "published", [*_unfinished(folder), missing])


def _survey_files(
    folder: Path,
    names: list[str],
    layout: str,
    problems: list[WeightkitError],
    *,
    path: Path | None = None,
    ranks: RankSet | None = None,
    mixed: bool = False,
    whole: bool = True,
) -> Survey:
    scan = scan_safely(folder, names)
    found = (*problems, *scan.problems, *([] if ranks or mixed else _repeated(scan)))
    return Survey(path or folder, folder, layout, scan, None, ranks, mixed, whole, found)


def scan_safely(folder: Path, names: Iterable[str]) -> Scan:
    """``scan_files`` for names from a hostile index: pipes and devices, which would be waited for, are not opened."""
    refused = {name: problem for name in names if (problem := _refusal(folder / name)) is not None}
    scan = scan_files(folder, [name for name in names if name not in refused])
    return Scan(folder, scan.headers, scan.stamps, tuple(_with_fix([*refused.values(), *scan.problems], FETCH)))


def _with_fix(problems: list[WeightkitError], fix: str) -> list[WeightkitError]:
    """The problems, each with a next step: its own, or this one."""
    for problem in problems:
        problem.fix = problem.fix or (READABLE if is_unreadable(problem) else fix)
    return problems


def _refusal(path: Path) -> WeightkitError | None:
    try:
        mode = path.stat().st_mode
    except OSError:
        return None  # missing, or unreadable: the header's reader says so
    except ValueError as exc:
        return IndexFileError(f"not a file name ({exc})", where=path)
    return None if stat.S_ISREG(mode) else FormatError("not a regular file", where=path)


def _repeated(scan: Scan) -> list[WeightkitError]:
    """Tensors in two files, where no index says which counts."""
    problems: list[WeightkitError] = []
    holders: dict[str, str] = {}
    for file, header in scan.headers.items():
        for entry in header.entries:
            if holders.setdefault(entry.name, file) != file:
                problems.append(
                    CheckpointError("in two files", where=entry.name, found=f"{holders[entry.name]} and {file}")
                )
    return problems


def _rank_sets(folder: Path) -> list[RankSet]:
    return [ranks for ranks in rank_sets(folder) if ranks.size <= MAX_RANKS]


def _weight_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def _unfinished(folder: Path) -> list[WeightkitError]:
    if not (folder / STATE_DIR).exists():
        return []
    return [CheckpointError(NOT_FINISHED, where=folder / STATE_DIR, fix=CONTINUE)]
