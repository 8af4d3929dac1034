"""What is served under which id, and the refusals that both protocols share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from weightkit.errors import PlanError, WeightkitError
from weightkit.hub.mirror.contents import Repository, ServedFile


class NotFound(WeightkitError):  # noqa: N818 - it is an answer, not a failure of ours
    """What was asked for is not here. ``code`` is the Hugging Face hub's word for which of the three it is."""

    code = "EntryNotFound"


class NoRepository(NotFound):
    """No folder is served under this id."""

    code = "RepoNotFound"


class NoRevision(NotFound):
    """The repository is here in one state, and that is not the one asked for."""

    code = "RevisionNotFound"


class Catalog:
    """Repositories by id.

    Raises ``PlanError`` where two of them would answer to one id.
    """

    def __init__(self, repositories: Iterable[Repository]) -> None:
        self._by_id: dict[str, Repository] = {}
        for repository in repositories:
            for name in repository.ids:
                if name in self._by_id:
                    raise PlanError(
                        "two folders would be served under one id",
                        where=name,
                        found=f"{self._by_id[name].folder} and {repository.folder}",
                        fix="Give one of them another: --name owner/name=PATH",
                    )
                self._by_id[name] = repository

    def __iter__(self) -> Iterator[tuple[str, Repository]]:
        return iter(self._by_id.items())

    def find(self, name: str, revision: str) -> Repository:
        """Raises ``NoRepository`` and ``NoRevision``."""
        repository = self._by_id.get(name)
        if repository is None:
            raise NoRepository("no such repository on this mirror", where=name)
        if not repository.answers_to(revision):
            raise NoRevision("this mirror has the repository in another revision", where=name, found=repository.commit)
        return repository


def find_file(repository: Repository, path: str) -> ServedFile:
    """Raises ``NotFound``. Only a path that stands in the listing is one: nothing is looked up on the disk."""
    file = repository.files.get(path)
    if file is None:
        raise NotFound("no such file in the repository", where=path)
    return file
