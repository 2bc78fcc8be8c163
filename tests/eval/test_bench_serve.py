"""The server's benchmark hears what is sent, counts it as the engine does, and compares the two."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from openm3 import cli
from openm3.config import EngineConfig
from openm3.engine.asynchronous import AsyncEngine
from openm3.engine.engine import Engine
from openm3.errors import EngineError
from openm3.eval.bench_serve import Overhead, completion, serving
from openm3.eval.http import Address, Heard, ReplyError, fetch, listen, opened, packets
from openm3.model.model import Model, load
from openm3.server.app import create_app
from openm3.server.service import Service
from openm3.server.settings import ServerSettings
from tests.server.serving import served

GOLDEN = Path(__file__).parents[1] / "golden/m3-random-s0"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def model() -> Model:
    return load(GOLDEN / "model")


def answered(data: bytes, path: str = "/v1/completions") -> Heard:
    """What is heard of a server that says this and hangs up."""

    async def play() -> Heard:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"POST /base/v1/completions HTTP/1.1\r\n") and b"Authorization: Bearer k\r\n" in head
            assert await reader.readexactly(13) == b'{"stream": 1}'
            writer.write(data)
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await listen(Address(f"http://127.0.0.1:{port}/base/", "k"), path, {"stream": 1})

    return asyncio.run(play())


def chunk(data: str) -> bytes:
    return f"{len(data):x}\r\n{data}\r\n".encode()


def test_a_stream_is_heard_packet_by_packet() -> None:
    parts = ['data: {"n": 1}\n\n', ": ping\n\n", 'data: {"n": 2}\n\ndata: {"n": 3}\n\n', "data: [DONE]\n\n", ""]
    heard = answered(CHUNKED + b"".join(map(chunk, parts)))
    assert [data["n"] for data in heard.packets] == [1, 2, 3]
    assert 0 < heard.times[0] <= heard.times[1] == heard.times[2] <= heard.seconds


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"HTTP/1.1 429 Busy\r\nContent-Length: 4\r\n\r\nmany", "answered 429: many"),
        (CHUNKED + chunk('data: {"n": 1}\n\n') + chunk('data: {"error": "gone"}\n\n') + chunk(""), "(?s)200: .*gone"),
        (CHUNKED + chunk(""), "answered 200: "),
        (CHUNKED + b"10\r\ndata", "hung up in the middle"),
        (b"", "hung up in the middle"),
    ],
)
def test_what_is_no_reply_is_an_error(data: bytes, message: str) -> None:
    with pytest.raises(ReplyError, match=message):
        answered(data)


def test_nobody_there_is_an_error() -> None:
    async def ask() -> None:
        async with opened(Address("http://127.0.0.1:9"), "GET", "/"):
            pass

    with pytest.raises(OSError):
        asyncio.run(ask())
    assert packets(b'data: {"a": 1}\n\nevent: x\ndata: [DONE]\n\n') == [{"a": 1}]


def test_tokens_of_a_packet_share_the_time_before_it(model: Model) -> None:
    def packet(text: str, count: int) -> dict[str, object]:
        usage = {"prompt_tokens": 9, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 4}}
        return {"choices": [{"text": text}], "usage": usage}

    told = [packet("", 0), packet("ab", 2), packet("cd", 5), packet("", 5)]
    reply = completion(Heard(told, [0.5, 1.0, 1.6, 1.7], 1.8), model.tokenizer)
    assert (reply.text, reply.ids) == ("abcd", model.tokenizer.encode("abcd"))
    assert (reply.usage.prompt_tokens, reply.usage.cached_tokens, reply.usage.completion_tokens) == (9, 4, 5)
    assert (reply.timings.first_token, reply.timings.total) == (1.0, 1.8)
    assert reply.timings.between == pytest.approx((0.2, 0.2, 0.2))


def test_the_overhead_is_the_rounds_median() -> None:
    overhead = Overhead(16, [100.0, 200.0, 100.0], [90.0, 100.0, 99.0])
    assert overhead.share == pytest.approx(0.1)
    assert overhead.values()["overhead"] == overhead.share


def test_the_command_compares_and_loads_a_server_elsewhere(
    model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openm3.engine.engine.EngineConfig", lambda: EngineConfig(cache_tokens=20_000))
    path = str(GOLDEN / "model")
    load_options = ["--workload", "chat", "--requests", "2", "--rate", "50", "--model", path]
    assert cli.main(["bench", "serve", *load_options, "--batch", "2", "--written", "3", "--rounds", "2", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    names = [(run["workload"], run["requests"], run["host_share"] is None) for run in values["workloads"]]
    assert names == [("chat over HTTP", 2, True), ("chat", 2, False)]
    compared = values["comparison"]
    assert compared["batch"] == 2 and len(compared["engine"]) == len(compared["http"]) == 2
    assert min(compared["engine"] + compared["http"]) > 0 and compared["overhead"] < 1
    monkeypatch.setenv("OPENM3_API_KEYS", "secret")
    service = Service(AsyncEngine(Engine(model)), model, ServerSettings(api_keys=("secret",)))
    with served(create_app(service)) as url:
        with pytest.raises(ReplyError, match="answered 401"):
            asyncio.run(fetch(Address(url), "GET", "/v1/models"))
        assert cli.main(["bench", "serve", *load_options, "--url", url]) == 0
    asyncio.run(service.close())
    out = capsys.readouterr().out
    assert "| chat over HTTP |        2 |" in out and "replies at a time" not in out


def test_a_server_that_does_not_start_is_an_error() -> None:
    with pytest.raises(EngineError, match="no checkpoint folder at nowhere"), serving(["nowhere"]):
        pass
