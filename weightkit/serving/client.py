"""What is asked of an OpenAI-compatible server, and what is taken for an answer.

The API is the one that vLLM, SGLang and LMDeploy have in common: ``GET /v1/models``, ``POST /v1/chat/completions``,
and the same with ``"stream": true`` as server-sent events that end with ``data: [DONE]``. A server may be broken in any
way: whatever it sends, and however slowly, ends in an ``Answer`` or in an ``EndpointError`` that says what came.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from weightkit.errors import EndpointError

if TYPE_CHECKING:
    import requests

TIMEOUT_S = 120.0
"""A request may take this long: the first one compiles kernels."""
CONNECT_S = 10.0
MAX_BODY_BYTES = 4 << 20
API_KEY_VARIABLE = "WEIGHTKIT_API_KEY"
"""Its value is sent as a bearer token, for servers that were started with a key."""
_SHOWN = 200
_DONE = "[DONE]"
Body = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What a server made of one message.

    Attributes:
        text: what it answered; of a model that thinks first, the thoughts where it got no further.
        finish_reason: ``stop``, ``length`` or the server's own word.
        model: what it calls the model that answered; None where it does not say.
        tokens: tokens that it counts in the answer; None where it does not say.
        wall_s: seconds to the end of the answer.
        first_s: seconds to the first piece of text; None where it came in one.
        pieces: pieces that it came in.
        logprobs: log-probability of each token, where they were asked for and given.
    """

    text: str
    finish_reason: str | None
    model: str | None
    tokens: int | None
    wall_s: float
    first_s: float | None = None
    pieces: int = 1
    logprobs: tuple[float, ...] = ()


class Client:
    """Requests to one server.

    Args:
        url: its address: ``http://host:port``, with or without ``/v1``; ``http://`` may be left out.
        timeout_s: what a request may take in all.
        api_key: a bearer token; default: what ``WEIGHTKIT_API_KEY`` holds.

    Raises:
        EndpointError: the address is none.
    """

    def __init__(self, url: str, *, timeout_s: float = TIMEOUT_S, api_key: str | None = None) -> None:
        import requests  # not before it is needed: a command is printed without it

        self.base = base_url(url)
        self._timeout_s = timeout_s
        self._session = requests.Session()
        # No password of ~/.netrc, and no proxy, which would be asked for this machine's own addresses.
        self._session.trust_env = not _is_local(self.base)
        self._session.auth = lambda request: request
        key = api_key or os.environ.get(API_KEY_VARIABLE)
        if key:
            self._session.headers["Authorization"] = f"Bearer {key}"

    def close(self) -> None:
        """End its connections."""
        self._session.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def healthy(self, path: str) -> bool:
        """Whether ``GET path`` is answered with 200. A server that is not there is not healthy."""
        try:
            with self._request("GET", path) as response:
                return response.status_code == 200
        except EndpointError:
            return False

    def models(self) -> tuple[str, ...]:
        """The names under which models are served.

        Raises:
            EndpointError: no answer, or one that lists no model.
        """
        where = f"{self.base}/v1/models"
        content = self._json("GET", "/v1/models")
        listed = content.get("data")
        if not isinstance(listed, list):
            raise _no_answer(where, "an object with a list in data", content)
        names = [item.get("id") if isinstance(item, Mapping) else None for item in listed]
        found = tuple(name for name in names if isinstance(name, str) and name)
        if len(found) != len(names) or not found:
            raise _no_answer(where, "models with a text in id", content)
        return found

    def chat(self, model: str, text: str, *, max_tokens: int, logprobs: bool = False) -> Answer:
        """The greedy answer to a message, in one piece.

        Raises:
            EndpointError: no answer, an error, or what is no chat completion.
        """
        started = time.monotonic()
        body = _request_body(model, text, max_tokens) | ({"logprobs": True} if logprobs else {})
        content = self._json("POST", "/v1/chat/completions", body)
        where = f"{self.base}/v1/chat/completions"
        choice = _first_choice(content, where)
        message = choice.get("message")
        if not isinstance(message, Mapping):
            raise _no_answer(where, "a choice with a message", content)
        return Answer(
            _text_of(message, where),
            _string(choice.get("finish_reason")),
            _string(content.get("model")),
            _completion_tokens(content),
            time.monotonic() - started,
            logprobs=_logprobs(choice),
        )

    def stream(self, model: str, text: str, *, max_tokens: int) -> Answer:
        """The same, as it comes.

        Raises:
            EndpointError: as of ``chat``; also a stream that ends before it says that it is done.
        """
        started = time.monotonic()
        where = f"{self.base}/v1/chat/completions (stream)"
        body = _request_body(model, text, max_tokens) | {"stream": True}
        content, thoughts, finish, named, first_s = "", "", None, None, None
        pieces = 0
        with self._request("POST", "/v1/chat/completions", body) as response:
            self._require_ok(response, where)
            for event in _events(self._lines(response, where), where):
                named = _string(event.get("model")) or named
                choices = event.get("choices")
                if not isinstance(choices, list):
                    raise _no_answer(where, "events with choices", event)
                if not choices:  # the last one may only count tokens
                    continue
                choice = _first_choice(event, where)
                said, thought = _delta(choice, where, event)
                if said or thought:
                    pieces += 1
                    first_s = time.monotonic() - started if first_s is None else first_s
                content, thoughts = content + said, thoughts + thought
                finish = _string(choice.get("finish_reason")) or finish
        if finish is None:
            raise EndpointError(
                "the stream ended without a finish_reason", where=where, found=_short(content or thoughts)
            )
        return Answer(
            content or thoughts, finish, named, None, time.monotonic() - started, first_s=first_s, pieces=pieces
        )

    def _json(self, method: str, path: str, body: Body | None = None) -> Mapping[str, object]:
        """The object that a request is answered with."""
        where = f"{self.base}{path}"
        with self._request(method, path, body) as response:
            raw = b"".join(self._chunks(response, where))
            self._require_ok(response, where, raw)
        content = _parsed(raw)
        if not isinstance(content, Mapping):
            raise EndpointError(
                "the answer is not a JSON object", where=where, expected="a JSON object", found=_short(_words(raw))
            )
        message = _error_in(content)
        if message is not None:  # some servers say it with status 200
            raise EndpointError("the server reports an error", where=where, found=_short(message))
        return content

    def _request(self, method: str, path: str, body: Body | None = None) -> requests.Response:
        from requests import exceptions

        where = f"{self.base}{path}"
        self._deadline = time.monotonic() + self._timeout_s
        try:
            return self._session.request(
                method,
                where,
                json=body,
                stream=True,
                timeout=(min(CONNECT_S, self._timeout_s), self._timeout_s),
                allow_redirects=False,
            )
        except exceptions.ConnectTimeout as exc:
            raise UnreachableServerError(where, "no connection within the time limit") from exc
        except exceptions.ReadTimeout as exc:
            raise self._too_slow(where, "nothing came") from exc
        except exceptions.ConnectionError as exc:
            if _is_refusal(exc):
                raise UnreachableServerError(where, "nothing listens there, or its name is not known") from exc
            raise EndpointError("the server closed the connection without an answer", where=where) from exc
        except (exceptions.RequestException, OSError, ValueError) as exc:
            raise EndpointError(f"the answer breaks HTTP ({type(exc).__name__}: {exc})", where=where) from exc

    def _chunks(self, response: requests.Response, where: str) -> Iterator[bytes]:
        """The body as it comes. Raises where it is too slow, too long, or ends early."""
        from urllib3.exceptions import HTTPError, ReadTimeoutError

        total = 0
        while True:
            try:
                chunk = bytes(response.raw.read1(64 << 10, decode_content=True))
            except (ReadTimeoutError, TimeoutError) as exc:
                raise self._too_slow(where, f"{total:,} bytes came") from exc
            except (HTTPError, OSError, ValueError) as exc:
                raise EndpointError(f"the answer broke off ({type(exc).__name__})", where=where) from exc
            if not chunk:
                return
            total += len(chunk)
            if total > MAX_BODY_BYTES:
                raise EndpointError("an answer without end", where=where, found=f"more than {MAX_BODY_BYTES:,} bytes")
            if time.monotonic() > self._deadline:
                raise self._too_slow(where, f"{total:,} bytes came")
            yield chunk

    def _lines(self, response: requests.Response, where: str) -> Iterator[str]:
        rest = b""
        for chunk in self._chunks(response, where):
            *lines, rest = (rest + chunk).split(b"\n")
            yield from (line.decode("utf-8", "replace").rstrip("\r") for line in lines)
        if rest:
            yield rest.decode("utf-8", "replace")

    def _require_ok(self, response: requests.Response, where: str, raw: bytes | None = None) -> None:
        status = response.status_code
        if status == 200:
            return
        raw = b"".join(self._chunks(response, where)) if raw is None else raw
        message = _error_in(_parsed(raw)) or _words(raw) or "no words"
        fix = f"Put the key that it was started with into {API_KEY_VARIABLE}." if status in (401, 403) else None
        raise EndpointError(f"the server answers HTTP {status}", where=where, found=_short(message), fix=fix)

    def _too_slow(self, where: str, came: str) -> EndpointError:
        return SilentServerError(
            "no whole answer within the time limit",
            where=where,
            expected=f"one within {self._timeout_s:g} s",
            found=came,
            fix="Look at the server's log. Give it longer with --timeout if it is only slow.",
        )


class UnreachableServerError(EndpointError):
    """Nothing listens at the address."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(
            what,
            where=where,
            fix="Check the address and that the server runs: vLLM listens on 8000, SGLang on 30000, LMDeploy on 23333.",
        )


class SilentServerError(EndpointError):
    """Silence, or an answer that drips."""


def base_url(url: str) -> str:
    """``http://host:port`` of what a user calls the endpoint.

    Raises:
        EndpointError: it names no host, or no port that there is, or is not for HTTP.
    """
    text = url.strip()
    text = (text if "://" in text else f"http://{text}").rstrip("/")
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment:
        raise EndpointError(
            "not the address of a server", where=url, expected="http://HOST:PORT, such as http://127.0.0.1:8000"
        )
    return text.removesuffix("/chat/completions").removesuffix("/v1")


def _request_body(model: str, text: str, max_tokens: int) -> Body:
    return {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": max_tokens,
    }


def _events(lines: Iterator[str], where: str) -> Iterator[Mapping[str, object]]:
    """The JSON objects of server-sent events, up to ``[DONE]``."""
    for line in lines:
        if not line or line.startswith((":", "event:", "id:", "retry:")):
            continue
        if not line.startswith("data:"):
            raise EndpointError("not a stream of events", where=where, expected="data: ...", found=_short(line))
        data = line.removeprefix("data:").strip()
        if data == _DONE:
            return
        event = _parsed(data.encode())
        if not isinstance(event, Mapping):
            raise EndpointError("an event that is not a JSON object", where=where, found=_short(data))
        message = _error_in(event)
        if message is not None:
            raise EndpointError("the server reports an error within the stream", where=where, found=_short(message))
        yield event
    raise EndpointError(
        "the stream broke off", where=where, expected=f"data: {_DONE} at its end", found="its end without that"
    )


def _first_choice(content: Mapping[str, object], where: str) -> Mapping[str, object]:
    choices = content.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise _no_answer(where, "at least one choice", content)
    return choices[0]


def _text_of(message: Mapping[str, object], where: str) -> str:
    """``content``; of a model that thinks, ``reasoning`` (vLLM) or ``reasoning_content`` where there is no content."""
    content = message.get("content")
    thoughts = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(content, str) and (content or not isinstance(thoughts, str)):
        return content
    if isinstance(thoughts, str):
        return thoughts
    raise _no_answer(where, "a message with a text in content", message)


def _delta(choice: Mapping[str, object], where: str, event: Mapping[str, object]) -> tuple[str, str]:
    """What an event adds to the content and to the thoughts."""
    delta = choice.get("delta")
    if not isinstance(delta, Mapping):
        raise _no_answer(where, "choices with a delta", event)
    content, thoughts = delta.get("content"), delta.get("reasoning_content") or delta.get("reasoning")
    if not isinstance(content, str | None) or not isinstance(thoughts, str | None):
        raise _no_answer(where, "a delta with a text", event)
    return content or "", thoughts or ""


def _logprobs(choice: Mapping[str, object]) -> tuple[float, ...]:
    found = choice.get("logprobs")
    content = found.get("content") if isinstance(found, Mapping) else None
    if not isinstance(content, list):
        return ()
    values = [item.get("logprob") if isinstance(item, Mapping) else None for item in content]
    return tuple(float("nan") if isinstance(v, bool) or not isinstance(v, int | float) else float(v) for v in values)


def _completion_tokens(content: Mapping[str, object]) -> int | None:
    usage = content.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, Mapping) else None
    return count if isinstance(count, int) else None


def _error_in(content: object) -> str | None:
    """The message of an error, in the forms that there are: vLLM puts it into ``error``, SGLang and LMDeploy say
    ``"object": "error"``, FastAPI itself ``detail``."""
    if not isinstance(content, Mapping):
        return None
    error = content.get("error")
    if isinstance(error, Mapping):
        return str(error.get("message") or dict(error))
    if error:
        return str(error)
    if content.get("object") == "error":
        return str(content.get("message") or dict(content))
    if "detail" in content and "choices" not in content:
        return str(content["detail"])
    return None


def _parsed(raw: bytes) -> object:
    try:
        value: object = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value


def _no_answer(where: str, expected: str, content: object) -> EndpointError:
    return EndpointError(
        "the answer is not what this API gives", where=where, expected=expected, found=_short(json.dumps(content))
    )


def _string(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _words(raw: bytes) -> str:
    return raw[: 4 * _SHOWN].decode("utf-8", "replace").strip()


def _short(text: str) -> str:
    text = " ".join(text.split())
    return (text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…") or "nothing"


def _is_local(base: str) -> bool:
    host = urlsplit(base).hostname or ""
    return host in ("localhost", "::1", "0.0.0.0") or host.startswith("127.")


def _is_refusal(error: BaseException) -> bool:
    """Whether no connection came about, rather than one that broke."""
    from urllib3.exceptions import NewConnectionError

    seen: list[BaseException] = [error]
    for inner in seen:
        if isinstance(inner, NewConnectionError | ConnectionRefusedError):
            return True
        further = (getattr(inner, "reason", None), inner.__cause__, inner.__context__, *inner.args)
        seen += [other for other in further if isinstance(other, BaseException) and other not in seen]
    return False
