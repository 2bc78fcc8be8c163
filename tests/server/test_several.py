"""Calls that run side by side: order, limits, and that all of them end."""

import asyncio
from contextlib import aclosing

import pytest

from openm3.errors import BusyError
from openm3.server.calls import Call, Event, Finished, Started
from openm3.server.several import AT_ONCE, opened, together
from openm3.tokens import Content
from tests.server.fake import FakeService, reply


def test_the_events_of_all_come_as_they_are_made() -> None:
    async def run() -> list[tuple[int, Event]]:
        gate = asyncio.Event()
        slow = FakeService([Started(1), gate, Content("slow")])
        fast = FakeService([Started(2), Content("fast")])
        seen = []
        async for number, event in together([slow.stream(Call()), fast.stream(Call())]):
            seen.append((number, event))
            if event == Content("fast"):
                gate.set()
        return seen

    assert asyncio.run(run()) == [(0, Started(1)), (1, Started(2)), (1, Content("fast")), (0, Content("slow"))]


@pytest.mark.parametrize("count", [1, 2, AT_ONCE + 3])
def test_closing_ends_all(count: int) -> None:
    async def run() -> FakeService:
        service = FakeService([Started(1), Content("a"), asyncio.Event()])
        async with aclosing(together([service.stream(Call()) for _ in range(count)])) as events:
            async for _, event in events:
                if event == Content("a"):
                    break
            assert service.num_running == min(count, AT_ONCE)
        return service

    assert asyncio.run(run()).num_running == 0


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_failure_ends_all(count: int) -> None:
    async def run() -> FakeService:
        gate = asyncio.Event()
        service = FakeService(lambda call: [Started(1), BusyError("full") if call.echo else gate])
        with pytest.raises(BusyError):
            _ = [one async for one in together([service.stream(Call(echo=i == count - 1)) for i in range(count)])]
        return service

    service = asyncio.run(run())
    assert service.num_running == 0
    assert len(service.calls) == count


def test_cancelling_ends_all() -> None:
    async def run() -> FakeService:
        service = FakeService([Started(1), asyncio.Event()])

        async def listen() -> None:
            async for _ in together([service.stream(Call()) for _ in range(3)]):
                pass

        listening = asyncio.ensure_future(listen())
        while service.num_running < 3:
            await asyncio.sleep(0)
        listening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await listening
        return service

    assert asyncio.run(run()).num_running == 0


def test_opened_waits_for_all_that_begin_and_loses_nothing() -> None:
    async def run() -> list[tuple[int, Event]]:
        late = FakeService([0.005, *reply(Content("late"))])
        soon = FakeService(reply(Content("soon")))
        return [one async for one in await opened([late.stream(Call()), soon.stream(Call())])]

    events = asyncio.run(run())
    for number, text in ((0, "late"), (1, "soon")):
        own = [event for one, event in events if one == number]
        assert own[:2] == [Started(11), Content(text)]
        assert isinstance(own[2], Finished)
        assert len(own) == 3


def test_opened_raises_what_refuses_one() -> None:
    async def run() -> FakeService:
        service = FakeService(lambda call: [BusyError("full")] if call.echo else reply(Content("a")))
        with pytest.raises(BusyError):
            await opened([service.stream(Call()), service.stream(Call(echo=True))])
        return service

    assert asyncio.run(run()).num_running == 0
