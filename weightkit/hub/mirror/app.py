"""Both protocols as one ASGI application."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from weightkit.hub.mirror import huggingface, modelscope
from weightkit.hub.mirror.catalog import Catalog, NotFound
from weightkit.hub.mirror.contents import ChangedError
from weightkit.units import human_bytes


def build_app(catalog: Catalog, *, page_size: int = huggingface.PAGE_SIZE) -> Starlette:
    """The application; it keeps nothing but the catalog and answers GET and HEAD alone (and a POST that asks)."""

    async def front_page(request: Request) -> Response:
        return PlainTextResponse(render(catalog, str(request.base_url).rstrip("/")))

    def refuse(request: Request, exc: Exception) -> Response:
        if not isinstance(exc, NotFound | ChangedError):
            raise exc
        if request.url.path.startswith(modelscope.PREFIX):
            return modelscope.refusal(exc)
        return huggingface.refusal(exc)

    def no_route(request: Request, exc: Exception) -> Response:
        status = exc.status_code if isinstance(exc, HTTPException) else 404
        headers = {"Allow": "GET, HEAD"} if status == 405 else {}
        return JSONResponse({"error": "This mirror is read-only and has no such route."}, status, headers)

    routes = [
        Route("/", front_page),
        *modelscope.ModelScope(catalog).routes(),
        *huggingface.HuggingFace(catalog, page_size).routes(),
    ]
    handlers = {NotFound: refuse, ChangedError: refuse, 404: no_route, 405: no_route}
    return Starlette(routes=routes, exception_handlers=handlers)


def render(catalog: Catalog, endpoint: str) -> str:
    """What is served, and how to fetch it."""
    lines = [
        f"{name}  {human_bytes(repository.size_bytes)} in {len(repository.files)} files, commit {repository.commit}"
        for name, repository in catalog
    ]
    first = next((name for name, _ in catalog), "OWNER/NAME")
    return "\n".join(
        [
            *lines,
            "",
            f"HF_ENDPOINT={endpoint} weightkit fetch {first} --hub huggingface",
            f"HF_ENDPOINT={endpoint} hf download {first}",
            f"HF_ENDPOINT={endpoint} vllm serve {first}",
            f"MODELSCOPE_ENDPOINT={endpoint} modelscope download {first}",
            "",
        ]
    )
