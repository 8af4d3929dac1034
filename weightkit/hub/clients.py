"""The two hubs, through their own clients: what a repository holds, where its files lie, who asks.

Endpoints and tokens come from the clients' usual places: ``HF_ENDPOINT``, ``HF_TOKEN`` and the file of
``hf auth login``; ``MODELSCOPE_ENDPOINT``, ``MODELSCOPE_API_TOKEN`` and the file of ``modelscope login``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol
from urllib.parse import urlsplit

from weightkit.errors import AccessError, HubError, ListingError, RepositoryError, UnreachableError
from weightkit.hub.listing import HubName, Listing, RemoteFile, make_listing
from weightkit.hub.patience import Hiccup, wait_from_headers

#: Longest wait for one answer about metadata.
METADATA_TIMEOUT_S = 30.0
OFFLINE = "Check the network, HF_ENDPOINT and MODELSCOPE_ENDPOINT, and run it again."
_CHECK_NAME = "Check the name (owner/name) and --revision; a private repository needs a token."


class Hub(Protocol):
    """A repository on a hub."""

    @property
    def name(self) -> HubName: ...

    @property
    def repo(self) -> str: ...

    @property
    def endpoint(self) -> str: ...

    def commit(self, revision: str) -> str | None:
        """What a revision is now; None where the hub does not tell without a whole listing. Raises as ``listing``."""

    def listing(self, revision: str) -> Listing:
        """The repository's files at the commit that the revision is now.

        Raises:
            HubError: for good.
            Hiccup: this time.
        """

    def url(self, commit: str, revision: str, path: str) -> str:
        """Where a file's bytes are asked for."""

    def headers(self) -> Mapping[str, str]:
        """What is sent to this hub, and to no other host: the token, where there is one."""


@dataclass(frozen=True)
class HuggingFace:
    """A model repository on Hugging Face, or on what ``HF_ENDPOINT`` names."""

    repo: str
    token: str | None = field(default=None, repr=False)
    name: HubName = "huggingface"

    @cached_property
    def endpoint(self) -> str:
        from huggingface_hub import constants

        return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")

    @cached_property
    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self._token or False)

    @cached_property
    def _token(self) -> str | None:
        from huggingface_hub import get_token

        return self.token or get_token()

    def commit(self, revision: str) -> str | None:
        with self._errors():
            return str(self._api.model_info(self.repo, revision=revision, timeout=METADATA_TIMEOUT_S).sha)

    def listing(self, revision: str) -> Listing:
        commit = self.commit(revision)
        with self._errors():
            tree = list(self._api.list_repo_tree(self.repo, recursive=True, revision=commit))
        # Folders have no size.
        files = [
            RemoteFile(item.path, item.size, item.lfs.sha256)
            if item.lfs is not None
            else RemoteFile(item.path, item.size, None, item.blob_id)
            for item in tree
            if hasattr(item, "size")
        ]
        return make_listing(self.name, self.repo, revision, commit, files)

    def url(self, commit: str, revision: str, path: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, path, revision=commit, endpoint=self.endpoint)

    def headers(self) -> Mapping[str, str]:
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """The client's errors as ours."""
        from huggingface_hub import errors
        from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx or its successor

        try:
            yield
        except errors.GatedRepoError as exc:
            raise _access(
                self,
                "a gated repository",
                f"Accept its terms at {self.endpoint}/{self.repo}, then `hf auth login` or set HF_TOKEN.",
            ) from exc
        except (errors.RepositoryNotFoundError, errors.HFValidationError) as exc:
            raise RepositoryError(
                "no such repository, or a private one", where=_place(self), fix=f"{_CHECK_NAME} `hf auth login`."
            ) from exc
        except errors.RevisionNotFoundError as exc:
            raise RepositoryError("no such revision", where=_place(self), fix=_CHECK_NAME) from exc
        except errors.OfflineModeIsEnabled as exc:
            raise UnreachableError("HF_HUB_OFFLINE is set", where=_place(self), fix="Unset it.") from exc
        except errors.HfHubHTTPError as exc:
            raise _http_problem(self, exc.response.status_code, exc.response.headers) from exc
        except (httpx.HTTPError, OSError) as exc:
            raise Hiccup(f"{type(exc).__name__}: {exc}", unreachable=True) from exc
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise ListingError("an answer that is no listing", where=_place(self), found=_short(exc)) from exc


@dataclass(frozen=True)
class ModelScope:
    """A model repository on ModelScope, or on what ``MODELSCOPE_ENDPOINT`` names."""

    repo: str
    token: str | None = field(default=None, repr=False)
    name: HubName = "modelscope"

    @cached_property
    def _config(self) -> Any:
        from modelscope_hub import HubConfig

        return HubConfig(token=self.token) if self.token else HubConfig()

    @cached_property
    def _api(self) -> Any:
        from modelscope_hub import HubApi

        return HubApi(self._config)

    @cached_property
    def endpoint(self) -> str:
        return str(self._config.endpoint)

    def commit(self, revision: str) -> str | None:
        return None

    def listing(self, revision: str) -> Listing:
        with self._errors():
            found = self._api.list_repo_files(self.repo, "model", revision=revision)
        files = [RemoteFile(item.path, item.size, item.sha256 or None) for item in found if not item.is_dir]
        return make_listing(self.name, self.repo, revision, None, files)

    def url(self, commit: str, revision: str, path: str) -> str:
        return str(self._api.legacy.get_download_url(self.repo, "model", path, revision=revision))

    def headers(self) -> Mapping[str, str]:
        token = self._config.token
        # Older routes read the cookie, newer ones the header: the client sends both.
        return {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """The client's errors as ours."""
        from modelscope_hub import errors

        try:
            yield
        except (errors.AuthenticationError, errors.PermissionDeniedError) as exc:
            raise _access(
                self,
                "gated, private, or a token that is not accepted",
                "`modelscope login` or set MODELSCOPE_API_TOKEN.",
            ) from exc
        except (errors.NotExistError, errors.InvalidParameter) as exc:
            raise RepositoryError("no such repository or revision", where=_place(self), fix=_CHECK_NAME) from exc
        except errors.APIError as exc:
            after = getattr(exc, "retry_after", None)
            headers = {"Retry-After": str(after)} if after is not None else {}
            raise _http_problem(self, exc.status_code or 500, headers) from exc
        except (errors.HubError, OSError) as exc:  # the client has tried several times
            reason = str(exc).partition("(Caused by")[0][:200]
            raise UnreachableError(
                f"does not answer ({type(exc).__name__}: {reason})", where=self.name, fix=OFFLINE
            ) from exc
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise ListingError("an answer that is no listing", where=_place(self), found=_short(exc)) from exc


_CLASSES: Mapping[HubName, Callable[[str, str | None], Hub]] = {"huggingface": HuggingFace, "modelscope": ModelScope}


def connect(name: HubName, repo: str, token: str | None = None) -> Hub:
    """A repository on a hub. Nothing is asked yet."""
    return _CLASSES[name](repo, token)


def origin_of(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port: what a token may be sent to. Raises ``Hiccup`` for what is no URL."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError as exc:
        raise Hiccup(f"a malformed address ({exc})") from exc
    return parts.scheme, parts.hostname, port


def _place(hub: Hub) -> str:
    return f"{hub.name}: {hub.repo}"


def _access(hub: Hub, what: str, fix: str) -> AccessError:
    return AccessError(what, where=_place(hub), fix=fix)


def _http_problem(hub: Hub, status: int, headers: Mapping[str, str]) -> HubError | Hiccup:
    if status in (401, 403):
        return _access(hub, f"access refused (HTTP {status})", "Log in with the hub's client, or ask for access.")
    if status == 404:
        return RepositoryError("no such repository or revision", where=_place(hub), fix=_CHECK_NAME)
    if status in (408, 425, 429) or status >= 500:
        return Hiccup(f"HTTP {status}", after_s=wait_from_headers(headers))
    return UnreachableError(f"an unexpected answer (HTTP {status})", where=_place(hub))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]
