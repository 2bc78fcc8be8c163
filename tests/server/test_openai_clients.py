"""OpenAI's own client against a real server on loopback: what it makes of replies, streams and refusals."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from openm3.engine.request import Logprob
from openm3.server.calls import Call, PromptScores, Scores, Started
from openm3.tokens import Content, Thinking
from tests.server.fake import ANSWER, FakeService, Step, app_of, called, finished, reply
from tests.server.serving import served

USER: Any = {"role": "user", "content": "hi"}
TOOLS: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
TOOL_TURN = reply(
    Thinking("Hm."),
    *called(0, "get_weather", {"city": "Rome"}),
    *called(1, "get_weather", {"city": "Bern"}),
    last=finished("tool_calls"),
)


def connected(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_chat() -> None:
    with served(app_of(FakeService())) as url, connected(url) as client:
        said = client.chat.completions.create(model="m3-tiny", messages=[USER], extra_body={"reasoning_split": True})
    message = said.choices[0].message
    assert message.content == "Hello there."
    assert message.model_extra is not None
    assert message.model_extra["reasoning_content"] == "Let me think."
    assert said.usage is not None
    assert said.usage.total_tokens == 20
    assert said.usage.prompt_tokens_details is not None
    assert said.usage.prompt_tokens_details.cached_tokens == 4
    assert said.usage.completion_tokens_details is not None
    assert said.usage.completion_tokens_details.reasoning_tokens == 4


def test_a_streamed_chat_adds_up_to_the_whole_one() -> None:
    with served(app_of(FakeService())) as url, connected(url) as client:
        extra = {"reasoning_split": True}
        with client.chat.completions.stream(
            model="m3-tiny", messages=[USER], extra_body=extra, stream_options={"include_usage": True}
        ) as stream:
            streamed = stream.get_final_completion()
        whole = client.chat.completions.create(model="m3-tiny", messages=[USER], extra_body=extra)
    found, expected = streamed.choices[0].message.to_dict(), whole.choices[0].message.to_dict()
    for key in ("role", "content", "reasoning_content", "reasoning_details"):
        assert found[key] == expected[key], key
    assert streamed.choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert streamed.usage == whole.usage


def test_streamed_tool_calls_add_up() -> None:
    with served(app_of(FakeService(TOOL_TURN))) as url, connected(url) as client:
        with client.chat.completions.stream(model="m3-tiny", messages=[USER], tools=TOOLS) as stream:
            choice = stream.get_final_completion().choices[0]
        whole = client.chat.completions.create(model="m3-tiny", messages=[USER], tools=TOOLS).choices[0]
    assert choice.finish_reason == whole.finish_reason == "tool_calls"
    assert choice.message.content == whole.message.content == "<think>Hm.</think>"
    for calls in (choice.message.tool_calls, whole.message.tool_calls):
        assert [json.loads(call.function.arguments) for call in calls or ()] == [{"city": "Rome"}, {"city": "Bern"}]
        assert [call.function.name for call in calls or ()] == ["get_weather"] * 2
        assert len({call.id for call in calls or ()}) == 2


def test_a_turn_with_tools_is_replayed() -> None:
    service = FakeService(TOOL_TURN)
    with served(app_of(service)) as url, connected(url) as client:
        message = client.chat.completions.create(model="m3-tiny", messages=[USER], tools=TOOLS).choices[0].message
        results: Any = [
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls or ()
        ]
        replayed: Any = message.to_dict()
        client.chat.completions.create(model="m3-tiny", messages=[USER, replayed, *results], tools=TOOLS)
    _, assistant, *others = service.calls[1].messages or ()
    assert assistant["reasoning_content"] == "Hm."
    assert [call["function"]["arguments"] for call in assistant["tool_calls"]] == [
        '{"city": "Rome"}',
        '{"city": "Bern"}',
    ]
    assert [other["tool_call_id"] for other in others] == [call["id"] for call in assistant["tool_calls"]]


class Weather(BaseModel):
    city: str
    degrees: int


def test_structured_output_is_parsed() -> None:
    service = FakeService(reply(Content('{"city": "Rome", '), Content('"degrees": 21}')))
    with served(app_of(service)) as url, connected(url) as client:
        said = client.chat.completions.parse(model="m3-tiny", messages=[USER], response_format=Weather)
    assert said.choices[0].message.parsed == Weather(city="Rome", degrees=21)
    assert isinstance(service.call.schema, dict)
    assert list(service.call.schema["properties"]) == ["city", "degrees"]


def test_the_asynchronous_client_hears_several_streams_at_once() -> None:
    async def run(url: str) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

            async def hear() -> str:
                stream = await client.chat.completions.create(model="m3-tiny", messages=[USER], stream=True, n=2)
                chunks = [chunk async for chunk in stream]
                assert {chunk.id for chunk in chunks} == {chunks[0].id}
                return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices[0].index == 1)

            return await asyncio.gather(*(hear() for _ in range(8)))

    service = FakeService()
    with served(app_of(service)) as url:
        assert asyncio.run(run(url)) == ["<think>Let me think.</think>Hello there."] * 8
    assert len(service.calls) == 16


def test_completions_whole_and_streamed() -> None:
    def script(call: Call) -> list[Step]:
        scores = [PromptScores([Logprob(72, float("nan")), Logprob(105, -1.0)])] if call.echo else []
        return reply(*scores, Scores([Logprob(33, -0.5)]), Content("!"))

    with served(app_of(FakeService(script))) as url, connected(url) as client:
        whole = client.completions.create(model="m3-tiny", prompt="Hi", echo=True, logprobs=1, max_tokens=1)
        stream = client.completions.create(model="m3-tiny", prompt=[[72, 105]], stream=True)
        streamed = "".join(chunk.choices[0].text for chunk in stream)
    assert whole.choices[0].text == "Hi!"
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.tokens == ["H", "i", "!"]
    assert streamed == "!"


def test_refusals_are_the_clients_own_exceptions() -> None:
    with served(app_of(FakeService())) as url, connected(url) as client:
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="gpt-9", messages=[USER])
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.completions.create(model="m3-tiny", prompt="a", temperature=5)
    assert refused.value.param == "model"
    assert refused.value.code == "2013"


def test_a_failure_in_a_stream_is_an_exception() -> None:
    service = FakeService([Started(1), Content("Hel"), RuntimeError("hidden")])
    with served(app_of(service)) as url, connected(url) as client:
        heard = []
        with pytest.raises(openai.APIError, match="internal error"):
            for chunk in client.chat.completions.create(model="m3-tiny", messages=[USER], stream=True):
                heard.append(chunk.choices[0].delta.content)
    assert heard == ["", "Hel"]


def test_hanging_up_ends_the_calls_of_a_stream() -> None:
    service = FakeService([Started(1), Content("Hello"), asyncio.Event()])
    with served(app_of(service)) as url, connected(url) as client:
        stream = client.chat.completions.create(model="m3-tiny", messages=[USER], stream=True, n=2)
        assert next(iter(stream)).choices[0].delta.role == "assistant"
        assert service.num_running == 2
        stream.close()
        until(lambda: service.num_running == 0)


def test_hanging_up_ends_the_call_of_a_whole_reply() -> None:
    service = FakeService([Started(1), asyncio.Event()])
    with served(app_of(service)) as url, connected(url).with_options(timeout=0.3) as client:
        with pytest.raises(openai.APITimeoutError):
            client.completions.create(model="m3-tiny", prompt=["a", "b"])
        until(lambda: len(service.calls) == 2 and service.num_running == 0)


def test_what_one_reader_leaves_lying_holds_back_nobody() -> None:
    long = reply(*[Content("x" * 200)] * 2000)
    service = FakeService(lambda call: long if call.params.seed else ANSWER)
    with served(app_of(service)) as url, connected(url) as client:
        stream = client.chat.completions.create(model="m3-tiny", messages=[USER], stream=True, seed=1)
        next(iter(stream))
        assert client.chat.completions.create(model="m3-tiny", messages=[USER]).usage is not None
        stream.close()
