"""The routes of ModelScope that its clients call to download.

Source: what modelscope-hub 0.5 asks and reads (``_legacy_api.py``, ``_download.py``).
"""

from __future__ import annotations

from pathlib import PurePosixPath

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from weightkit.hub.mirror.body import file_response
from weightkit.hub.mirror.catalog import Catalog, NotFound, find_file
from weightkit.hub.mirror.contents import ChangedError, Repository, ServedFile

PREFIX = "/api/v1/"
_DATE_S = 1704067200  # clients want one; the same files must give the same answer everywhere


class ModelScope:
    """The routes over a catalog."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def routes(self) -> list[Route]:
        at = PREFIX + "models/{owner}/{name}"
        return [
            Route(at, self.info),
            Route(f"{at}/revisions", self.revisions),
            Route(f"{at}/repo/files", self.files),
            Route(f"{at}/repo", self.body),
        ]

    async def info(self, request: Request) -> Response:
        repository = self._repository(request, "master")
        owner, name = request.path_params["owner"], request.path_params["name"]
        return _data(
            {
                "Path": owner,
                "Name": name,
                "Revision": "master",
                "StorageSize": repository.size_bytes,
                "Visibility": 5,  # public
                "LastUpdatedTime": _DATE_S,
            }
        )

    async def revisions(self, request: Request) -> Response:
        self._repository(request, "master")
        branch = {"Revision": "master", "CreatedAt": _DATE_S}
        return _data({"RevisionMap": {"Branches": [branch], "Tags": []}})

    async def files(self, request: Request) -> Response:
        repository = self._repository(request)
        root = request.query_params.get("Root", "").strip("/")
        recursive = request.query_params.get("Recursive", "").lower() in ("true", "1")
        entries = [
            _entry(file, repository.commit)
            for path, file in repository.files.items()
            if (not root or path.startswith(f"{root}/"))
            and (recursive or PurePosixPath(path).parent.as_posix() == (root or "."))
        ]
        folders = [] if recursive else _folders(repository, root)
        return _data({"Files": folders + entries, "LatestCommitter": {"Id": repository.commit}})

    async def body(self, request: Request) -> Response:
        repository = self._repository(request)
        file = find_file(repository, request.query_params.get("FilePath", ""))
        return file_response(request, file, {"X-Linked-ETag": f'"{file.sha256}"'})

    def _repository(self, request: Request, revision: str | None = None) -> Repository:
        name = f"{request.path_params['owner']}/{request.path_params['name']}"
        return self._catalog.find(name, revision or request.query_params.get("Revision") or "master")


def refusal(exc: NotFound | ChangedError) -> Response:
    """An error as this hub's clients read it."""
    found = isinstance(exc, NotFound)
    status = 404 if found else 503
    code = 10010205001 if found else 10010100001
    return JSONResponse({"Code": code, "Success": False, "Message": str(exc), "Data": None}, status)


def _data(value: object) -> Response:
    return JSONResponse({"Code": 200, "Success": True, "Message": "success", "Data": value})


def _entry(file: ServedFile, commit: str) -> dict[str, object]:
    return {
        "Path": file.path,
        "Name": PurePosixPath(file.path).name,
        "Type": "blob",
        "Size": file.size_bytes,
        "Sha256": file.sha256,
        "IsLFS": file.large,
        "Revision": commit,
        "CommittedDate": _DATE_S,
    }


def _folders(repository: Repository, root: str) -> list[dict[str, object]]:
    """The folders directly in ``root``."""
    parents = {parent for path in repository.files for parent in PurePosixPath(path).parents}
    found = sorted(p.as_posix() for p in parents if p.as_posix() != "." and p.parent.as_posix() == (root or "."))
    return [{"Path": path, "Name": PurePosixPath(path).name, "Type": "tree", "Size": 0} for path in found]
