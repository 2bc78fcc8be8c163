"""The server is what its OpenAPI document says: every answer to whatever fits the document, or does not, is in it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
import schemathesis.specs.openapi.checks as checks
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.schemas import APIOperation, BaseSchema

from openm3.config import EngineConfig
from openm3.engine.asynchronous import AsyncEngine
from openm3.engine.engine import Engine
from openm3.model.model import Model
from openm3.server.app import create_app
from openm3.server.service import Service
from openm3.server.settings import ServerSettings
from tests.server.serving import served
from tests.server.test_openai_fuzz import CHAT, COMPLETION
from tests.server.test_protocol_fuzz import MESSAGES, RESPONSE

# Known fields are checked more strictly than JSON Schema can say, and unknown ones are let through.
LEFT_OUT = [checks.positive_data_acceptance, checks.negative_data_rejection, checks.unsupported_method]

REPLY_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/anthropic/v1/messages")


@pytest.fixture(scope="module")
def engine(model: Model) -> Engine:
    return Engine(model, EngineConfig(cache_tokens=8192, check=True))


@pytest.fixture(scope="module")
def api(model: Model, engine: Engine) -> Iterator[BaseSchema]:
    service = Service(AsyncEngine(engine), model, ServerSettings(max_tokens=64))
    with served(create_app(service)) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")
    asyncio.run(service.close())
    assert engine.pages.num_held == 0


def meant(case: Case) -> None:
    """Put what the document cannot know into a request: the names there are, and replies as short as this server's."""
    if "model_id" in case.path_parameters:
        case.path_parameters["model_id"] = "m3-tiny"
    body = case.body
    if not isinstance(body, dict):
        return
    if "model" in body:
        body["model"] = "m3-tiny"
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if isinstance(body.get(name), int):
            body[name] = 1 + body[name] % 4


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", CHAT | {"tool_choice": "none", "response_format": {"type": "text"}}),
        ("/v1/chat/completions", CHAT | {"stream": True}),
        ("/v1/completions", COMPLETION),
        ("/v1/completions", COMPLETION | {"stream": True}),
        ("/v1/messages", MESSAGES),
        ("/v1/messages", MESSAGES | {"thinking": {"type": "enabled", "budget_tokens": 2}, "max_tokens": 20}),
        ("/v1/messages", MESSAGES | {"stream": True}),
        ("/v1/messages/count_tokens", MESSAGES),
        ("/v1/responses", RESPONSE),
        ("/v1/responses", RESPONSE | {"tool_choice": "required", "max_output_tokens": 60}),
        ("/v1/responses", RESPONSE | {"stream": True}),
        ("/v1/responses/input_tokens", RESPONSE),
        ("/xray/context", {"messages": [{"role": "user", "content": "a"}], "reply": [5, 6]}),
        ("/xray/block", {"messages": [{"role": "user", "content": "a"}], "reply": [5, 6], "block": 0}),
    ],
)
def test_full_bodies_are_answered_as_the_document_says(api: BaseSchema, path: str, body: dict[str, Any]) -> None:
    case = api[path]["POST"].Case(body=body, media_type="application/json")
    answer = case.call(timeout=20)
    assert answer.status_code == 200, answer.text
    case.validate_response(answer)


def test_files_are_as_the_document_says(api: BaseSchema) -> None:
    for path in ("/v1/files", "/v1/files/upload"):
        case = api[path]["POST"].Case(body={"file": b"abc"}, media_type="multipart/form-data")
        answer = case.call_and_validate(timeout=20)
    place = {"file_id": answer.json()["file"]["file_id"]}
    for path, method in (("", "GET"), ("/{file_id}", "GET"), ("/{file_id}/content", "GET"), ("/{file_id}", "DELETE")):
        case = api[f"/v1/files{path}"][method].Case(path_parameters=place if path else {})
        assert case.call_and_validate(timeout=20, excluded_checks=LEFT_OUT).status_code == 200


def check_operation(operation: APIOperation, mode: GenerationMode, num_examples: int) -> Counter[int]:
    """The statuses of some answers, all of which are as the document says."""
    statuses: Counter[int] = Counter()

    @settings(max_examples=num_examples, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: Case) -> None:
        if mode is GenerationMode.POSITIVE:
            meant(case)
        answer = case.call(timeout=20)
        statuses[answer.status_code] += 1
        case.validate_response(answer, excluded_checks=LEFT_OUT)

    try:
        check()
    except Unsatisfiable:
        # There is nothing that this operation would not take.
        assert mode is GenerationMode.NEGATIVE
    return statuses


def check_all(api: BaseSchema, num_examples: int) -> dict[str, Counter[int]]:
    told: dict[str, Counter[int]] = {}
    for result in api.get_all_operations():
        operation = result.ok()
        for mode in GenerationMode:
            told[f"{operation.label} {mode.name}"] = check_operation(operation, mode, num_examples)
    return told


def test_answers_are_as_the_document_says(api: BaseSchema) -> None:
    told = check_all(api, 8)
    assert len(told) > 50
    statuses = sum(told.values(), Counter())
    assert {200, 400, 404} <= set(statuses) and max(statuses) < 500


@pytest.mark.e2e
def test_many_answers_are_as_the_document_says(api: BaseSchema) -> None:
    told = check_all(api, 80)
    assert max(sum(told.values(), Counter())) < 500
    # Bodies that fit the document are replied to, too: the schemas of replies were put to the test.
    assert all(told[f"POST {path} POSITIVE"][200] for path in REPLY_PATHS)
