"""Clients on real connections: those that vanish, do not read, or say nothing."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import StreamingResponse

from openm3.config import EngineConfig
from openm3.engine.asynchronous import AsyncEngine
from openm3.engine.engine import Engine
from openm3.engine.request import SamplingParams
from openm3.errors import ConfigError
from openm3.model.model import Model
from openm3.server import command
from openm3.server.app import create_app
from openm3.server.calls import Call, Finished
from openm3.server.service import Service
from openm3.server.settings import ServerSettings
from openm3.server.stream import event_stream, opened, packet
from openm3.tokens import Content

SETTINGS = ServerSettings(port=0, grace=0.1)


def with_stream(service: Service) -> FastAPI:
    """The application with one route more: tokens as they come."""
    app = create_app(service)

    @app.get("/stream/{count}")
    async def stream(count: int) -> StreamingResponse:
        params = SamplingParams(max_tokens=count, ignore_eos=True)
        _, events = await opened(service.stream(Call(prompt="def main():", params=params)))

        async def packets() -> Iterator[str]:  # type: ignore[misc]
            async for event in events:
                if isinstance(event, Content):
                    # Long enough that a reader who does not read fills every buffer on the way.
                    yield packet({"text": event.text, "padding": "x" * 50_000})
                if isinstance(event, Finished):
                    yield packet({"end": event.reason})

        return event_stream(packets())  # type: ignore[arg-type]

    return app


@contextmanager
def running(model: Model, settings: ServerSettings = SETTINGS) -> Iterator[str]:
    """`openm3 serve` in a thread; its address, as it says it. At its end the engine must hold nothing."""
    engine = Engine(model, EngineConfig(cache_tokens=40_000, check=True))
    service = Service(AsyncEngine(engine), model, settings)
    server = command.Server(with_stream(service), service)
    with command.listening(settings) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                sleep(0.01)
                assert thread.is_alive()
            yield command.greeting(listener, service).splitlines()[0].partition(" at ")[2]
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive() and engine.pages.num_held == 0 and not engine.has_work


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as one:
            one.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
def test_ipv6_is_served(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    with running(model, ServerSettings(host="::1", port=0, grace=0.1)) as address:
        assert address.startswith("http://[::1]:")
        assert f"curl '{address}/v1/chat/completions' -H" in capsys.readouterr().err
        assert httpx.get(f"{address}/v1/models", headers={"origin": address}).status_code == 200
        assert httpx.get(f"{address}/v1/models", headers={"origin": "http://[::2]"}).status_code == 403
        port = int(address.rpartition(":")[2])
        with pytest.raises(ConfigError, match=re.escape(f"cannot listen at [::1]:{port}: Address already in use")):
            command.listening(ServerSettings(host="::1", port=port))


def gauge(client: httpx.Client, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"openm3_{name} ")).split()[1])


def wait_for(client: httpx.Client, count: int, seconds: float = 10) -> float:
    """Until so many requests run; how long that took."""
    begin = monotonic()
    while gauge(client, "num_requests_running") != count:
        sleep(0.01)
        assert monotonic() - begin < seconds
    return monotonic() - begin


def raw(address: str, request: str) -> socket.socket:
    url = urlsplit(address)
    assert url.hostname is not None and url.port is not None
    connection = socket.create_connection((url.hostname, url.port))
    connection.sendall(request.encode())
    return connection


def test_who_hangs_up_ends_the_reply(model: Model) -> None:
    with running(model) as address, httpx.Client(base_url=address) as client:
        for _ in range(3):
            with client.stream("GET", "/stream/20000") as answer:
                lines = answer.iter_lines()
                next(lines)
                wait_for(client, 1)
            assert wait_for(client, 0) < 2
        with raw(address, "GET /stream/20000 HTTP/1.1\r\nhost: localhost\r\n\r\n"):
            wait_for(client, 1)
        assert wait_for(client, 0) < 2


def test_who_does_not_read_holds_back_nobody(model: Model) -> None:
    with running(model) as address, httpx.Client(base_url=address, timeout=30) as client:
        with raw(address, "GET /stream/15000 HTTP/1.1\r\nhost: localhost\r\n\r\n"):
            wait_for(client, 1)
            slowest = 0.0
            with client.stream("GET", "/stream/150") as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: "):
                        last = json.loads(line[6:])
                        begin = monotonic()
                        assert httpx.get(f"{address}/health").status_code == 200
                        slowest = max(slowest, monotonic() - begin)
            assert last == {"end": "length"} and slowest < 1
        wait_for(client, 0)


def test_who_says_nothing_is_hung_up_on(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "SILENT_SECONDS", 0.2)
    with running(model) as address, httpx.Client(base_url=address) as client:
        half = "GET /health HTTP/1.1\r\nhost: local"
        with (
            raw(address, "") as silent,
            raw(address, half) as slow,
            raw(address, f"{half}host\r\n\r\n{half}") as second,
        ):
            for connection in (silent, slow, second):
                connection.settimeout(10)
            begin = monotonic()
            heard = [b"".join(iter(lambda c=connection: c.recv(1000), b"")) for connection in (silent, slow, second)]
            assert heard[:2] == [b"", b""] and heard[2].startswith(b"HTTP/1.1 200 OK")
            assert monotonic() - begin < 4
        assert client.get("/health").status_code == 200


def test_what_is_no_http_is_refused(model: Model) -> None:
    with running(model) as address:
        for request in ("\x00\x01\r\n\r\n", "GET / HTTP/1.1\r\n" + "a: b\r\n" * 20_000, "GET /" + "x" * 200_000):
            with raw(address, request) as connection:
                connection.settimeout(10)
                assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
        assert httpx.get(f"{address}/health").status_code == 200


def test_a_closing_server_cuts_who_does_not_read(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "LAST_SECONDS", 1)
    with running(model) as address, httpx.Client(base_url=address) as client:
        connection = raw(address, "GET /stream/15000 HTTP/1.1\r\nhost: localhost\r\n\r\n")
        wait_for(client, 1)
        sleep(0.5)
    connection.close()
