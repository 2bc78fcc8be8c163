"""Keys, and web pages that are not ours."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from openm3.model.model import Model
from openm3.server.access import Access
from openm3.server.app import create_app
from openm3.server.settings import ServerSettings
from tests.server.serving import serving

KEYS = ("first-key", "clé")


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse(f"in {Request(scope).url.path}")(scope, receive, send)


def ask(settings: ServerSettings, path: str = "/v1/models", **headers: str) -> httpx.Response:
    async def whole() -> httpx.Response:
        transport = httpx.ASGITransport(Access(application, settings))
        named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.get(path, headers=named)

    return asyncio.run(whole())


LOCKED = ServerSettings(api_keys=KEYS)


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer first-key"},
        {"authorization": "bearer   first-key "},
        {"x_api_key": "first-key"},
        {"authorization": "Bearer wrong", "x_api_key": "first-key"},
        {"authorization": "Bearer first-key", "x_api_key": "wrong"},
    ],
)
def test_a_right_key_is_let_in_either_way(headers: dict[str, str]) -> None:
    assert ask(LOCKED, **headers).text == "in /v1/models"


@pytest.mark.parametrize(
    ("headers", "why"),
    [
        ({}, "no API key"),
        ({"authorization": "first-key"}, "no API key"),
        ({"authorization": "Basic first-key"}, "no API key"),
        ({"authorization": "Bearer "}, "no API key"),
        ({"authorization": "Bearer first-ke"}, "not known here"),
        ({"authorization": "Bearer first-key,x"}, "not known here"),
        ({"x_api_key": "FIRST-KEY"}, "not known here"),
        ({"x_api_key": "\xff\xfe"}, "not known here"),
    ],
)
def test_a_wrong_key_is_refused(headers: dict[str, str], why: str) -> None:
    answer = ask(LOCKED, **headers)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-should-retry"] == "false"
    error = answer.json()["error"]
    assert why in error["message"] and error["type"] == "authorized_error" and error["code"] == "invalid_api_key"
    assert "first-ke" not in answer.text


def test_the_refusal_has_the_shape_of_the_protocol() -> None:
    assert ask(LOCKED, "/v1/messages").json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize(
    ("path", "is_open"),
    [
        ("/health", True),
        ("/ready", True),
        ("/", True),
        ("/page/app.js", True),
        ("/metrics", False),
        ("/health/x", False),
        ("/openapi.json", False),
        ("/pages", False),
    ],
)
def test_probes_and_the_page_need_no_key(path: str, is_open: bool) -> None:
    assert (ask(LOCKED, path).status_code == 200) == is_open


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "LOCALHOST"}, 200),
        ({"host": "127.0.0.2"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "8.8.8.8:8000"}, 403),
        ({"host": "localhost@evil.example"}, 403),
        ({"host": "[::1"}, 403),
        ({"host": "]["}, 403),
        ({"host": ""}, 403),
        ({"origin": "http://127.0.0.1:8000"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_an_open_server_on_this_machine_serves_no_foreign_pages(headers: dict[str, str], status: int) -> None:
    assert ask(ServerSettings(), **headers).status_code == status


def test_allowed_origins_and_keyed_servers_are_called_from_elsewhere() -> None:
    origin = "http://page.example"
    assert ask(ServerSettings(cors_origins=(origin,)), origin=origin).status_code == 200
    assert ask(ServerSettings(cors_origins=("*",)), origin=origin).status_code == 200
    assert ask(LOCKED, origin=origin, host="evil.example", x_api_key="first-key").status_code == 200
    everywhere = ServerSettings(host="0.0.0.0", allow_unauthenticated=True)
    assert ask(everywhere, host="any.example").status_code == 200


ORIGIN = "http://page.example"
KEYED = ServerSettings(api_keys=KEYS, cors_origins=(ORIGIN,))


@pytest.mark.parametrize(
    ("settings", "origin", "allowed"),
    [
        (ServerSettings(cors_origins=(ORIGIN,)), ORIGIN, True),
        (ServerSettings(cors_origins=("*",)), ORIGIN, True),
        (KEYED, ORIGIN, True),
        (ServerSettings(cors_origins=(ORIGIN,)), "http://evil.example", False),
        (KEYED, "http://evil.example", False),
        (ServerSettings(), ORIGIN, False),
        (LOCKED, ORIGIN, False),
    ],
)
def test_browsers_are_told_whose_pages_may_ask(
    model: Model, settings: ServerSettings, origin: str, allowed: bool
) -> None:
    async def whole() -> None:
        async with serving(model, settings) as service:
            transport = httpx.ASGITransport(create_app(service))
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
                asks = {
                    "origin": origin,
                    "access-control-request-method": "POST",
                    "access-control-request-headers": "authorization,content-type,anthropic-version",
                }
                # Before they ask, without a key.
                before = await client.options("/v1/messages", headers=asks)
                after = await client.get("/v1/models", headers={"origin": origin, "x-api-key": "first-key"})
                refused = await client.get("/v1/nothing", headers={"origin": origin})
        whom = {response.headers.get("access-control-allow-origin") for response in (before, after, refused)}
        assert whom == ({None} if not allowed else {"*"} if settings.cors_origins == ("*",) else {origin})
        assert (before.status_code == 200) == allowed
        if allowed:
            assert "POST" in before.headers["access-control-allow-methods"]
            assert "anthropic-version" in before.headers["access-control-allow-headers"]
            assert after.status_code == 200
            assert after.headers["access-control-expose-headers"] == "x-request-id"

    asyncio.run(whole())
