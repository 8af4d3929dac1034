"""The two hubs, through their own clients: what a repository holds, where its files lie, who asks.

Endpoints and tokens come from the clients' usual places: ``HF_ENDPOINT``, ``HF_TOKEN`` and the file of
``hf auth login``; ``MODELSCOPE_ENDPOINT``, ``MODELSCOPE_API_TOKEN`` and the file of ``modelscope login``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from weightkit.errors import AccessError, RepositoryError, UnreachableError
from weightkit.hub.listing import HubName, Listing, RemoteFile, make_listing
from weightkit.remote.hugging_face import CHECK_NAME, Repository, http_problem, no_listing

OFFLINE = "Check the network, HF_ENDPOINT and MODELSCOPE_ENDPOINT, and run it again."


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
    def _repository(self) -> Repository:
        return Repository(self.repo, self.token)

    @property
    def endpoint(self) -> str:
        return self._repository.endpoint

    def commit(self, revision: str) -> str | None:
        return self._repository.commit(revision)

    def listing(self, revision: str) -> Listing:
        commit = self._repository.commit(revision)
        listed = self._repository.files(commit)
        files = [RemoteFile(file.path, file.size_bytes, file.sha256, file.git_sha1) for file in listed]
        return make_listing(self.name, self.repo, revision, commit, files)

    def url(self, commit: str, revision: str, path: str) -> str:
        return self._repository.url(commit, path)

    def headers(self) -> Mapping[str, str]:
        return self._repository.headers()


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
            raise AccessError(
                "gated, private, or a token that is not accepted",
                where=_place(self),
                fix="`modelscope login` or set MODELSCOPE_API_TOKEN.",
            ) from exc
        except (errors.NotExistError, errors.InvalidParameter) as exc:
            raise RepositoryError("no such repository or revision", where=_place(self), fix=CHECK_NAME) from exc
        except errors.APIError as exc:
            after = getattr(exc, "retry_after", None)
            headers = {"Retry-After": str(after)} if after is not None else {}
            raise http_problem(_place(self), exc.status_code or 500, headers) from exc
        except (errors.HubError, OSError) as exc:  # the client has tried several times
            reason = str(exc).partition("(Caused by")[0][:200]
            raise UnreachableError(
                f"does not answer ({type(exc).__name__}: {reason})", where=self.name, fix=OFFLINE
            ) from exc
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise no_listing(_place(self), exc) from exc


_CLASSES: Mapping[HubName, Callable[[str, str | None], Hub]] = {"huggingface": HuggingFace, "modelscope": ModelScope}


def connect(name: HubName, repo: str, token: str | None = None) -> Hub:
    """A repository on a hub. Nothing is asked yet."""
    return _CLASSES[name](repo, token)


def _place(hub: Hub) -> str:
    return f"{hub.name}: {hub.repo}"
