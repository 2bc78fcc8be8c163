"""Whether the server lives, whether it takes requests, and what it counts."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.responses import PlainTextResponse, Response

from openm3.server.errors import RequestError
from openm3.server.service import Service


class Status(BaseModel):
    """That all is well; otherwise the answer is an error."""

    status: Literal["ok", "ready"]


_UNWELL: dict[int | str, dict[str, Any]] = {503: {}}


def routes(service: Service) -> APIRouter:
    """Probes and metrics; /health and /ready need no key and never wait for the engine."""
    router = APIRouter(tags=["server"])

    async def health() -> Status:
        """200 while the engine runs, 503 once it has stopped: only a restart helps then."""
        if not service.alive:
            raise RequestError("the engine has stopped; the server's log says why", status=503, code="engine_stopped")
        return Status(status="ok")

    async def ready() -> Status:
        """200 while calls are let in, 503 when the engine has stopped or the server is shutting down."""
        if not service.ready:
            raise RequestError("no calls are let in", status=503, code="not_ready")
        return Status(status="ready")

    async def metrics() -> Response:
        """What the server counts, in Prometheus' text format."""
        return PlainTextResponse(service.metrics.render(await service.stats()), media_type=CONTENT_TYPE_LATEST)

    router.get("/health", responses=_UNWELL)(health)
    router.get("/ready", responses=_UNWELL)(ready)
    router.get("/metrics", response_class=PlainTextResponse)(metrics)
    for path, endpoint in (("/health", health), ("/ready", ready), ("/metrics", metrics)):
        router.head(path, include_in_schema=False)(endpoint)
    return router
