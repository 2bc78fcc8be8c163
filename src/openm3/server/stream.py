"""Replies on the wire: server-sent events with signs of life in silences, whole replies that end with the client."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Send

from openm3.server.calls import Event, Finished, PromptScores, Started
from openm3.server.errors import RequestError

PING_SECONDS = 10.0
"""Silence after which a stream says that it is alive: clients give up after some minutes."""

COMMENT = ": ping\n\n"
"""A sign of life that every parser of server-sent events passes over."""

EVENT_STREAM: dict[str, Any] = {
    "content": {
        "text/event-stream": {
            "itemSchema": {
                "type": "object",
                "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
                "required": ["data"],
            }
        }
    }
}
"""What the OpenAPI document says of a reply that may be streamed, beside its JSON."""

Item = TypeVar("Item")

_written = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def packet(data: Any, event: str | None = None) -> str:
    """One server-sent event; `data` is written as JSON, text as it is."""
    text = data if isinstance(data, str) else _written(data)
    return f"event: {event}\ndata: {text}\n\n" if event else f"data: {text}\n\n"


def event_stream(packets: AsyncIterator[str], ping: str = COMMENT, every: float | None = None) -> StreamingResponse:
    """A response of packets as they come. When the client goes away, the iterator is closed."""
    return _EventStream(packets, ping, PING_SECONDS if every is None else every)


class _EventStream(StreamingResponse):
    """Signs of life have a task of their own: one that waits for every packet would cost more than the packet."""

    def __init__(self, packets: AsyncIterator[str], ping: str, every: float) -> None:
        super().__init__(packets, media_type="text/event-stream", headers=_HEADERS)
        self._packets = packets
        self._ping = ping
        self._every = every
        self._sent_at = asyncio.get_running_loop().time()

    async def stream_response(self, send: Send) -> None:
        """Send all of it."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        pings = asyncio.ensure_future(self._pings(send))
        try:
            async for item in self._packets:
                await self._send(send, item)
        finally:
            pings.cancel()
            if isinstance(self._packets, AsyncGenerator):
                # Whoever is cut off while sending has left it unfinished.
                await self._packets.aclose()
        await asyncio.gather(pings, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pings(self, send: Send) -> None:
        while True:
            silence = asyncio.get_running_loop().time() - self._sent_at
            if silence >= self._every:
                await self._send(send, self._ping)
            else:
                await asyncio.sleep(self._every - silence)

    async def _send(self, send: Send, item: str) -> None:
        self._sent_at = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": item.encode(), "more_body": True})


async def opened(events: AsyncIterator[Event]) -> tuple[Started, AsyncIterator[Event]]:
    """A call's first event and the others. What refuses the call raises here, before a status has been sent."""
    first = await anext(events)
    assert isinstance(first, Started)
    return first, events


async def without_text(events: AsyncGenerator[Event]) -> AsyncGenerator[Event]:
    """A call as if nothing had been written: the engine always writes one token."""
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Finished):
                reason = "length" if event.reason == "stop" else event.reason
                usage = replace(event.usage, completion_tokens=0)
                yield replace(event, reason=reason, usage=usage, thinking_tokens=0, stop=None)
            elif isinstance(event, Started | PromptScores):
                yield event


async def whole(request: Request, events: AsyncIterator[Item]) -> list[Item]:
    """All events of a call, or of several. Ends it when the client goes away; nobody reads what is raised then."""
    collecting = asyncio.ensure_future(_collected(events))
    watching = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({collecting, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            raise RequestError("the client went away", status=499)
        return collecting.result()
    finally:
        for task in (collecting, watching):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _collected(events: AsyncIterator[Item]) -> list[Item]:
    return [event async for event in events]


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
