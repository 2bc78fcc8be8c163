"""Which models are served: one, under all its names, as OpenAI's and Anthropic's clients expect to read it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header

from openm3.server.service import Service

Version = Annotated[str | None, Header(description="Any version: the answer has Anthropic's shape then.")]


def routes(service: Service) -> APIRouter:
    """/v1/models and /v1/models/{id}, the same below /anthropic."""
    router = APIRouter(tags=["models"])

    def described(name: str, anthropic: bool) -> dict[str, Any]:
        if anthropic:
            created = datetime.fromtimestamp(service.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            return {"type": "model", "id": name, "display_name": name, "created_at": created}
        own = {"id": name, "object": "model", "created": service.created, "owned_by": "openm3"}
        return {**own, "root": service.model_names[0], "max_model_len": service.max_model_len}

    def listed(anthropic: bool) -> dict[str, Any]:
        data = [described(name, anthropic) for name in service.model_names]
        if not anthropic:
            return {"object": "list", "data": data}
        return {"data": data, "has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]}

    @router.get("/v1/models")
    async def list_models(anthropic_version: Version = None) -> dict[str, Any]:
        """All names of the model that is served."""
        return listed(anthropic_version is not None)

    @router.get("/v1/models/{model_id:path}")
    async def retrieve_model(model_id: str, anthropic_version: Version = None) -> dict[str, Any]:
        """The model by one of its names; `max_model_len` is what a prompt and its reply may have together."""
        return described(service.check_model(model_id), anthropic_version is not None)

    @router.get("/anthropic/v1/models")
    async def list_anthropic_models() -> dict[str, Any]:
        """All names of the model that is served, in Anthropic's shape."""
        return listed(True)

    @router.get("/anthropic/v1/models/{model_id:path}")
    async def retrieve_anthropic_model(model_id: str) -> dict[str, Any]:
        """The model by one of its names, in Anthropic's shape."""
        return described(service.check_model(model_id), True)

    return router
