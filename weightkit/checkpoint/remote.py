"""What lies at an address: the files of a repository, of a bucket's folder, of a web server's, with their checksums.

A repository is asked for its commit first, and everything is read at that. A web server has no listing: the folder's
``weightkit.lock.json`` is one; without it, the index names the weights, a page of links may name more, and the usual
names of config and tokenizer files are tried.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from weightkit.checkpoint.folder import CONFIG_NAME, LOCK_NAME
from weightkit.checkpoint.index import INDEX_NAME, is_file_name, is_relative_path, read_index
from weightkit.checkpoint.lock import Lock, read_lock
from weightkit.errors import ListingError, RepositoryError, UnreachableError, raise_all
from weightkit.remote.address import HubAddress, parse_hub, require_readable
from weightkit.remote.path import Entry, Folder, RemotePath, as_path, is_known, register
from weightkit.remote.patience import Hiccup, wait_from_headers
from weightkit.remote.ranges import (
    DEFAULT_PATIENCE,
    OFFLINE,
    Version,
    WebRanges,
    no_ranges,
    refusal,
    web_tag,
)
from weightkit.remote.web import TRANSIENT, Answer, Connection, total_of

Result = TypeVar("Result")
#: Files that are asked for where nothing lists a web server's folder.
USUAL_NAMES = (
    INDEX_NAME,
    CONFIG_NAME,
    "model.safetensors",
    "chat_template.jinja",
    "configuration_deepseek.py",
    "demo_config.json",
    "generation_config.json",
    "merges.txt",
    "modeling_deepseek.py",
    "quantize_config.json",
    "special_tokens_map.json",
    "tiktoken.model",
    "tokenization_kimi.py",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
#: Of a page of links no more is read, and no more names are tried.
PAGE_BYTES, PAGE_NAMES = 4 << 20, 4096
PROBES = 16
_LINK = re.compile(r"<a\s[^>]*?href\s*=\s*[\"']([^\"'#?]+)[\"']", re.IGNORECASE)
_CHECK = "Check the name (owner/name[@revision]); a private repository needs a token."


def locate(what: str | PathLike[str]) -> Path:
    """A local path as it is; of an address what lies there, asked for anew, as a ``RemotePath`` with the commit. Such a
    path is returned as it is.

    Raises:
        NotACheckpointError: an address that nothing is read from.
        AccessError: gated, private, or without credentials.
        RepositoryError: no such repository, revision, bucket, folder or file.
        UnreachableError: no answer; a server that serves no ranges; or a package that is missing.
    """
    path = as_path(what)
    if not isinstance(path, RemotePath) or (isinstance(what, RemotePath) and is_known(what)):
        return path
    address = str(path)
    require_readable(address)
    scheme = address.partition("://")[0]
    opened = {"hf": _open_hub, "s3": _open_store}.get(scheme, _open_web)(address)
    return _require_there(opened)


def _require_there(path: RemotePath) -> RemotePath:
    if not path.exists():
        raise RepositoryError("no such file or folder", where=path)
    return path


def _ask(question: Callable[[], Result], address: str) -> Result:
    """The answer, asked for again after hiccups."""
    try:
        return DEFAULT_PATIENCE.ask(question, threading.Event())
    except Hiccup as hiccup:
        raise UnreachableError(f"does not answer ({hiccup.reason})", where=address, fix=OFFLINE) from hiccup


def _checked(names: Iterable[str], address: str) -> None:
    """Raise ``ListingError`` for paths that do not stay in a folder."""
    what = "a path that does not stay in the folder"
    bad = [repr(name)[:200] for name in names if not is_relative_path(name)]
    problems = [ListingError(what, where=address, found=found) for found in bad]
    raise_all("a listing that cannot be trusted", problems, where=address)


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def _open_hub(address: str) -> RemotePath:
    from weightkit.remote.hugging_face import Repository

    asked = parse_hub(address)
    repository = Repository(asked.repo, fix=_CHECK)
    commit = _ask(lambda: repository.commit(asked.revision or "main"), address)
    listed = _ask(lambda: repository.files(commit), address)
    _checked((file.path for file in listed), address)
    entries = {}
    for file in listed:
        tag = f"sha256:{file.sha256}" if file.sha256 else f"git-sha1:{file.git_sha1}"
        entries[file.path] = Entry(Version(file.size_bytes, tag), file.sha256, file.git_sha1)
    pinned = HubAddress(asked.repo, commit, "")
    register(Folder(str(pinned), entries, "the hub's listing"))
    return RemotePath(str(replace(pinned, path=asked.path)))


# --- object stores ----------------------------------------------------------------------------------------------------


def _open_store(address: str) -> RemotePath:
    from weightkit.remote.store import list_folder

    place, path = _folder_and_file(address)
    versions = _ask(lambda: list_folder(place), place)
    if not versions:
        raise RepositoryError("no files there", where=place, fix="Check the bucket and the folder's name.")
    entries = {name: Entry(version) for name, version in versions.items() if is_relative_path(name)}
    return _with_lock(Folder(place, entries)) / path


def _folder_and_file(address: str) -> tuple[str, str]:
    """The folder, and the weight file in it, where the address is one's."""
    if not address.endswith(".safetensors"):
        return address, ""
    folder, _, name = address.rpartition("/")
    return folder, name


def _with_lock(folder: Folder) -> RemotePath:
    """The folder with the checksums of its lock."""
    path = register(folder)
    lock = read_lock(path)
    if lock is not None:
        folder.recorded_by = LOCK_NAME
        for name, locked in lock.files.items():
            entry = folder.entries.get(name)
            if entry is not None and entry.size_bytes == locked.size_bytes:
                folder.entries[name] = replace(entry, sha256=locked.sha256)
    return path


# --- web servers ------------------------------------------------------------------------------------------------------


def _open_web(address: str) -> RemotePath:
    place, path = _folder_and_file(address)
    web = WebRanges(DEFAULT_PATIENCE)
    try:
        return _Probing(place, web).open(path) / path
    finally:
        web.close()


class _Probing:
    """Asks a web server for the files of a folder, one by one."""

    def __init__(self, address: str, web: WebRanges) -> None:
        self._address, self._web = address, web
        self._refused: dict[str, int] = {}
        self._whole: set[str] = set()
        self._folder = Folder(address, {})

    def open(self, file: str) -> RemotePath:
        path = register(self._folder)
        self._probe([LOCK_NAME])
        lock = self._lock(path)
        if lock is not None:
            self._probe([*lock.files, CONFIG_NAME])
        else:
            self._probe(dict.fromkeys([*USUAL_NAMES, *self._links(), *([file] if file else [])]))
            if INDEX_NAME in self._folder.entries:
                self._probe(dict.fromkeys(read_index(path / INDEX_NAME).weight_map.values()))
        self._require_usable(file)
        return _with_lock(self._folder)

    def _lock(self, path: RemotePath) -> Lock | None:
        return read_lock(path) if LOCK_NAME in self._folder.entries else None

    def _probe(self, names: Iterable[str]) -> None:
        """Add those of the files that are there."""
        asked = [name for name in names if name not in self._folder.entries]
        with ThreadPoolExecutor(PROBES) as pool:
            found = list(pool.map(self._ask_for, asked))
        for name, entry in zip(asked, found, strict=True):
            if entry is not None:
                self._folder.entries[name] = entry

    def _ask_for(self, name: str) -> Entry | None:
        where = f"{self._address}/{name}"
        answer = _ask(lambda: self._answer(where), where)
        size = total_of(answer)
        if size is None and answer.status in (200, 206, 416):
            raise UnreachableError("the server does not tell the size of a file", where=where)
        if size is None:
            self._refused[name] = answer.status
            return None
        if answer.status == 200 and size > 1:
            self._whole.add(name)
        return Entry(Version(size, web_tag(answer.headers)))

    def _answer(self, where: str) -> Answer:
        answer = self._web.probe(where)
        if answer.status in TRANSIENT or answer.status >= 500:
            raise Hiccup(f"HTTP {answer.status}", after_s=wait_from_headers(answer.headers))
        return answer

    def _links(self) -> list[str]:
        """The names of files that the folder's own page links to, where it has one."""

        connection = Connection(DEFAULT_PATIENCE, netrc=True)
        try:
            answer = connection.get(f"{self._address}/", None)
            page = b""
            if answer.status == 200 and "html" in answer.headers.get("Content-Type", ""):
                page = answer.response.raw.read(PAGE_BYTES, decode_content=True)
            answer.response.close()
        except (Hiccup, OSError, ValueError):
            return []  # it need not have one
        finally:
            connection.close()
        names = (unquote(link) for link in _LINK.findall(page.decode("utf-8", "replace")))
        return [name for name in dict.fromkeys(names) if is_file_name(name)][:PAGE_NAMES]

    def _require_usable(self, file: str) -> None:
        """Raise where nothing there is a checkpoint's, or the weights can only be had whole."""
        entries = self._folder.entries
        weights = [name for name in entries if name.endswith(".safetensors")]
        whole = [name for name in weights if name in self._whole]
        if whole:
            raise no_ranges(f"{self._address}/{whole[0]}")
        if entries and (not file or file in entries):
            return
        refused = [self._refused.get(name, 404) for name in ([file] if file else [INDEX_NAME, LOCK_NAME, CONFIG_NAME])]
        where = f"{self._address}/{file}".rstrip("/")
        denied = [status for status in refused if status in (401, 403)]
        if denied:
            raise refusal(where, denied[0])
        raise RepositoryError(
            "no checkpoint in this folder",
            where=where,
            expected=f"{INDEX_NAME}, model.safetensors or {LOCK_NAME}",
            found=f"HTTP {refused[0]}",
            fix="Name the folder that holds these files.",
        )
