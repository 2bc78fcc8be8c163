"""Replies on the wire: server-sent events with signs of life in silences, whole replies that end with the client."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse

from openm3.server.calls import Event, Started
from openm3.server.errors import RequestError

PING_SECONDS = 10.0
"""Silence after which a stream says that it is alive: clients give up after some minutes."""

COMMENT = ": ping\n\n"
"""A sign of life that every parser of server-sent events passes over."""

Item = TypeVar("Item")

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def packet(data: Any, event: str | None = None) -> str:
    """One server-sent event; `data` is written as JSON, text as it is."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"event: {event}\ndata: {text}\n\n" if event else f"data: {text}\n\n"


def event_stream(packets: AsyncIterator[str], ping: str = COMMENT, every: float | None = None) -> StreamingResponse:
    """A response of packets as they come. When the client goes away, the iterator is closed."""
    chunks = _with_pings(packets, ping, PING_SECONDS if every is None else every)
    return StreamingResponse(chunks, media_type="text/event-stream", headers=_HEADERS)


async def opened(events: AsyncIterator[Event]) -> tuple[Started, AsyncIterator[Event]]:
    """A call's first event and the others. What refuses the call raises here, before a status has been sent."""
    first = await anext(events)
    assert isinstance(first, Started)
    return first, events


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


async def _with_pings(packets: AsyncIterator[str], ping: str, every: float) -> AsyncIterator[str]:
    coming: asyncio.Future[str] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(packets))
            done, _ = await asyncio.wait({coming}, timeout=every)
            if not done:
                yield ping
                continue
            try:
                item = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            yield item
    finally:
        if coming is not None:
            coming.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception, StopAsyncIteration):
                await coming
        if hasattr(packets, "aclose"):
            await packets.aclose()
