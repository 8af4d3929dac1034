"""The routes of the Hugging Face hub that its clients call to download.

Source: what huggingface_hub 2.4 asks and reads (``hf_api.py``, ``file_download.py``), and the hub's OpenAPI description
at https://huggingface.co/.well-known/openapi.json.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import PurePosixPath
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from weightkit.hub.mirror.body import file_response
from weightkit.hub.mirror.catalog import Catalog, NotFound, find_file
from weightkit.hub.mirror.contents import ChangedError, Repository, ServedFile

#: As many entries a page of a listing as the hub has.
PAGE_SIZE = 1000
#: The hub takes no more paths in one question, and no longer body is read.
MAX_PATHS = 1000
MAX_QUESTION_BYTES = 1 << 20
_DATE = "2024-01-01T00:00:00.000Z"  # clients want one; the same files must give the same answer everywhere


class HuggingFace:
    """The routes over a catalog."""

    def __init__(self, catalog: Catalog, page_size: int = PAGE_SIZE) -> None:
        self._catalog, self._page_size = catalog, page_size

    def routes(self) -> list[Route]:
        at = "/api/models/{owner}/{name}"
        return [
            Route("/api/models", self.models),
            Route(at, self.info),
            Route(f"{at}/refs", self.refs),
            Route(f"{at}/revision/{{revision:path}}", self.info),
            Route(f"{at}/tree/{{revision}}", self.tree),
            Route(f"{at}/tree/{{revision}}/{{path:path}}", self.tree),
            Route(f"{at}/paths-info/{{revision:path}}", self.paths_info, methods=["POST"]),
            Route("/{owner}/{name}/resolve/{revision}/{path:path}", self.resolve),
        ]

    async def models(self, request: Request) -> Response:
        return JSONResponse([_card(name, repository) for name, repository in self._catalog])

    async def info(self, request: Request) -> Response:
        name, repository = self._repository(request)
        blobs = request.query_params.get("blobs", "").lower() in ("true", "1")
        siblings = [_sibling(file, blobs=blobs) for file in repository.files.values()]
        return JSONResponse({**_card(name, repository), "siblings": siblings, "usedStorage": repository.size_bytes})

    async def refs(self, request: Request) -> Response:
        _, repository = self._repository(request)
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.commit}
        return JSONResponse({"branches": [main], "converts": [], "tags": [], "pullRequests": []})

    async def tree(self, request: Request) -> Response:
        _, repository = self._repository(request)
        folder = request.path_params.get("path", "").strip("/")
        recursive = request.query_params.get("recursive", "").lower() in ("true", "1")
        entries = list(_entries(repository, folder, recursive=recursive))
        if folder and not entries:
            raise NotFound("no such folder in the repository", where=folder)
        start, size = _number(request, "cursor", 0), min(_number(request, "limit", self._page_size), self._page_size)
        stop = start + max(1, size)
        headers = {"X-Repo-Commit": repository.commit}
        if stop < len(entries):
            headers["Link"] = f'<{request.url.include_query_params(cursor=stop)}>; rel="next"'
        return JSONResponse(entries[start:stop], headers=headers)

    async def paths_info(self, request: Request) -> Response:
        _, repository = self._repository(request)
        paths = [path.strip("/") for path in await _asked_paths(request)]
        folders = _folders(repository.files)
        entries = [
            _file_entry(repository.files[path]) if path in repository.files else _folder_entry(path)
            for path in paths
            if path in repository.files or path in folders
        ]
        return JSONResponse(entries)

    async def resolve(self, request: Request) -> Response:
        _, repository = self._repository(request)
        commit = {"X-Repo-Commit": repository.commit}
        try:
            file = find_file(repository, request.path_params["path"])
            if file.large:
                commit |= {"X-Linked-Size": str(file.size_bytes), "X-Linked-Etag": f'"{file.sha256}"'}
            return file_response(request, file, commit)
        except NotFound as exc:  # with the commit: clients keep in mind that this commit lacks this file
            return refusal(exc, commit)

    def _repository(self, request: Request) -> tuple[str, Repository]:
        name = f"{request.path_params['owner']}/{request.path_params['name']}"
        return name, self._catalog.find(name, request.path_params.get("revision", "main"))


def refusal(exc: NotFound | ChangedError, headers: dict[str, str] | None = None) -> Response:
    """An error as this hub's clients read it."""
    message = exc.message.encode("ascii", "backslashreplace").decode().replace("\n", " ")
    named = {"X-Error-Code": exc.code} if isinstance(exc, NotFound) else {}
    status = 404 if isinstance(exc, NotFound) else 503
    return JSONResponse({"error": str(exc)}, status, {**(headers or {}), **named, "X-Error-Message": message})


def _card(name: str, repository: Repository) -> dict[str, object]:
    return {
        "_id": hashlib.sha256(name.encode()).hexdigest()[:24],
        "id": name,
        "modelId": name,
        "author": name.partition("/")[0],
        "sha": repository.commit,
        "lastModified": _DATE,
        "createdAt": _DATE,
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "library_name": "transformers",
        "tags": ["safetensors"],
    }


def _lfs(file: ServedFile, key: str) -> dict[str, object]:
    return {key: file.sha256, "size": file.size_bytes, "pointerSize": file.pointer_bytes}


def _sibling(file: ServedFile, *, blobs: bool) -> dict[str, object]:
    entry: dict[str, object] = {"rfilename": file.path}
    if blobs:
        entry |= {"size": file.size_bytes, "blobId": file.blob_id}
        if file.large:
            entry["lfs"] = _lfs(file, "sha256")
    return entry


def _file_entry(file: ServedFile) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": file.path, "size": file.size_bytes, "oid": file.blob_id}
    return {**entry, "lfs": _lfs(file, "oid")} if file.large else entry


def _folder_entry(path: str) -> dict[str, object]:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha256(path.encode()).hexdigest()[:40]}


def _folders(paths: Iterable[str]) -> set[str]:
    """All folders that the paths lie in."""
    parents = (parent.as_posix() for path in paths for parent in PurePosixPath(path).parents)
    return {parent for parent in parents if parent != "."}


def _entries(repository: Repository, folder: str, *, recursive: bool) -> Iterable[dict[str, object]]:
    """Folders, then files, below ``folder``; all of them, or those directly in it."""

    def is_listed(path: str) -> bool:
        parent = PurePosixPath(path).parent.as_posix()
        inside = not folder or path.startswith(f"{folder}/")
        return inside and (recursive or parent == (folder or "."))

    for path in sorted(_folders(repository.files)):
        if is_listed(path):
            yield _folder_entry(path)
    for path, file in repository.files.items():
        if is_listed(path):
            yield _file_entry(file)


def _number(request: Request, key: str, default: int) -> int:
    """A number of the query; the default for anything else."""
    text = request.query_params.get(key, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else default


async def _asked_paths(request: Request) -> list[str]:
    """``paths`` of a form or of a JSON object, as clients send either."""
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_QUESTION_BYTES:
            return []
    if request.headers.get("content-type", "").startswith("application/json"):
        return _json_paths(bytes(raw))
    return parse_qs(raw.decode("utf-8", "replace")).get("paths", [])[:MAX_PATHS]


def _json_paths(raw: bytes) -> list[str]:
    import json

    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return []
    paths = value.get("paths") if isinstance(value, dict) else None
    return [path for path in paths if isinstance(path, str)][:MAX_PATHS] if isinstance(paths, list) else []
