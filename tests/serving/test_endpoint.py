"""Servers that work, and all the ways in which they do not."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from serving.contract_server import Server, serving

from weightkit import manifests
from weightkit.errors import EndpointError
from weightkit.serving import Client, smoke_endpoint
from weightkit.serving.client import base_url
from weightkit.serving.endpoint import insane
from weightkit.smoke import Verdict

FLAVORS = ("vllm", "sglang", "lmdeploy")


def smoke(server: Server, **options: object) -> Verdict:
    with serving(server) as url:
        return smoke_endpoint(url, **({"timeout_s": 60.0} | options))  # type: ignore[arg-type]


def outcome(verdict: Verdict) -> dict[str, bool | None]:
    return {check.name: check.ok for check in verdict.checks}


def detail(verdict: Verdict, name: str) -> str:
    return next(check.detail for check in verdict.checks if check.name == name)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_a_server_that_works(flavor: str) -> None:
    server = Server(flavor)
    verdict = smoke(server)
    assert outcome(verdict) == dict.fromkeys(
        ("models", "chat", "sane text", "answers", "stream", "repeatable", "log-probabilities"), True
    )
    assert verdict.ok
    assert json.loads(json.dumps(verdict.to_json()))["ok"] is True
    assert all(body["model"] == "/models/deepseek-v3" and body["temperature"] == 0 for body in server.asked)
    assert sum(body.get("stream") is True for body in server.asked) == 1


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_an_address_in_any_spelling(suffix: str) -> None:
    assert base_url(f"127.0.0.1:8000{suffix}") == "http://127.0.0.1:8000"
    assert base_url(f"https://example.org/proxy{suffix}") == "https://example.org/proxy"


@pytest.mark.parametrize("url", ["", "ftp://host:1", "http://", "http://host:99999", "http://h:8000/?a=1"])
def test_no_address(url: str) -> None:
    with pytest.raises(EndpointError, match="not the address of a server"):
        smoke_endpoint(url)


def test_nothing_listens() -> None:
    with socket.socket() as held:  # bound, so that nobody else gets the port
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        with pytest.raises(EndpointError) as caught:
            smoke_endpoint(f"http://127.0.0.1:{port}", timeout_s=60)
    assert f"http://127.0.0.1:{port}/v1/models: nothing listens there" in str(caught.value)
    assert "30000" in str(caught.value)


#: What the server does, the check that fails, and what it says.
FAULTS = {
    "models_html": ("models", "the answer is not a JSON object: expected a JSON object, found <html>It works!</html>"),
    "models_500": ("models", "the server answers HTTP 500: found Internal Server Error"),
    "models_empty": ("models", "expected models with a text in id"),
    "chat_500": ("chat", "the server answers HTTP 500: found EngineCore encountered an issue."),
    "error_200": ("chat", "the server reports an error: found CUDA error: an illegal memory access"),
    "detail": ("chat", "the server answers HTTP 404: found Not Found"),
    "chat_html": ("chat", "the answer is not a JSON object: expected a JSON object, found <html><h1>502 Bad Gateway"),
    "endless": ("chat", "an answer without end: found more than 4,194,304 bytes"),
    "empty_choices": ("chat", "expected at least one choice"),
    "null_content": ("chat", "expected a message with a text in content"),
    "wrong_model": ("chat", "another model answered: expected /models/deepseek-v3, found another-model"),
    "bangs": ("sane text", "one piece for ever: '!!!!!!!!"),
    "empty_text": ("sane text", "2 of 2 answers are no text\n'What is 17 + 25? Answer with the number only.': empty"),
    "nondeterministic": ("repeatable", "greedy answers to one message differ\n'It could be 1.'\n'It could be 3.'"),
    "stream_half": ("stream", "the stream broke off: expected data: [DONE] at its end"),
    "stream_no_done": ("stream", "the stream broke off"),
    "stream_cut": ("stream", "the answer broke off (ProtocolError)"),
    "stream_garbage": ("stream", "not a stream of events: expected data: ..., found <html>not events</html>"),
    "stream_error": ("stream", "the server reports an error within the stream: found EngineDeadError"),
    "nan_logprobs": ("log-probabilities", "expected finite numbers up to 0, found nan"),
    "nan_500": ("log-probabilities", "Out of range float values"),
}


@pytest.mark.parametrize(
    ("fault", "flavor"),
    [(fault, FLAVORS[number % 3]) for number, fault in enumerate(FAULTS)]
    + [("chat_500", flavor) for flavor in FLAVORS],
)
def test_faults(fault: str, flavor: str) -> None:
    name, said = FAULTS[fault]
    verdict = smoke(Server(flavor, fault=fault))
    assert not verdict.ok
    assert outcome(verdict)[name] is False, verdict.render()
    assert said in detail(verdict, name)
    json.dumps(verdict.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("fault", "name"),
    [("models_silent", "models"), ("chat_silent", "chat"), ("stream_silent", "stream"), ("drip", "chat")],
)
def test_silence_ends_after_one_time_limit(fault: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is short for the request that is met by silence; to those before it even a busy machine answers."""
    request = Client._request

    def hurry_at_silence(client: Client, method: str, path: str, body: dict[str, object] | None = None) -> object:
        asked = "models" if body is None else "stream" if body.get("stream") else "chat"
        client._timeout_s = 0.5 if asked == name else 60.0
        return request(client, method, path, body)

    monkeypatch.setattr(Client, "_request", hurry_at_silence)
    started = time.monotonic()
    verdict = smoke(Server(fault=fault))
    assert time.monotonic() - started < 300  # the server is silent for 600 s
    assert outcome(verdict)[name] is False
    assert "no whole answer within the time limit: expected one within 0.5 s" in detail(verdict, name)
    names = list(outcome(verdict))
    after = [check for check in verdict.checks if names.index(check.name) > names.index(name)]
    assert all(check.ok is None for check in after)


def test_a_server_that_gives_no_log_probabilities_passes() -> None:
    verdict = smoke(Server(fault="no_logprobs"))
    assert verdict.ok
    assert outcome(verdict)["log-probabilities"] is None
    assert "speculative decoding" in detail(verdict, "log-probabilities")


def test_a_model_that_thinks_first() -> None:
    verdict = smoke(Server(fault="thinks"))
    assert outcome(verdict)["chat"] is True
    assert "The user wants 42" in detail(verdict, "sane text")


def test_wrong_answers_to_general_questions_are_not_held_against_it() -> None:
    verdict = smoke(Server(answers={}))
    assert outcome(verdict)["answers"] is None
    assert verdict.ok


def test_answers_that_the_manifest_knows_must_come() -> None:
    pico = manifests.load("pico")
    assert pico.smoke is not None
    known = dict(pico.smoke.answers)
    assert smoke(Server(answers=known), manifest=pico).ok
    wrong = smoke(Server(answers={prompt: f"{answer}?" for prompt, answer in known.items()}), manifest=pico)
    assert outcome(wrong)["answers"] is False
    assert f"0 of {len(known)} right" in detail(wrong, "answers")


def test_a_model_that_is_not_served() -> None:
    verdict = smoke(Server(), model="other")
    assert detail(verdict, "models") == "other is not served: expected one of /models/deepseek-v3"
    assert outcome(verdict)["chat"] is None
    assert smoke(Server(), model="/models/deepseek-v3").ok


def test_a_named_model_is_asked_although_the_list_is_broken() -> None:
    verdict = smoke(Server(fault="models_500"), model="/models/deepseek-v3")
    assert outcome(verdict)["models"] is False
    assert outcome(verdict)["chat"] is True


def test_a_server_with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = smoke(Server(key="secret"))
    assert "the server answers HTTP 401: found Unauthorized" in detail(verdict, "models")
    assert "WEIGHTKIT_API_KEY" in detail(verdict, "models")
    monkeypatch.setenv("WEIGHTKIT_API_KEY", "secret")
    assert smoke(Server(key="secret")).ok


@contextmanager
def raw_server(answer: bytes) -> Iterator[str]:
    """Answers every connection with these bytes and closes it."""
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                peer.recv(1 << 16)
                peer.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        listener.close()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "closed the connection without an answer"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "without an answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "the answer broke off"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n\xff\xfe{\x00", "not a JSON object"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "not a JSON object"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://example.org/\r\nContent-Length: 0\r\n\r\n", "HTTP 302"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello", "the answer broke off"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n" + b"[" * 60000,
            "not a JSON object",
        ),
    ],
)
def test_what_is_no_http_or_no_json(answer: bytes, said: str) -> None:
    with raw_server(answer) as url:
        verdict = smoke_endpoint(url, timeout_s=60)
    assert not verdict.ok
    assert said in detail(verdict, "models")
    assert outcome(verdict)["chat"] is None


def test_health() -> None:
    for flavor in FLAVORS:
        with serving(Server(flavor)) as url, Client(url) as client:
            assert client.healthy("/health")
        with serving(Server(flavor, fault="unhealthy")) as url, Client(url) as client:
            assert not client.healthy("/health")
    with Client(url, timeout_s=2) as client:
        assert not client.healthy("/health")


@pytest.mark.parametrize("text", ["", "  \n", "!" * 12, "ab" * 40, "\ufffd" * 5, "\x00\x01\x02", "的" * 30])
def test_insane(text: str) -> None:
    assert insane(text)


@pytest.mark.parametrize("text", ["42", "!!!", "北京", "No, no, no.", "a" * 11, "haha", "The answer is 42.\n" * 2])
def test_sane(text: str) -> None:
    assert insane(text) is None
