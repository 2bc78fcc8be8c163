"""Calls that make one reply together, choices or prompts of a batch, run side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from itertools import islice

from openm3.server.calls import Event, Started

AT_ONCE = 16
"""Calls of one reply that run at a time: a long batch must not fill the engine's queue alone."""

Numbered = tuple[int, Event]
"""An event and the number of its call."""


async def together(streams: Sequence[AsyncGenerator[Event]]) -> AsyncGenerator[Numbered]:
    """The events of all calls as they come. When one fails, or when this is closed, all of them end."""
    if len(streams) == 1:  # No need of a task for each event.
        async with aclosing(streams[0]) as events:
            async for event in events:
                yield 0, event
        return
    todo = iter(range(len(streams)))
    coming: dict[asyncio.Future[Event], int] = {}

    def ask(number: int) -> None:
        coming[asyncio.ensure_future(anext(streams[number]))] = number

    for number in islice(todo, AT_ONCE):
        ask(number)
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for future in sorted(done, key=lambda future: coming[future]):
                try:
                    event = future.result()
                except StopAsyncIteration:
                    for following in islice(todo, 1):
                        ask(following)
                    del coming[future]
                    continue
                number = coming.pop(future)
                ask(number)
                yield number, event
    finally:
        for future in coming:
            future.cancel()
        # Waited for, failures too: a stream that is still asked cannot be closed.
        await asyncio.gather(*coming, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def opened(streams: Sequence[AsyncGenerator[Event]]) -> AsyncGenerator[Numbered]:
    """What `together` gives, once the first calls are let in. What refuses one raises here, before a status is sent."""
    events = together(streams)
    early: list[Numbered] = []
    starting = min(len(streams), AT_ONCE)
    try:
        while starting:
            early.append(await anext(events))
            starting -= isinstance(early[-1][1], Started)
    except BaseException:
        await events.aclose()
        raise
    return _joined(early, events)


async def _joined(early: list[Numbered], events: AsyncGenerator[Numbered]) -> AsyncGenerator[Numbered]:
    try:
        for item in early:
            yield item
        early.clear()
        async for item in events:
            yield item
    finally:
        await events.aclose()
