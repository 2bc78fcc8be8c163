"""A server that is told to stop while many are served: each stream has a proper end, or an error in its own words."""

from __future__ import annotations

import asyncio
import json
import signal

import pytest

from openm3.eval.bench_serve import Serving, serving
from openm3.eval.http import Address, fetch, opened, packets
from openm3.eval.load import PATHS, body, ending

NUM_STREAMS, NUM_SHORT = 16, 4

SCHEMA = {"type": "array", "items": {"type": "integer"}, "minItems": 5000, "maxItems": 5000}
ENDLESS: dict[str, dict[str, object]] = {
    "/v1/chat/completions": {"ignore_eos": True},
    "/v1/completions": {"ignore_eos": True},
    "/v1/messages": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    "/v1/responses": {"text": {"format": {"type": "json_schema", "name": "list", "schema": SCHEMA}}},
}
"""What keeps the model from ending, by protocol."""


def request(path: str, max_tokens: int, *, stream: bool = True) -> dict[str, object]:
    return body(path, "m3-tiny", "def main():", max_tokens, stream=stream) | ENDLESS[path]


async def listen(address: Address, number: int, begun: asyncio.Semaphore) -> tuple[str, list[dict[str, object]]]:
    """A stream to its end; the first ones are short."""
    path = PATHS[number % len(PATHS)]
    heard = b""
    wanted = request(path, 30 if number < NUM_SHORT else 15_000)
    async with opened(address, "POST", path, wanted) as (status, parts):
        assert status == 200
        async for part in parts:
            begun.release()
            heard += part
    return ending(heard), packets(heard)


async def ask(address: Address, path: str) -> tuple[int, dict[str, object]]:
    async with opened(address, "POST", path, request(path, 15_000, stream=False)) as (status, parts):
        return status, json.loads(b"".join([part async for part in parts]))


async def stopped(server: Serving) -> None:
    begun = asyncio.Semaphore(0)
    streams = [asyncio.create_task(listen(server.address, i, begun)) for i in range(NUM_STREAMS)]
    replies = [asyncio.create_task(ask(server.address, path)) for path in PATHS]
    await asyncio.gather(*streams[:NUM_SHORT])
    while b"num_requests_running 16.0" not in await fetch(server.address, "GET", "/metrics"):
        await asyncio.sleep(0.05)
    server.process.send_signal(signal.SIGTERM)
    ended = await asyncio.wait_for(asyncio.gather(*streams), 30)
    assert [how for how, _ in ended] == ["ended"] * NUM_SHORT + ["failed"] * (NUM_STREAMS - NUM_SHORT)
    assert all("shutting down" in json.dumps(told[-1]) and len(told) > 2 for _, told in ended[NUM_SHORT:])
    for status, answer in await asyncio.gather(*replies):
        assert status == 503 and "shutting down" in json.dumps(answer)
    with pytest.raises(OSError):
        await fetch(server.address, "GET", "/v1/models")


def test_every_stream_has_an_end_when_the_server_is_told_to_stop() -> None:
    with serving(["m3-tiny", "--cache-tokens", "300000", "--threads", "1", "--grace", "0.5"]) as server:
        asyncio.run(stopped(server))
        assert server.process.wait(20) == 0
