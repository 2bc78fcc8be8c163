"""Many tasks, one engine: replies, cancellation, slow listeners, errors, closing."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openm3.config import BLOCK, EngineConfig
from openm3.engine.asynchronous import AsyncEngine, joined
from openm3.engine.engine import Engine
from openm3.engine.request import Delta, Logprob, SamplingParams
from openm3.errors import BusyError, EngineError, PromptError
from openm3.model.model import Model, load

GOLDEN = Path(__file__).parents[1] / "golden/m3-random-s0"
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
LONG = SamplingParams(max_tokens=2000, ignore_eos=True)

Scenario = Callable[[AsyncEngine], Coroutine[Any, Any, None]]


@pytest.fixture(scope="module")
def model() -> Model:
    return load(GOLDEN / "model")


def words(seed: int, count: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(300) for _ in range(count)]


def play(model: Model, scenario: Scenario, **config: Any) -> Engine:
    """Run a scenario over a fresh engine, and close it."""
    engine = Engine(model, EngineConfig(**{"cache_tokens": 60 * BLOCK, "step_tokens": 300, "check": True, **config}))

    async def whole() -> None:
        async with AsyncEngine(engine) as served:
            await asyncio.wait_for(scenario(served), 60)

    asyncio.run(whole())
    assert engine.pages.num_held == 0 and not engine.has_work
    return engine


def test_many_tasks_get_their_own_replies(model: Model) -> None:
    prompts = [words(i, 50 + 40 * i) for i in range(10)]

    async def scenario(served: AsyncEngine) -> None:
        completions = await asyncio.gather(*(served.generate(prompt, GREEDY) for prompt in prompts))
        for prompt, completion in zip(prompts, completions, strict=True):
            assert completion.ids == list(model.generate(prompt, max_new_tokens=12))
        assert (await served.stats())["requests_finished"] == 10

    play(model, scenario)


def test_who_goes_away_ends_the_request(model: Model) -> None:
    async def scenario(served: AsyncEngine) -> None:
        async def listen() -> None:
            async for _ in served.stream(words(1, 400), LONG):
                first.set()

        first = asyncio.Event()
        task = asyncio.create_task(listen())
        await first.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async for _ in served.stream(words(2, 30), LONG):
            break
        assert (await served.generate(words(3, 20), GREEDY)).finish_reason == "length"
        assert (await served.stats())["requests_running"] == 0

    assert play(model, scenario).totals["tokens_generated"] < 500


def test_slow_listeners_get_long_deltas_and_hold_back_nobody(model: Model) -> None:
    async def scenario(served: AsyncEngine) -> None:
        prompt = words(4, 30)
        slow = served.stream(prompt, SamplingParams(max_tokens=60, ignore_eos=True))
        deltas = [await anext(slow)]
        await served.generate(words(5, 20), SamplingParams(max_tokens=80, ignore_eos=True))
        deltas += [delta async for delta in slow]
        assert len(deltas) < 10
        assert [i for delta in deltas for i in delta.ids] == list(model.generate(prompt, max_new_tokens=60))
        assert deltas[-1].completion is not None
        assert "".join(delta.text for delta in deltas) == deltas[-1].completion.text

    play(model, scenario)


def test_a_pace_joins_deltas_but_not_the_first_and_the_last(model: Model) -> None:
    async def scenario(served: AsyncEngine) -> None:
        prompt = words(4, 30)
        begin = asyncio.get_running_loop().time()
        reply = await served.submit(prompt, SamplingParams(max_tokens=60, ignore_eos=True), pace=30.0)
        first, last = [delta async for delta in reply]
        assert asyncio.get_running_loop().time() - begin < 20
        assert first.completion is None and len(first.ids) < 10
        assert first.ids + last.ids == list(model.generate(prompt, max_new_tokens=60))
        assert [delta async for delta in reply] == []

    play(model, scenario)


def test_a_reply_is_let_in_before_it_is_listened_to_and_closed_at_any_time(model: Model) -> None:
    async def scenario(served: AsyncEngine) -> None:
        with pytest.raises(PromptError, match="the prompt is empty"):
            await served.submit([])
        reply = await served.submit(words(1, 400), LONG)
        stats = await served.stats()
        assert stats["requests_running"] + stats["requests_waiting"] == 1
        reply.close()
        assert (await served.stats())["requests_running"] == 0
        waiting = asyncio.create_task(served.submit(words(2, 30), LONG))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        stats = await served.stats()
        assert stats["requests_running"] + stats["requests_waiting"] == 0
        assert served.running

    play(model, scenario)


def test_what_is_wrong_is_said_to_who_asked(model: Model) -> None:
    async def scenario(served: AsyncEngine) -> None:
        with pytest.raises(PromptError, match="the prompt is empty"):
            await served.generate([], GREEDY)
        assert (await served.generate(words(6, 9), GREEDY)).finish_reason == "length"

    play(model, scenario)


def test_closing_aborts_what_runs(model: Model) -> None:
    async def scenario(served: AsyncEngine) -> None:
        stream = served.stream(words(7, 100), LONG)
        await anext(stream)
        await served.close()
        *_, last = [delta async for delta in stream]
        assert last.finish_reason == "abort"
        with pytest.raises(BusyError, match="the engine is closed"):
            await served.generate([1], GREEDY)

    play(model, scenario)


def test_a_failing_step_is_told_to_everyone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(model, EngineConfig(cache_tokens=4000))

    async def whole() -> None:
        served = AsyncEngine(engine)
        stream = served.stream(words(8, 100), LONG)
        await anext(stream)
        monkeypatch.setattr(engine.runner, "run", lambda *_: 1 / 0)
        with pytest.raises(EngineError, match="the engine has stopped: ZeroDivisionError"):
            async for _ in stream:
                pass
        with pytest.raises(EngineError, match="ZeroDivisionError"):
            await served.generate([1], GREEDY)
        await served.close()

    asyncio.run(asyncio.wait_for(whole(), 60))


def test_who_comes_while_a_step_fails_is_told_too(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its call lies in the queue when the thread ends: nobody may wait for ever."""
    engine = Engine(model, EngineConfig(cache_tokens=4000))

    async def whole() -> None:
        served = AsyncEngine(engine)
        begun, may_fail = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def failing(*_: object) -> None:
            loop.call_soon_threadsafe(begun.set)
            may_fail.wait(30)
            raise RuntimeError("broken")

        monkeypatch.setattr(engine.runner, "run", failing)
        first = asyncio.create_task(served.generate(words(9, 100), LONG))
        await begun.wait()
        second = asyncio.create_task(served.generate(words(10, 100), LONG))
        await asyncio.sleep(0)
        may_fail.set()
        for task in (first, second):
            with pytest.raises(EngineError, match="the engine has stopped: RuntimeError"):
                await asyncio.wait_for(task, 30)
        await served.close()

    asyncio.run(whole())


def test_deltas_join() -> None:
    assert joined([Delta([1], "a"), Delta([2], "b", "stop")]) == Delta([1, 2], "ab", "stop")
    scored, plain = [Logprob(7, -1.0)], [Logprob(1, -0.5)]
    blocks = [np.full((2, 1, 4), i, dtype=np.int32) for i in range(3)]
    first = Delta([1], "a", logprobs=plain, blocks=blocks[:1], prompt_logprobs=scored)
    both = joined([first, Delta([2, 3], "b", blocks=blocks[1:])])
    assert (both.ids, both.logprobs, both.prompt_logprobs) == ([1, 2, 3], plain, scored)
    assert both.blocks is not None and [int(block[0, 0, 0]) for block in both.blocks] == [0, 1, 2]
