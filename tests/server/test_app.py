"""The application as a whole: what failures look like, request ids, and the document that describes it."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable, Iterator

import httpx
import pytest
from fastapi import FastAPI

from openm3.errors import BusyError, PromptError
from openm3.model.model import Model
from openm3.server.app import create_app
from openm3.server.errors import RequestError
from tests.server.serving import serving


@pytest.fixture(scope="module")
def app(model: Model) -> Iterator[FastAPI]:
    async def make() -> FastAPI:
        async with serving(model) as service:
            app = create_app(service)
        return app

    app = asyncio.run(make())
    raised = {
        "busy": BusyError("too many"),
        "prompt": PromptError("too long"),
        "mine": RequestError("no such thing", status=404, param="thing", code="thing_not_found"),
        "bug": ZeroDivisionError("secret-word"),
    }

    @app.get("/raise/{name}", include_in_schema=False)
    @app.get("/v1/messages/raise/{name}", include_in_schema=False)
    async def failing(name: str) -> None:
        raise raised[name]

    yield app


Ask = Callable[..., httpx.Response]


@pytest.fixture
def ask(app: FastAPI) -> Ask:
    def request(method: str, path: str, **options: object) -> httpx.Response:
        async def whole() -> httpx.Response:
            transport = httpx.ASGITransport(app, raise_app_exceptions=True)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.request(method, path, **options)  # type: ignore[arg-type]

        return asyncio.run(whole())

    return request


@pytest.mark.parametrize(
    ("path", "status", "message", "kind"),
    [
        ("/raise/busy", 429, "too many (1002)", "rate_limit_error"),
        ("/raise/prompt", 400, "too long (2013)", "bad_request_error"),
        ("/raise/mine", 404, "no such thing (2013)", "bad_request_error"),
        (
            "/raise/bug",
            500,
            "internal error; the server's log says more under this request's id (1000)",
            "server_error",
        ),
        ("/gone", 404, "there is nothing at '/gone' (2013)", "bad_request_error"),
        ("/v1/messages/raise/busy", 429, "too many", "rate_limit_error"),
        ("/v1/messages/raise/prompt", 400, "too long", "invalid_request_error"),
        ("/v1/messages/raise/mine", 404, "no such thing", "not_found_error"),
        ("/anthropic/gone", 404, "there is nothing at '/anthropic/gone'", "not_found_error"),
    ],
)
def test_every_failure_has_the_shape_of_its_protocol(ask: Ask, path: str, status: int, message: str, kind: str) -> None:
    answer = ask("GET", path)
    body = answer.json()
    assert (answer.status_code, body["error"]["message"], body["error"]["type"]) == (status, message, kind)
    assert body["type"] == "error" and body["request_id"] == answer.headers["x-request-id"]
    assert answer.headers["request-id"] == body["request_id"]


def test_what_nobody_foresaw_is_logged_and_not_told(ask: Ask, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "openm3.server"):
        answer = ask("GET", "/raise/bug", headers={"x-request-id": "abc-1"})
    assert "secret-word" not in answer.text and "ZeroDivision" not in answer.text
    assert "request abc-1 failed" in caplog.text and "secret-word" in caplog.text


def test_a_method_that_is_not_allowed_is_told_which_are(ask: Ask) -> None:
    answer = ask("POST", "/v1/models")
    assert answer.status_code == 405 and answer.headers["allow"] == "GET"
    assert answer.json()["error"]["message"].startswith("POST is not for '/v1/models'")


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (b'{"prompt": 3}', "prompt: input should be a valid string", "prompt"),
        (b'{"messages": [{}, 3]}', "messages[1]: input should be a valid dictionary", "messages[1]"),
        (b'{"thinking": "x", "model": 3}', r"(1 more problems)", "model"),
        (b'{"prompt": ', "the body is not valid JSON: Expecting value, at character 11", None),
        (b"[]", "the body: input should be a valid dictionary", None),
        (b"", "the body: field required", None),
        (b'{"prompt": "\xff"}', "", None),
        (b"[" * 100_000, "", None),
        (b"{}", "give either prompt or messages", "prompt"),
    ],
)
def test_what_is_wrong_with_a_body_is_said_in_words(ask: Ask, body: bytes, message: str, param: str | None) -> None:
    answer = ask("POST", "/tokenize", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert message in error["message"] and error["param"] == param


@pytest.mark.parametrize(("given", "kept"), [("abc-1.2:X_y", True), ("a b", False), ("x" * 129, False), ("", False)])
def test_request_ids_are_taken_if_they_are_sane(ask: Ask, given: str, kept: bool) -> None:
    returned = ask("GET", "/health", headers={"x-request-id": given}).headers["x-request-id"]
    assert (returned == given) == kept
    assert kept or re.fullmatch("[0-9a-f]{32}", returned)


def test_each_request_is_one_line(ask: Ask, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "openm3.server"):
        ask("GET", "/v1/models?key=hidden", headers={"authorization": "Bearer hidden"})
    (record,) = caplog.records
    line = record.fields  # type: ignore[attr-defined]
    assert {key: line[key] for key in ("method", "path", "status")} == {
        "method": "GET",
        "path": "/v1/models",
        "status": 200,
    }
    assert set(line) == {"id", "method", "path", "status", "seconds"} and 0 <= line["seconds"] < 5
    assert "hidden" not in json.dumps(line)


def test_the_document_is_true_about_errors_and_keys(ask: Ask) -> None:
    document = ask("GET", "/openapi.json").json()
    assert set(document["paths"]) >= {"/health", "/metrics", "/v1/models", "/tokenize", "/v1/files", "/v1/files/upload"}
    assert not {"HTTPValidationError", "ValidationError"} & set(document["components"]["schemas"])
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            kind = "AnthropicError" if path.startswith(("/anthropic/", "/v1/messages")) else "Error"
            schema = operation["responses"]["500"]["content"]["application/json"]["schema"]
            assert schema == {"$ref": f"#/components/schemas/{kind}"}
            assert ("security" in operation) == (path not in ("/health", "/ready", "/"))


def test_no_page_of_documentation_is_fetched_from_elsewhere(ask: Ask) -> None:
    assert {ask("GET", path).status_code for path in ("/docs", "/redoc")} == {404}
