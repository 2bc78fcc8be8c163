"""The OpenAPI document: as FastAPI has it, with keys, and of each operation the refusals that it really has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from openm3.server.access import OPEN
from openm3.server.errors import is_anthropic
from openm3.server.limits import FREE


def document(app: FastAPI) -> dict[str, Any]:
    """The application's document, made once. What can be seen of an operation's refusals need not be declared."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = made["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        schemas |= {"Error": _ERROR, "AnthropicError": _ANTHROPIC_ERROR}
        made["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        for path, operations in made["paths"].items():
            for operation in operations.values():
                _complete(path, operation, schemas)
        app.openapi_schema = made
    return app.openapi_schema


def _complete(path: str, operation: dict[str, Any], schemas: Mapping[str, Any]) -> None:
    schema = {"$ref": f"#/components/schemas/{'AnthropicError' if is_anthropic(path) else 'Error'}"}
    answers = operation["responses"]
    answers.pop("422", None)
    declared = {int(status) for status in answers if int(status) >= 400}
    for status in sorted(declared.union(_refusals(path, operation, schemas))):
        content = {"application/json": {"schema": schema}}
        answers[str(status)] = {"description": HTTPStatus(status).phrase, "content": content}
    if path not in OPEN:
        # Without keys in the settings none is needed.
        operation["security"] = [{"bearer": []}, {"x-api-key": []}, {}]


def _refusals(path: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[int]:
    """What access, limits and failures answer, and what there is to be wrong with a request."""
    yield from (403, 500)
    if path not in OPEN:
        yield 401
    if path not in FREE:
        yield from (429, 431)
    if "requestBody" in operation:
        yield from (400, 408, 413)
    if "{" in path or "model" in _fields(operation, schemas):
        yield 404
    # Pictures and videos are read for whatever takes a conversation.
    if "text/event-stream" in operation["responses"]["200"]["content"] or _CONVERSATIONS & set(
        _fields(operation, schemas)
    ):
        yield 503


def _fields(operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a body of JSON."""
    content = operation.get("requestBody", {}).get("content", {})
    name: str = content.get("application/json", {}).get("schema", {}).get("$ref", "").rpartition("/")[2]
    fields: Mapping[str, Any] = schemas.get(name, {}).get("properties", {})
    return fields


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


_CONVERSATIONS = {"messages", "input"}
_TEXT = {"type": "string"}
_MAYBE = {"anyOf": [_TEXT, {"type": "null"}]}
_DETAIL = _object(message=_TEXT, type=_TEXT, param=_MAYBE, code=_MAYBE, http_code=_TEXT)
_ERROR = _object(type={"const": "error"}, error=_DETAIL, request_id=_TEXT)
_ANTHROPIC_ERROR = _object(type={"const": "error"}, error=_object(type=_TEXT, message=_TEXT), request_id=_TEXT)
