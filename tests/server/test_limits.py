"""Too long, too slow, too many."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from openm3.server.limits import Limits
from openm3.server.settings import ServerSettings
from tests.server.serving import served

SMALL = ServerSettings(max_body_bytes=1000, max_file_bytes=50_000, max_header_bytes=2000, max_concurrent=2)


async def application(scope: Scope, receive: Receive, send: Send) -> None:
    """Reads the body in its parts; waits where the path says so."""
    if scope["type"] != "http":
        return
    parts = []
    while True:
        message = await receive()
        parts.append(len(message.get("body", b"")))
        if not message.get("more_body"):
            break
    if scope["path"] == "/wait":
        await asyncio.sleep(0.3)
    if scope["path"] == "/until-gone":
        assert (await Request(scope, receive).is_disconnected()) is False
    await JSONResponse({"size": sum(parts), "parts": len(parts)})(scope, receive, send)


def ask(settings: ServerSettings, method: str, path: str, **options: object) -> httpx.Response:
    async def whole() -> httpx.Response:
        async with client(settings) as asking:
            return await asking.request(method, path, **options)  # type: ignore[arg-type]

    return asyncio.run(whole())


def client(settings: ServerSettings) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(Limits(application, settings)), base_url="http://x")


async def parts(*sizes: int, pause: float = 0.0) -> AsyncIterator[bytes]:
    for size in sizes:
        await asyncio.sleep(pause)
        yield b"x" * size


@pytest.mark.parametrize(("size", "status"), [(0, 200), (1000, 200), (1001, 413)])
def test_bodies_have_a_length(size: int, status: int) -> None:
    answer = ask(SMALL, "POST", "/x", content=b"x" * size)
    assert answer.status_code == status
    if status == 200:
        assert answer.json() == {"size": size, "parts": 1}
    else:
        assert answer.json()["error"]["message"] == "the body is longer than 1000 bytes (2013)"


def test_bodies_that_say_nothing_of_their_length_are_measured_as_they_come() -> None:
    assert ask(SMALL, "POST", "/x", content=parts(400, 400, 200)).json() == {"size": 1000, "parts": 1}
    assert ask(SMALL, "POST", "/x", content=parts(400, 400, 201)).status_code == 413


def test_uploads_stream_and_may_be_longer() -> None:
    assert ask(SMALL, "POST", "/v1/files", content=parts(30_000, 20_000)).json()["parts"] > 1
    assert ask(SMALL, "POST", "/v1/files", content=b"x" * 70_000).status_code == 413


def test_headers_have_a_length() -> None:
    assert ask(SMALL, "GET", "/x", headers={"a": "b" * 1000}).status_code == 200
    assert ask(SMALL, "GET", "/x", headers={"a": "b" * 2000}).status_code == 431
    assert ask(SMALL, "GET", "/x?" + "b" * 2000).status_code == 431


def test_a_body_that_trickles_is_given_up() -> None:
    quick = ServerSettings(body_seconds=0.1)
    answer = ask(quick, "POST", "/x", content=parts(*[5] * 20, pause=0.05))
    assert (answer.status_code, answer.json()["error"]["message"]) == (408, "the body came too slowly (1001)")
    assert answer.headers["connection"] == "close"
    # As fast as is asked, however long it takes.
    assert ask(quick, "POST", "/x", content=parts(*[2000] * 5, pause=0.05)).json()["size"] == 10_000


def test_only_so_many_run_at_a_time() -> None:
    async def whole() -> None:
        async with client(SMALL) as asking:
            running = [asyncio.create_task(asking.get("/wait")) for _ in range(2)]
            await asyncio.sleep(0.1)
            refused = await asking.get("/x")
            assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["type"] == "rate_limit_error"
            assert (await asking.get("/health")).status_code == 200
            assert [(await answer).status_code for answer in running] == [200, 200]
            assert (await asking.get("/x")).status_code == 200

    asyncio.run(whole())


def test_on_a_real_connection() -> None:
    """A refused body is read to its end, so that the connection can go on; who goes away takes no place."""
    with served(Limits(application, SMALL)) as address:
        with httpx.Client(base_url=address) as asking:
            assert asking.post("/x", content=b"x" * 3_000_000).status_code == 413
            assert asking.post("/x", content=b"x").json() == {"size": 1, "parts": 1}
        url = urlsplit(address)
        for _ in range(3):
            with socket.create_connection((url.hostname, url.port)) as raw:
                raw.sendall(b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nabc")
        with httpx.Client(base_url=address) as asking:
            assert asking.get("/until-gone").status_code == 200
