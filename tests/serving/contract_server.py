"""A server that speaks the API of vLLM 0.25.1, SGLang 0.5.23 or LMDeploy 0.16.0 as their sources have it, and can
misbehave; also a program with the engines' own flags, for those who start one.

Paths, status codes and bodies are written out here by hand, from ``vllm/entrypoints/``, ``sglang/srt/entrypoints/`` and
``lmdeploy/serve/openai/``: nothing is taken from weightkit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

ANSWERS = {
    "What is 17 + 25? Answer with the number only.": "42",
    "中国的首都是哪里？只回答城市名。": "北京",
}
SILENCE_S = 600


@dataclass
class Server:
    """What is served and how. ``fault`` is one word of those that the handlers below look for; ``not_yet`` counts the
    questions for its health that a server answers before it is ready."""

    flavor: str = "vllm"
    model: str = "/models/deepseek-v3"
    fault: str | None = None
    answers: dict[str, str] = field(default_factory=lambda: dict(ANSWERS))
    asked: list[dict[str, object]] = field(default_factory=list)
    not_yet: int = 0
    key: str | None = None

    def app(self) -> Starlette:
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        if self.flavor == "sglang":
            routes.append(Route("/health_generate", self.health))
        return Starlette(routes=routes)

    async def health(self, request: Request) -> Response:
        ready = self.fault != "unhealthy" and not self.not_yet
        self.not_yet = max(0, self.not_yet - 1)
        if self.flavor == "lmdeploy":
            return JSONResponse({"status": "healthy" if ready else "unhealthy"}, 200 if ready else 503)
        return Response(status_code=200 if ready else 503)

    async def models(self, request: Request) -> Response:
        if self.fault == "models_silent":
            await asyncio.sleep(SILENCE_S)
        if self.fault == "models_html":
            return HTMLResponse("<html>It works!</html>")
        if self.fault == "models_500":
            return PlainTextResponse("Internal Server Error", 500)
        if refused := self.refused(request):
            return refused
        card = {"id": self.model, "object": "model", "created": 1, "owned_by": self.flavor, "root": self.model}
        if self.flavor == "lmdeploy":
            card |= {"parent": None, "permission": [{"id": "modelperm-1", "object": "model_permission"}]}
        else:
            card |= {"parent": None, "max_model_len": 32768}
        return JSONResponse({"object": "list", "data": [] if self.fault == "models_empty" else [card]})

    def refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": "Unauthorized"}, 401)

    def error(self, status: int, message: str, kind: str) -> Response:
        if self.flavor == "vllm":
            body: dict[str, object] = {"error": {"message": message, "type": kind, "param": None, "code": status}}
        else:
            body = {"object": "error", "message": message, "type": kind, "param": None, "code": status}
        return JSONResponse(body, status)

    async def chat(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        if refused := self.refused(request):
            return refused
        fault = self.fault
        if body["model"] != self.model and self.flavor != "sglang":  # SGLang does not look
            return self.error(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        if fault == "chat_silent":
            await asyncio.sleep(SILENCE_S)
        if fault == "chat_500":
            return self.error(500, "EngineCore encountered an issue.", "InternalServerError")
        if fault == "error_200":
            return JSONResponse({"object": "error", "message": "CUDA error: an illegal memory access", "code": 500})
        if fault == "detail":
            return JSONResponse({"detail": "Not Found"}, 404)
        if fault == "chat_html":
            return HTMLResponse("<html><h1>502 Bad Gateway</h1></html>")
        if fault == "endless":
            return StreamingResponse(_endless(), media_type="application/json")
        if fault == "drip":
            return StreamingResponse(_drip(), media_type="application/json")
        if body.get("logprobs") and fault == "no_logprobs":
            return self.error(400, "logprobs are not supported with speculative decoding", "BadRequestError")
        if body.get("logprobs") and fault == "nan_500":
            return self.error(500, "Out of range float values are not JSON compliant", "InternalServerError")
        text = self.answers.get(body["messages"][0]["content"], "I do not know.")
        if fault == "bangs":
            text = "!" * int(body["max_tokens"])
        if fault == "empty_text":
            text = ""
        if fault == "nondeterministic":
            text = f"It could be {len(self.asked)}."
        if body.get("stream"):
            return StreamingResponse(self.events(text), media_type="text/event-stream")
        return self.completion(body, text)

    def completion(self, body: dict[str, object], text: str) -> Response:
        message: dict[str, object] = {"role": "assistant", "content": text}
        if self.fault == "null_content":
            message["content"] = None
        if self.fault == "thinks":
            message |= {"content": None, "reasoning_content": f"The user wants {text}"}
        choice: dict[str, object] = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        if body.get("logprobs"):
            value = "NaN" if self.fault == "nan_logprobs" else "-0.25"
            choice["logprobs"] = {"content": [{"token": "a", "logprob": value, "bytes": [97], "top_logprobs": []}]}
        content = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "another-model" if self.fault == "wrong_model" else self.model,
            "choices": [] if self.fault == "empty_choices" else [choice],
            "usage": {"prompt_tokens": 9, "total_tokens": 12, "completion_tokens": 3},
        }
        raw = json.dumps(content).replace('"NaN"', "NaN").replace('"-0.25"', "-0.25")
        return Response(raw, media_type="application/json")

    async def events(self, text: str) -> AsyncIterator[bytes]:
        fault = self.fault
        if fault == "stream_garbage":
            yield b"<html>not events</html>\n"
            return
        pieces = [text[at : at + 2] for at in range(0, len(text), 2)]
        deltas: list[tuple[dict[str, object], str | None]] = [({"role": "assistant", "content": ""}, None)]
        deltas += [({"content": piece}, None) for piece in pieces]
        deltas.append(({}, "stop"))
        for number, (delta, finish) in enumerate(deltas):
            if fault == "stream_half" and number == 2:
                return
            if fault == "stream_cut" and number == 2:
                raise ConnectionError("cut")
            if fault == "stream_silent" and number == 2:
                await asyncio.sleep(SILENCE_S)
            if fault == "stream_error" and number == 2:
                yield b'data: {"error": {"message": "EngineDeadError", "type": "InternalServerError", "code": 500}}\n\n'
                break
            chunk = {
                "id": "chatcmpl-1",
                "object": "chat.completion.chunk",
                "created": 1,
                "model": self.model,
                "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}],
            }
            yield f"data: {json.dumps(chunk)}\n\n".encode()
        if fault == "stream_no_done":
            return
        yield b"data: [DONE]\n\n"


async def _endless() -> AsyncIterator[bytes]:
    yield b'{"choices": ['
    for _ in range(64):  # 16 MiB, and a server that does not notice who has gone
        yield b" " * (1 << 18)


async def _drip() -> AsyncIterator[bytes]:
    for byte in json.dumps({"choices": [{"message": {"content": "x" * 500}}]}).encode():
        yield bytes([byte])
        await asyncio.sleep(0.1)


@contextmanager
def serving(server: Server) -> Iterator[str]:
    """The server's address while the block lasts."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(server.app(), log_level="critical", timeout_graceful_shutdown=0))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        running.should_exit = running.force_exit = True
        thread.join(10)
        listener.close()


def _flags(flavor: str) -> argparse.ArgumentParser:
    """The flags of each engine that a launch may use, as its ``--help`` has them; any other is an error."""
    parser = argparse.ArgumentParser(flavor, allow_abbrev=False)
    if flavor == "vllm":
        parser.add_argument("command", choices=["serve"])
        parser.add_argument("model")
        parser.add_argument("--host")
        parser.add_argument("--port", type=int, default=8000)
        parser.add_argument("--tensor-parallel-size", "-tp", dest="tp", type=int, default=1)
        parser.add_argument("--max-model-len", type=int)
        parser.add_argument("--speculative-config", type=json.loads)
    elif flavor == "sglang":
        parser.add_argument("--model-path", "--model", dest="model", required=True)
        parser.add_argument("--host", default="127.0.0.1")
        parser.add_argument("--port", type=int, default=30000)
        parser.add_argument("--tp-size", "--tensor-parallel-size", dest="tp", type=int, default=1)
        parser.add_argument("--context-length", type=int)
        parser.add_argument("--speculative-algorithm")
        parser.add_argument("--speculative-num-steps", type=int)
        parser.add_argument("--speculative-eagle-topk", type=int)
        parser.add_argument("--speculative-num-draft-tokens", type=int)
    else:
        parser.add_argument("command", choices=["serve"])
        parser.add_argument("what", choices=["api_server"])
        parser.add_argument("model")
        parser.add_argument("--backend", choices=["pytorch", "turbomind"], default="turbomind")
        parser.add_argument("--server-name", dest="host", default="0.0.0.0")
        parser.add_argument("--server-port", dest="port", type=int, default=23333)
        parser.add_argument("--tp", type=int, default=1)
        parser.add_argument("--session-len", type=int)
        parser.add_argument("--speculative-algorithm", choices=["eagle", "eagle3", "deepseek_mtp"])
        parser.add_argument("--speculative-num-draft-tokens", type=int, default=1)
    parser.add_argument("--dtype", choices=["auto", "float16", "bfloat16"], default="auto")
    parser.add_argument("--trust-remote-code", action="store_true")
    return parser


def main(flavor: str, arguments: list[str]) -> None:
    """Be an engine. ``FAKE_ENGINE`` says how it behaves: ``dies``, ``unhealthy``, ``slow``, or a fault of above."""
    args = _flags(flavor).parse_args(arguments)
    how = os.environ.get("FAKE_ENGINE")
    print(f"{flavor} starts on {args.model} over {args.tp}", flush=True)
    if how == "dies":
        print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.50 GiB.", file=sys.stderr)
        sys.exit(3)
    for number in range(2):  # as engines do: workers, one of them in a session of its own
        if os.fork() == 0:
            if number:
                os.setsid()
            if how == "stubborn":
                import signal

                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
            os._exit(0)
    if pids := os.environ.get("FAKE_ENGINE_PIDS"):
        mine = [name.name for name in Path("/proc").glob("[0-9]*") if _parent(name) == os.getpid()]
        Path(pids).write_text(" ".join([str(os.getpid()), *mine]))
    print("Loading safetensors checkpoint shards: 100% Completed", flush=True)
    server = Server(flavor, args.model, fault=how, not_yet=4 if how == "slow" else 0)
    if how == "stubborn":
        import signal

        class Deaf(uvicorn.Server):
            @contextmanager
            def capture_signals(self) -> Iterator[None]:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                yield

        Deaf(uvicorn.Config(server.app(), host=args.host, port=args.port, log_level="info")).run()
        return
    uvicorn.run(server.app(), host=args.host, port=args.port, log_level="info", timeout_graceful_shutdown=0)


def _parent(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
