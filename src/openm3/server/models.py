"""Which models are served: one, under all its names, as OpenAI's and Anthropic's clients expect to read it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Header
from pydantic import BaseModel

from openm3.server.service import Service

Version = Annotated[str | None, Header(description="Any version: the answer has Anthropic's shape then.")]


class ModelObject(BaseModel):
    """The model under one of its names; `max_model_len` is what a prompt and its reply may have together."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(BaseModel):
    """All names."""

    object: Literal["list"]
    data: list[ModelObject]


class AnthropicModel(BaseModel):
    """The model under one of its names, as Anthropic's clients know it."""

    type: Literal["model"]
    id: str
    display_name: str
    created_at: str


class AnthropicModels(BaseModel):
    """All names, as Anthropic's clients know them."""

    data: list[AnthropicModel]
    has_more: bool
    first_id: str
    last_id: str


def routes(service: Service) -> APIRouter:
    """/v1/models and /v1/models/{id}, the same below /anthropic."""
    router = APIRouter(tags=["models"])

    def described(name: str) -> ModelObject:
        return ModelObject(
            id=name,
            object="model",
            created=service.created,
            owned_by="openm3",
            root=service.model_names[0],
            max_model_len=service.max_model_len,
        )

    def as_anthropic(name: str) -> AnthropicModel:
        created = datetime.fromtimestamp(service.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return AnthropicModel(type="model", id=name, display_name=name, created_at=created)

    def listed_as_anthropic() -> AnthropicModels:
        names = service.model_names
        data = [as_anthropic(name) for name in names]
        return AnthropicModels(data=data, has_more=False, first_id=names[0], last_id=names[-1])

    @router.get("/v1/models")
    async def list_models(anthropic_version: Version = None) -> ModelList | AnthropicModels:
        """All names of the model that is served."""
        if anthropic_version is not None:
            return listed_as_anthropic()
        return ModelList(object="list", data=[described(name) for name in service.model_names])

    @router.get("/v1/models/{model_id:path}")
    async def retrieve_model(model_id: str, anthropic_version: Version = None) -> ModelObject | AnthropicModel:
        """The model by one of its names; `max_model_len` is what a prompt and its reply may have together."""
        name = service.check_model(model_id)
        return described(name) if anthropic_version is None else as_anthropic(name)

    @router.get("/anthropic/v1/models")
    async def list_anthropic_models() -> AnthropicModels:
        """All names of the model that is served, in Anthropic's shape."""
        return listed_as_anthropic()

    @router.get("/anthropic/v1/models/{model_id:path}")
    async def retrieve_anthropic_model(model_id: str) -> AnthropicModel:
        """The model by one of its names, in Anthropic's shape."""
        return as_anthropic(service.check_model(model_id))

    return router
