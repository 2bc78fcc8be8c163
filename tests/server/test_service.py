"""Calls on m3-tiny: what comes out, when, and what ends it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from openm3.engine.request import Completion, Delta, SamplingParams, Timings, Usage
from openm3.errors import BusyError, EngineError, PromptError
from openm3.model.model import Model
from openm3.server.calls import Call, Event, Finished, Looked, Prompt, PromptScores, Scores, Started
from openm3.server.errors import RequestError, refusal
from openm3.server.service import SILENCE, Service
from openm3.server.settings import ServerSettings
from openm3.tokens import Content, ToolArguments, ToolEnd, ToolStart

Play = Callable[..., None]

QUESTION = ({"role": "user", "content": "Quote the line that defines main."},)
ASK = Call(messages=QUESTION, thinking="disabled", params=SamplingParams(max_tokens=40))
LONG = Call(prompt="def main():", params=SamplingParams(max_tokens=4000, ignore_eos=True))


async def all_of(service: Service, call: Call) -> list[Event]:
    return [event async for event in service.stream(call)]


def content(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Content))


def test_a_reply_is_the_models_own(play: Play, model: Model) -> None:
    async def test(service: Service) -> None:
        ids = model.tokenizer.chat(QUESTION, thinking="disabled")
        first, *events, last = await all_of(service, ASK)
        assert first == Started(len(ids)) and await service.count(ASK) == len(ids)
        assert await service.prompt(ASK) == Prompt(ids, [], [])
        own = list(model.generate(ids, max_new_tokens=40, stop_ids=[model.tokenizer.eos_id]))
        assert content(events) == model.tokenizer.decode(own)
        assert isinstance(last, Finished) and last.reason == "stop" and last.thinking_tokens == 0
        assert last.usage.prompt_tokens == len(ids) and last.usage.completion_tokens == len(own) + 1
        long = Call(prompt="def main():\n" * 200, params=SamplingParams(max_tokens=2))
        cached = []
        for _ in range(2):
            *_, last = await all_of(service, long)
            assert isinstance(last, Finished)
            cached.append(last.usage.cached_tokens)
        assert cached[0] == 0 < cached[1]

    play(test)


def test_the_limit_is_kept_exactly_and_a_stop_string_is_told(play: Play) -> None:
    async def test(service: Service) -> None:
        call = replace(LONG, params=SamplingParams(max_tokens=17, ignore_eos=True))
        *_, last = events = await all_of(service, call)
        assert isinstance(last, Finished) and (last.reason, last.usage.completion_tokens) == ("length", 17)
        text = content(events)
        stop = text[10:13]
        *_, last = events = await all_of(service, replace(call, params=replace(call.params, stop=[stop])))
        assert isinstance(last, Finished) and (last.reason, last.stop) == ("stop", stop)
        assert content(events) == text[: text.index(stop)]

    play(test)


def test_a_reply_longer_than_the_context_is_cut_to_what_fits(play: Play) -> None:
    async def test(service: Service) -> None:
        params = SamplingParams(max_tokens=524_288, ignore_eos=True, min_tokens=500_000)
        *_, last = await all_of(service, Call(prompt=[5] * 200, params=params))
        assert service.max_model_len == 257
        assert isinstance(last, Finished) and (last.reason, last.usage.completion_tokens) == ("length", 57)
        with pytest.raises(RequestError, match="prompt is too long: 257 tokens > 256 maximum") as caught:
            await all_of(service, Call(prompt=[5] * 257))
        assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
        *_, last = await all_of(service, Call(prompt=[5] * 256))
        assert isinstance(last, Finished) and last.usage.completion_tokens == 1

    play(test, cache_tokens=256)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (Call(prompt=""), "the prompt is empty"),
        (Call(), "the prompt is empty"),
        (Call(prompt=[1_000_000]), "outside the vocabulary"),
        (Call(prompt=[-1]), "outside the vocabulary"),
        (Call(messages=[]), "messages is empty"),
        (Call(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "1 pictures and videos"),
        (Call(messages=QUESTION, tools=[{"type": "function"}]), "tool 0 must be a function with a name"),
    ],
)
def test_what_cannot_be_run_is_refused_as_the_clients_fault(play: Play, call: Call, why: str) -> None:
    async def test(service: Service) -> None:
        with pytest.raises(PromptError, match=why) as caught:
            await all_of(service, call)
        assert refusal(caught.value).status == 400

    play(test)


def test_tools_are_in_the_prompt_unless_none_may_be_called(play: Play) -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"b": 1, "a": 2}}}

    async def test(service: Service) -> None:
        prompts = [
            service.tokenizer.decode(
                (await service.prompt(Call(messages=QUESTION, tools=[tool], tool_choice=choice))).ids
            )
            for choice in ("auto", "none")
        ]
        assert '"name": "look_up", "parameters": {"b": 1, "a": 2}' in prompts[0]
        assert "look_up" not in prompts[1]

    play(test)


def test_scores_and_blocks_come_where_they_are_asked_for(play: Play, model: Model) -> None:
    async def test(service: Service) -> None:
        ids = model.tokenizer.encode("def main():\n    return")
        call = Call(prompt=ids, params=SamplingParams(max_tokens=5, logprobs=2), echo=True, xray=True)
        first, second, *events, last = await all_of(service, call)
        assert isinstance(first, Started) and isinstance(second, PromptScores) and isinstance(last, Finished)
        assert [score.id for score in second.tokens] == ids and len(second.tokens[1].top) == 2
        scores = [score for event in events if isinstance(event, Scores) for score in event.tokens]
        assert [score.id for score in scores] == list(model.generate(ids, max_new_tokens=5))
        looks = [event for event in events if isinstance(event, Looked)]
        assert sum(len(look.ids) for look in looks) == 5
        # One page: every layer and group looked at it.
        assert looks[0].blocks[0] == [[[0]] * model.config.num_groups] * model.config.num_layers

    play(test)


def test_packets_are_worth_sending(play: Play) -> None:
    async def test(service: Service) -> None:
        loop = asyncio.get_running_loop()
        times, texts = [], []
        async for event in service.stream(replace(LONG, params=replace(LONG.params, max_tokens=300))):
            if isinstance(event, Content):
                times.append(loop.time())
                texts.append(event.text)
        assert all(5 <= len(text) <= 200 for text in texts[1:-1]) and len(texts) > 5
        assert len(times) < (times[-1] - times[0]) / 0.03 + 3

    play(test)


class SlowReply:
    """An engine's reply whose deltas come when they are given."""

    def __init__(self) -> None:
        self.deltas: asyncio.Queue[Delta] = asyncio.Queue()

    async def __anext__(self) -> Delta:
        return await self.deltas.get()

    def close(self) -> None:
        pass


def test_short_text_waits_for_more_but_not_long(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(service: Service) -> None:
        reply = SlowReply()

        async def submit(*_: object, **__: object) -> SlowReply:
            return reply

        monkeypatch.setattr(service._engine, "submit", submit)
        stream = service.stream(LONG)

        async def heard(*texts: str) -> Event:
            for text in texts:
                reply.deltas.put_nowait(Delta([5], text))
            return await asyncio.wait_for(anext(stream), 10)

        assert await anext(stream) == Started(3)
        assert await heard("a") == Content("a")
        # Five at once need nobody to wait; with fewer the next token's time is not waited for.
        assert await heard("b", "cdef") == Content("bcdef")
        for text in ("g", "hi"):
            begin = asyncio.get_running_loop().time()
            assert await heard(text) == Content(text)
            assert asyncio.get_running_loop().time() - begin > 0.9 * SILENCE
        # Nothing is held: nothing is told, however long it takes.
        silent = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(1.5 * SILENCE)
        assert not silent.done()
        usage = Usage(3, 0, 6)
        reply.deltas.put_nowait(Delta([5], "j"))
        ended = Completion([5] * 6, "abcdefghijk", "length", usage, Timings(0, 0, 0))
        reply.deltas.put_nowait(Delta([5], "k", "length", ended))
        assert await silent == Content("jk")
        assert [event async for event in stream] == [Finished("length", usage)]

    play(test)


def test_who_goes_away_ends_the_reply(play: Play) -> None:
    async def test(service: Service) -> None:
        stream = service.stream(LONG)
        assert isinstance(await anext(stream), Started)
        assert isinstance(await anext(stream), Content)
        await stream.aclose()
        stats = await service.stats()
        assert stats is not None and (stats["requests_running"], stats["pages_held"]) == (0, 0)

        task = asyncio.create_task(all_of(service, LONG))
        while not (await service.stats() or {})["requests_running"]:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        stats = await service.stats()
        assert stats is not None and (stats["requests_running"], stats["pages_held"]) == (0, 0)
        assert 'openm3_request_success_total{finished_reason="abort"} 2.0' in service.metrics.render(stats).decode()

    play(test)


def test_slow_readers_hold_back_nobody(play: Play) -> None:
    async def test(service: Service) -> None:
        slow = service.stream(replace(LONG, params=replace(LONG.params, max_tokens=200)))
        events = [await anext(slow), await anext(slow)]
        *_, last = await all_of(service, replace(LONG, params=replace(LONG.params, max_tokens=250)))
        assert isinstance(last, Finished) and last.usage.completion_tokens == 250
        events += [event async for event in slow]
        assert len(events) < 20 and all(len(event.text) <= 200 for event in events if isinstance(event, Content))

    play(test)


def test_a_long_prompt_leaves_the_loop_free(play: Play) -> None:
    async def test(service: Service) -> None:
        loop = asyncio.get_running_loop()
        counting = asyncio.create_task(
            service.count(Call(messages=[{"role": "user", "content": "def f(x): x\n" * 60_000}]))
        )
        longest = 0.0
        while not counting.done():
            begin = loop.time()
            await asyncio.sleep(0.001)
            longest = max(longest, loop.time() - begin)
        assert counting.result() > 200_000
        assert longest < 0.3

    play(test)


def test_closing_refuses_what_comes_and_ends_what_runs_with_an_error(play: Play) -> None:
    async def test(service: Service) -> None:
        running = service.stream(LONG)
        await anext(running)
        short = asyncio.create_task(all_of(service, ASK))
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(service.close(grace=1.5))
        await asyncio.sleep(0)
        assert service.alive and not service.ready
        with pytest.raises(RequestError, match="shutting down") as caught:
            await all_of(service, ASK)
        assert caught.value.status == 503
        *_, last = await short
        assert isinstance(last, Finished) and last.reason == "stop"
        with pytest.raises(RequestError, match="shutting down"):
            async for _ in running:
                pass
        await closing
        assert not service.alive and await service.stats() is None

    play(test)


def test_closing_waits_no_longer_than_replies_run(play: Play) -> None:
    async def test(service: Service) -> None:
        begin = asyncio.get_running_loop().time()
        task = asyncio.create_task(all_of(service, ASK))
        await asyncio.sleep(0.01)
        await service.close(grace=60)
        *_, last = await task
        assert isinstance(last, Finished) and last.reason == "stop"
        assert asyncio.get_running_loop().time() - begin < 30

    play(test)


def test_a_full_engine_says_so(play: Play) -> None:
    async def test(service: Service) -> None:
        streams = [service.stream(LONG) for _ in range(2)]
        for stream in streams:
            assert isinstance(await anext(stream), Started)
        with pytest.raises(BusyError) as caught:
            for _ in range(3):
                streams.append(service.stream(LONG))
                await anext(streams[-1])
        assert refusal(caught.value).status == 429
        for stream in streams:
            await stream.aclose()

    play(test, max_requests=1, max_waiting=1, cache_tokens=16_384)


def test_an_engine_that_has_failed_is_told(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(service: Service) -> None:
        monkeypatch.setattr(service._engine.engine.runner, "run", lambda *_: 1 / 0)
        with pytest.raises(EngineError) as caught:
            await all_of(service, ASK)
        assert refusal(caught.value).status == 503
        assert not service.alive and not service.ready and await service.stats() is None
        service._engine.engine.abort(1)

    play(test)


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"days": {"type": "integer"}}, "required": ["days"]},
    },
}


@pytest.mark.parametrize("choice", ["required", "get_weather"])
def test_a_call_that_must_come_comes(play: Play, choice: str) -> None:
    async def test(service: Service) -> None:
        call = Call(
            messages=QUESTION,
            tools=[TOOL],
            tool_choice=choice,
            parallel_tool_calls=False,
            thinking="disabled",
            params=SamplingParams(max_tokens=400, temperature=1.0, seed=1),
        )
        *events, last = await all_of(service, call)
        assert isinstance(last, Finished) and last.reason in ("tool_calls", "length")
        assert events[1] == ToolStart(0, "get_weather")
        (end,) = [event for event in events if isinstance(event, ToolEnd)]
        assert list(end.arguments) == ["days"] and isinstance(end.arguments["days"], int)
        text = "".join(event.text for event in events if isinstance(event, ToolArguments))
        assert last.reason == "length" or json.loads(text) == end.arguments

    play(test)


def test_a_schema_that_nothing_fits_is_the_clients_fault(play: Play) -> None:
    """Too many properties for the grammar's limits: found out in the middle of the reply, and the engine goes on."""
    names = [f"property_{i}" for i in range(4000)]
    schema = {"type": "object", "properties": {name: {"type": "integer"} for name in names}}

    async def test(service: Service) -> None:
        with pytest.raises(RequestError, match=r"make them simpler|cannot be made a grammar") as refused:
            await all_of(service, replace(ASK, schema=schema))
        assert refused.value.status == 400
        *_, last = await all_of(service, ASK)
        assert isinstance(last, Finished) and last.reason == "stop"

    play(test)


def test_a_schema_and_a_budget_are_kept(play: Play) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }

    async def test(service: Service) -> None:
        params = SamplingParams(max_tokens=100)
        for call in (
            Call(messages=QUESTION, schema=schema, thinking="enabled", thinking_budget=12, params=params),
            Call(prompt="Is it? ", schema=schema, params=params),
        ):
            *events, last = await all_of(service, call)
            assert json.loads(content(events)) in ({"ok": True}, {"ok": False})
            assert isinstance(last, Finished) and last.reason == "stop"
            assert last.thinking_tokens <= 13
        with pytest.raises(PromptError, match="not among the tools"):
            await all_of(service, Call(messages=QUESTION, tools=[TOOL], tool_choice="other"))
        with pytest.raises(PromptError):
            await all_of(service, Call(messages=QUESTION, schema={"type": 7}))

    play(test)


def test_names_are_checked(play: Play) -> None:
    async def test(service: Service) -> None:
        assert service.model_names == ("M3", "other") and service.max_tokens == 99
        assert [service.check_model(name) for name in (None, "M3", "other")] == ["M3", "M3", "other"]
        for name in ("gpt-7", "", 3, ["M3"], {}):
            with pytest.raises(RequestError, match="does not exist here; this server has: M3, other") as caught:
                service.check_model(name)
            assert (caught.value.status, caught.value.param) == (404, "model")

    play(test, settings=ServerSettings(names=("M3", "other"), max_tokens=99))


def test_a_reply_ends_after_the_servers_time(play: Play) -> None:
    async def test(service: Service) -> None:
        *_, last = await all_of(service, LONG)
        assert isinstance(last, Finished) and last.reason == "timeout"

    play(test, settings=ServerSettings(reply_seconds=0.2))
