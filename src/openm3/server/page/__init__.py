"""The page at /: a chat that shows where the model looks. Its files are served as they stand here."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter, Request, Response

from openm3.server.calls import Serves

POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'"
)
"""The page loads nothing from elsewhere, runs no script that is written into it, and stands in no frame.

Pictures and videos that its user chose are shown from the browser's own memory.
"""

_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def routes(service: Serves) -> APIRouter:
    """The page and its files, read once. They are the same for everybody: no API key is needed to load them."""
    router = APIRouter(include_in_schema=False)
    files = {path.name: path for path in Path(__file__).parent.iterdir() if path.suffix in _TYPES}
    for name, path in files.items():
        where = "/" if name == "index.html" else f"/page/{name}"
        router.add_api_route(where, _serving(path), methods=["GET", "HEAD"], name=f"page {name}")
    return router


def _serving(path: Path) -> Callable[[Request], Awaitable[Response]]:
    body = path.read_bytes()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": tag}

    async def serve(request: Request) -> Response:
        known = [entry.strip().removeprefix("W/") for entry in request.headers.get("if-none-match", "").split(",")]
        if tag in known or "*" in known:
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=f"{_TYPES[path.suffix]}; charset=utf-8", headers=headers)

    return serve
