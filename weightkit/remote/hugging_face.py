"""Hugging Face, or what ``HF_ENDPOINT`` names, through its own client: commits, listings, addresses, who asks.

The token is ``HF_TOKEN``'s or that of ``hf auth login``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from weightkit.errors import AccessError, HubError, ListingError, RepositoryError, UnreachableError
from weightkit.remote.patience import Hiccup, wait_from_headers
from weightkit.remote.web import TRANSIENT

#: Longest wait for one answer about metadata.
METADATA_TIMEOUT_S = 30.0
CHECK_NAME = "Check the name (owner/name) and --revision; a private repository needs a token."


@dataclass(frozen=True, slots=True)
class Listed:
    """A file as the hub lists it: ``sha256`` of a large one, git's id of the content of a small one."""

    path: str
    size_bytes: int
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True)
class Repository:
    """A model repository.

    Args:
        repo: ``owner/name``.
        token: default what the client has.
        fix: the next step where there is no such repository.
    """

    repo: str
    token: str | None = field(default=None, repr=False)
    fix: str = CHECK_NAME

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

    @property
    def place(self) -> str:
        """Its name in messages."""
        return f"huggingface: {self.repo}"

    def commit(self, revision: str) -> str:
        """What a revision is now.

        Raises:
            HubError: for good.
            Hiccup: this time.
        """
        with self._errors():
            return str(self._api.model_info(self.repo, revision=revision, timeout=METADATA_TIMEOUT_S).sha)

    def files(self, commit: str) -> list[Listed]:
        """All files at a commit. Raises as ``commit``."""
        with self._errors():
            tree = list(self._api.list_repo_tree(self.repo, recursive=True, revision=commit))
            return [
                Listed(item.path, item.size, item.lfs.sha256, None)
                if item.lfs is not None
                else Listed(item.path, item.size, None, item.blob_id)
                for item in tree
                if hasattr(item, "size")  # folders have none
            ]

    def url(self, commit: str, path: str) -> str:
        """Where a file's bytes are asked for."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, path, revision=commit, endpoint=self.endpoint)

    def headers(self) -> Mapping[str, str]:
        """What is sent to the endpoint, and to no other host: the token, where there is one."""
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """The client's errors as ours."""
        from huggingface_hub import errors
        from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # httpx or its successor

        try:
            yield
        except errors.GatedRepoError as exc:
            fix = f"Accept its terms at {self.endpoint}/{self.repo}, then `hf auth login` or set HF_TOKEN."
            raise AccessError("a gated repository", where=self.place, fix=fix) from exc
        except (errors.RepositoryNotFoundError, errors.HFValidationError) as exc:
            raise RepositoryError(
                "no such repository, or a private one", where=self.place, fix=f"{self.fix} `hf auth login`."
            ) from exc
        except errors.RevisionNotFoundError as exc:
            raise RepositoryError("no such revision", where=self.place, fix=self.fix) from exc
        except errors.OfflineModeIsEnabled as exc:
            raise UnreachableError("HF_HUB_OFFLINE is set", where=self.place, fix="Unset it.") from exc
        except errors.HfHubHTTPError as exc:
            raise http_problem(self.place, exc.response.status_code, exc.response.headers, self.fix) from exc
        except (httpx.HTTPError, OSError) as exc:
            raise Hiccup(f"{type(exc).__name__}: {exc}", unreachable=True) from exc
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise no_listing(self.place, exc) from exc


def http_problem(place: str, status: int, headers: Mapping[str, str], fix: str = CHECK_NAME) -> HubError | Hiccup:
    """What an answer without a listing means."""
    if status in (401, 403):
        login = "Log in with the hub's client, or ask for access."
        return AccessError(f"access refused (HTTP {status})", where=place, fix=login)
    if status == 404:
        return RepositoryError("no such repository or revision", where=place, fix=fix)
    if status in TRANSIENT or status >= 500:
        return Hiccup(f"HTTP {status}", after_s=wait_from_headers(headers))
    return UnreachableError(f"an unexpected answer (HTTP {status})", where=place)


def no_listing(place: str, error: Exception) -> ListingError:
    """For an answer that the client cannot make sense of."""
    found = f"{type(error).__name__}: {error}"[:200]
    return ListingError("an answer that is no listing", where=place, found=found)
