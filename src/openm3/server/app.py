"""The application: every protocol over one service, what stands before them, and what clients are told of failures."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from openm3.errors import OpenM3Error
from openm3.server import anthropic, completions, files, health, models, openai_chat, page, responses, tokenize, xray
from openm3.server.access import Access
from openm3.server.document import document
from openm3.server.errors import RequestError, refusal
from openm3.server.limits import Limits
from openm3.server.logs import RequestLog, respond
from openm3.server.service import Service

PROTOCOLS = (health, models, tokenize, openai_chat, completions, responses, anthropic, page, xray)
"""Modules with `routes(service)`."""


def create_app(service: Service) -> FastAPI:
    """The ASGI application over a service. Its end removes temporary files; closing the service is the caller's."""
    settings, store = service.settings, service.files

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        store.close()

    app = FastAPI(title="openm3", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    for module in PROTOCOLS:
        app.include_router(module.routes(service))
    app.include_router(files.routes(store))
    for kind in (OpenM3Error, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, told)
    app.openapi = lambda: document(app)  # type: ignore[method-assign]
    # The last one added is the outermost.
    app.add_middleware(Limits, settings=settings)
    app.add_middleware(Access, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    app.add_middleware(RequestLog)
    return app


async def told(request: Request, error: Exception) -> Response:
    """A failure in the words of the path's protocol."""
    headers = None
    if isinstance(error, RequestError):
        known = error
    elif isinstance(error, RequestValidationError):
        known = _invalid(error.errors())
    elif isinstance(error, HTTPException):
        known = RequestError(_reason(error, request), status=error.status_code)
        headers = error.headers
    else:
        known = refusal(error)
    return respond(known, request.scope, headers)


def _reason(error: HTTPException, request: Request) -> str:
    if error.status_code == 404:
        return f"there is nothing at {request.url.path[:100]!r}"
    if error.status_code == 405:
        return f"{request.method} is not for {request.url.path[:100]!r}: see the Allow header"
    return str(error.detail)


def _invalid(problems: Sequence[Any]) -> RequestError:
    """The first thing that is wrong with a request, with the name of its field as one would write it."""
    first = problems[0]
    where, *path = first["loc"] or ("body",)
    if first["type"] == "json_invalid":
        return RequestError(f"the body is not valid JSON: {first['ctx']['error']}, at character {path[0]}")
    name = ""
    for step in path:
        name += f"[{step}]" if isinstance(step, int) else f".{step}" if name else str(step)
    what = first["msg"][:1].lower() + first["msg"][1:]
    more = f" ({len(problems) - 1} more problems)" if len(problems) > 1 else ""
    return RequestError(f"{name or f'the {where}'}: {what}{more}", param=name or None)
