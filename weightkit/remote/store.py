"""Files in object stores, through fsspec: ``s3://`` by s3fs.

Credentials and endpoints come from the usual places: ``AWS_ACCESS_KEY_ID`` and its kin, ``AWS_PROFILE``,
``AWS_ENDPOINT_URL``, ~/.aws; ``FSSPEC_S3_ANON=true`` reads public buckets without any.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from weightkit.errors import AccessError, HubError, RepositoryError, SourceChangedError, UnreachableError
from weightkit.remote.patience import Hiccup
from weightkit.remote.ranges import OFFLINE, Tries, Version, changed

LOGIN = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; FSSPEC_S3_ANON=true reads a public bucket."


def filesystem(address: str) -> Any:
    """fsspec's filesystem of an address. Raises ``UnreachableError`` where a package is missing."""
    try:
        import fsspec

        return fsspec.filesystem(address.partition("://")[0])
    except ImportError as exc:
        raise UnreachableError(
            f"a package that reads it is missing ({exc.name or exc})",
            where=address,
            fix="pip install 'weightkit[remote]'",
        ) from exc


def list_folder(address: str) -> dict[str, Version]:
    """Relative path to version of all files below a folder, asked for anew. Raises ``HubError``, ``Hiccup``."""
    store = filesystem(address)
    root = address.partition("://")[2].rstrip("/")
    with errors(address):
        store.invalidate_cache()
        found: dict[str, dict[str, Any]] = store.find(root, detail=True)
    return {
        name.removeprefix(root + "/"): Version(int(info["size"]), str(info.get("ETag") or "").strip('"'))
        for name, info in found.items()
        if info["type"] == "file" and name.startswith(root + "/")
    }


class StoreRanges:
    """``s3://``."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self._made: list[Any] = []

    def close(self) -> None:
        with self._lock:
            for file in self._made:
                file.close()
            self._made.clear()

    def read(self, address: str, version: Version, offset: int, out: memoryview, tries: Tries) -> None:
        """See ``Ranges.read``. A response is of the version that was opened, or an error: s3fs sends If-Match."""
        while True:
            tries.check_stop()
            try:
                with errors(address):
                    file = self._file(address, version)
                    file.seek(offset)
                    data = file.read(len(out))
                if len(data) != len(out):
                    raise Hiccup(f"{len(data):,} bytes came, not {len(out):,}")
                out[:] = data
                return
            except Hiccup as hiccup:
                tries.failed(hiccup)

    def _file(self, address: str, version: Version) -> Any:
        """This thread's handle on a file."""
        held: dict[str, Any] = self._local.__dict__
        if address not in held:
            file = filesystem(address).open(address, "rb", cache_type="none", fill_cache=False)
            tag = str(file.details.get("ETag") or "").strip('"')
            if file.size != version.size_bytes or (version.tag and tag != version.tag):
                raise changed(address, str(version), f"{file.size:,} bytes, {tag}")
            held[address] = file
            with self._lock:
                self._made.append(file)
        return held[address]


@contextmanager
def errors(address: str) -> Iterator[None]:
    """The errors of fsspec and of what it stands on as ours, or as ``Hiccup``."""
    try:
        yield
    except (HubError, SourceChangedError, Hiccup):
        raise
    except PermissionError as exc:
        raise AccessError(f"access refused ({exc})", where=address, fix=LOGIN) from exc
    except FileNotFoundError as exc:
        raise RepositoryError("no such bucket, folder or file", where=address, found=str(exc)) from exc
    except ImportError as exc:
        raise UnreachableError(
            f"a package that reads it is missing ({exc})", where=address, fix="pip install 'weightkit[remote]'"
        ) from exc
    except Exception as exc:
        kind = type(exc).__name__
        if kind == "FileExpired" or "pre-condition" in str(exc).lower():
            raise changed(address, "the version that was opened", "another one") from exc
        if "Credential" in kind or "Credential" in str(exc):
            raise AccessError(f"no credentials ({exc})", where=address, fix=LOGIN) from exc
        if isinstance(exc, OSError) and exc.errno in (errno.EINVAL, errno.EPERM, errno.ENOSYS):
            raise UnreachableError(f"refused ({exc})", where=address, fix=OFFLINE) from exc
        unreachable = "Connect" in kind or isinstance(exc, ConnectionError)
        raise Hiccup(f"{kind}: {str(exc)[:200]}", unreachable=unreachable) from exc
