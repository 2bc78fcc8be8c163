"""The server is what its OpenAPI document says: every answer to whatever fits the document, or does not, is in it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import httpx
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
from tests.server.serving import served, serving
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
    # Bodies that fit the document are replied to, too. (A conversation of the chats hardly ever comes about by chance.)
    assert all(told[f"POST {path} POSITIVE"][200] for path in REPLY_PATHS[1:])


VALUES = {
    "model": "m3-tiny",
    "messages": [{"role": "user", "content": "a"}],
    "max_tokens": 2,
    "prompt": "a",
    "input": "a",
    "tokens": [5],
    "block": 0,
    "context": "gone",
}
"""What the fields may be that some operation needs."""

Operation = tuple[str, str, dict[str, Any]]


def operations(document: dict[str, Any]) -> Iterator[Operation]:
    """All of a document: method, path, and what is said of it."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path.replace("{", "").replace("}", ""), operation


def body_schema(document: dict[str, Any], operation: dict[str, Any]) -> dict[str, Any] | None:
    """That of an operation's body of JSON, if it has one."""
    media = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if media is None:
        return None
    schema: dict[str, Any] = document["components"]["schemas"][media["schema"]["$ref"].rpartition("/")[2]]
    return schema


def smallest(schema: dict[str, Any], choice: int = 0) -> dict[str, Any]:
    """A body with the fields that must be there and no other. Where one of several must, that of the choice."""
    choices = schema.get("anyOf", [{"required": []}])
    return {name: VALUES[name] for name in [*schema.get("required", []), *choices[choice]["required"]]}


@pytest.fixture
def play_app(model: Model) -> Callable[..., None]:
    """Runs an asynchronous test on an application of the given settings; a closed one lets no call in."""

    def run(test: Callable[[httpx.AsyncClient], Awaitable[None]], *, closed: bool = False, **options: Any) -> None:
        async def whole() -> None:
            async with serving(model, ServerSettings(max_tokens=8, **options)) as service:
                if closed:
                    await service.close()
                transport = httpx.ASGITransport(create_app(service))
                async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                    await test(client)

        asyncio.run(whole())

    return run


def test_the_fields_that_must_be_there_are_those_that_the_document_requires(play_app: Any) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        document = (await client.get("/openapi.json")).json()
        seen = 0
        for method, path, operation in operations(document):
            if (schema := body_schema(document, operation)) is None:
                continue
            seen += 1
            for choice in range(len(schema.get("anyOf", " "))):
                answer = await client.request(method, path, json=smallest(schema, choice))
                assert answer.status_code == 200 or answer.json()["error"]["code"] == "context_not_found", answer.text
            body = smallest(schema)
            for name in body:
                answer = await client.request(method, path, json={key: body[key] for key in body if key != name})
                assert answer.status_code == 400 and name in answer.json()["error"]["message"], (path, answer.text)
        assert seen > 10

    play_app(test)


REFUSED: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {
    400: ({}, {"content": b"{"}),
    401: ({"api_keys": ("key",)}, {}),
    403: ({}, {"headers": {"host": "evil.example"}}),
    404: ({}, {"json": {"model": "nothing", "context": "gone"}}),
    408: ({"body_seconds": 0.01}, {"content": None}),
    413: ({}, {"content": b"{}", "headers": {"content-length": str(1 << 40)}}),
    429: ({"max_concurrent": 1}, {}),
    431: ({}, {"headers": {"x-long": 40_000 * "x"}}),
    503: ({"closed": True}, {}),
}
"""For each status the settings of a server, and what to send it."""


async def endless() -> AsyncIterator[bytes]:
    """A body that does not come."""
    await asyncio.sleep(60)
    yield b""


def request_of(document: dict[str, Any], operation: dict[str, Any], sent: dict[str, Any]) -> dict[str, Any]:
    """What an operation takes, but for what is to be sent in its place."""
    headers = sent.get("headers", {})
    if "requestBody" not in operation:
        return {} if "content" in sent else {"headers": headers}
    schema = body_schema(document, operation)
    if "content" in sent:
        kind = next(iter(operation["requestBody"]["content"]))
        content = endless() if sent["content"] is None else sent["content"]
        return {"content": content, "headers": {"content-type": f"{kind}; boundary=b", **headers}}
    if schema is None:
        return {"files": {"file": b"a"}, "headers": headers}
    body = smallest(schema)
    if "json" in sent:
        body = {name: VALUES[name] for name in schema.get("required", [])} | sent["json"]
    return {"json": body, "headers": headers}


@pytest.mark.parametrize("status", REFUSED)
def test_an_operation_refuses_as_the_document_says_and_no_other_way(play_app: Any, status: int) -> None:
    settings, sent = REFUSED[status]
    document: dict[str, Any] = {}

    async def test(client: httpx.AsyncClient) -> None:
        held = asyncio.create_task(client.post("/tokenize", content=endless())) if status == 429 else None
        await asyncio.sleep(0.01)
        for method, path, operation in operations(document):
            answer = await client.request(method, path, **request_of(document, operation, sent))
            said = operation["responses"].get(str(status))
            assert (answer.status_code == status) == (said is not None), (method, path, answer.text)
            if said is not None:
                name = said["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                check_shape(answer.json(), document["components"]["schemas"][name])
        if held is not None:
            held.cancel()

    async def read(client: httpx.AsyncClient) -> None:
        document.update((await client.get("/openapi.json")).json())

    play_app(read)
    play_app(test, **settings)


def test_no_other_refusal_is_told_of_but_of_failures(play_app: Any) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        for *_, operation in operations((await client.get("/openapi.json")).json()):
            statuses = {int(status) for status in operation["responses"]}
            assert {200, 403, 500} <= statuses <= {200, 500, *REFUSED}
            assert all(media for media in operation["responses"]["200"]["content"].values())

    play_app(test)


def check_shape(value: Any, schema: dict[str, Any]) -> None:
    """A value has the properties that it must have, all the way down."""
    for name in schema.get("required", []):
        check_shape(value[name], schema["properties"][name])
    assert value == schema.get("const", value)
    assert isinstance(value, dict) == (schema.get("type") == "object")
