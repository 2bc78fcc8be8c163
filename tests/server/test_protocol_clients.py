"""The Python clients of Anthropic and OpenAI, as they are, against a server on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import anthropic
import openai
import pytest
from pydantic import BaseModel

from openm3.errors import BusyError
from openm3.server.calls import Call, Event, Started
from openm3.tokens import Content, Thinking
from tests.server.fake import FakeService, app_of, called, saying, whole_turn
from tests.server.serving import served

ASK: dict[str, Any] = {
    "model": "m3-tiny",
    "max_tokens": 64,
    "messages": [{"role": "user", "content": "The weather?"}],
}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
WEATHER: dict[str, Any] = {"name": "get_weather", "description": "The weather.", "input_schema": SCHEMA}
FUNCTION: dict[str, Any] = {"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": False}


class City(BaseModel):
    """What a reply is parsed to."""

    city: str


class Stage:
    """A service whose play can be changed between calls."""

    def __init__(self) -> None:
        self.play = FakeService([])
        self.model_names, self.max_tokens = self.play.model_names, self.play.max_tokens

    def check_model(self, name: object) -> str:
        return self.play.check_model(name)

    def stream(self, call: Call) -> AsyncGenerator[Event]:
        return self.play.stream(call)

    async def count(self, call: Call) -> int:
        return await self.play.count(call)


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage()


@pytest.fixture(scope="module")
def address(stage: Stage) -> Iterator[str]:
    with served(app_of(stage)) as address:
        yield address


@pytest.fixture(params=["", "/anthropic"])
def claude(address: str, request: pytest.FixtureRequest) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=address + request.param, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def gpt(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_conversation_with_tools(stage: Stage, claude: anthropic.Anthropic) -> None:
    """What comes back goes into the next request as it is, thoughts and signature included."""
    stage.play = whole_turn()
    message = claude.messages.create(**ASK, tools=[WEATHER], thinking={"type": "enabled", "budget_tokens": 1024})
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert (message.stop_reason, message.usage.input_tokens, message.usage.cache_read_input_tokens) == (
        "tool_use",
        7,
        4,
    )
    stage.play = saying(Content("Sunny."))
    calls = [block for block in message.content if block.type == "tool_use"]
    results = [{"type": "tool_result", "tool_use_id": block.id, "content": "sun"} for block in calls]
    turns = [*ASK["messages"], message.to_param(), {"role": "user", "content": results}]
    message = claude.messages.create(**ASK | {"messages": turns}, tools=[WEATHER])
    assert (message.content[0].type, message.stop_reason) == ("text", "end_turn")
    replayed = stage.play.calls[0].messages
    assert replayed is not None and [one["role"] for one in replayed] == ["user", "assistant", "tool", "tool"]
    assert (replayed[1]["reasoning_content"], len(replayed[1]["tool_calls"])) == ("I should look.", 2)


def test_streams_of_messages(stage: Stage, claude: anthropic.Anthropic) -> None:
    stage.play = whole_turn()
    with claude.messages.stream(**ASK, tools=[WEATHER]) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()
    assert kinds.count("thinking") == 2 and kinds.count("text") == 2 and kinds.count("input_json") == 3
    thinking, text, weather, _ = message.content
    assert thinking.type == "thinking" and thinking.thinking == "I should look." and len(thinking.signature) == 64
    assert text.type == "text" and text.text == "Looking it up."
    assert weather.type == "tool_use" and weather.input == {"city": "Paris", "days": 2}
    assert (message.stop_reason, message.usage.input_tokens, message.usage.output_tokens) == ("tool_use", 7, 9)
    with claude.messages.stream(**ASK) as stream:
        assert list(stream.text_stream) == ["Looking", " it up."]


def test_text_of_a_schema(stage: Stage, claude: anthropic.Anthropic) -> None:
    stage.play = saying(Content('{"city": "Paris"}'))
    message = claude.messages.parse(**ASK, output_format=City)
    assert message.parsed_output == City(city="Paris")
    schema = stage.play.calls[0].schema
    assert isinstance(schema, dict) and schema["properties"].keys() == {"city"}


def test_counting_and_errors_of_messages(stage: Stage, claude: anthropic.Anthropic) -> None:
    stage.play = saying()
    counted = claude.messages.count_tokens(model="m3-tiny", messages=ASK["messages"], tools=[WEATHER], system="x")
    assert counted.input_tokens == 11
    with pytest.raises(anthropic.BadRequestError, match="gpt-9"):
        claude.messages.create(**ASK | {"model": "gpt-9"})
    stage.play = FakeService([BusyError("full")])
    with pytest.raises(anthropic.RateLimitError, match="full"):
        claude.messages.create(**ASK)
    stage.play = FakeService([Started(3), Content("Hi"), ValueError("secret")])
    with pytest.raises(anthropic.APIStatusError, match="internal error"), claude.messages.stream(**ASK) as stream:
        stream.until_done()


def test_messages_at_once(stage: Stage, address: str) -> None:
    stage.play = whole_turn()

    async def one(client: anthropic.AsyncAnthropic) -> str:
        async with client.messages.stream(**ASK) as stream:
            return await stream.get_final_text()

    async def several() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=address, api_key="none", max_retries=0) as client:
            assert (await client.messages.create(**ASK)).stop_reason == "tool_use"
            assert (await client.messages.count_tokens(model="m3-tiny", messages=ASK["messages"])).input_tokens == 11
            return await asyncio.gather(*(one(client) for _ in range(4)))

    assert asyncio.run(several()) == ["Looking it up."] * 4


def test_a_client_that_goes_away_ends_its_call(stage: Stage, address: str) -> None:
    gate = asyncio.Event()
    fakes = [stage.play]

    async def leave(start: Any) -> None:
        stage.play = FakeService([Started(3), Content("Hi"), gate])
        fakes.append(stage.play)
        await start()
        for _ in range(200):
            if stage.play.num_ended:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the call goes on")

    async def several() -> None:
        async with anthropic.AsyncAnthropic(base_url=address, api_key="none", max_retries=0) as client:

            async def streamed() -> None:
                async with client.messages.stream(**ASK) as stream:
                    async for _ in stream.text_stream:
                        return

            async def whole() -> None:
                with pytest.raises(anthropic.APITimeoutError):
                    await client.messages.create(**ASK, timeout=0.2)

            await leave(streamed)
            await leave(whole)

    asyncio.run(several())
    assert [len(fake.calls) for fake in fakes[1:]] == [1, 1]


def test_a_response_with_tools(stage: Stage, gpt: openai.OpenAI) -> None:
    stage.play = whole_turn()
    response = gpt.responses.create(model="m3-tiny", input="The weather?", tools=[FUNCTION])
    assert (response.output_text, response.status) == ("Looking it up.", "completed")
    assert response.usage is not None and response.usage.output_tokens_details.reasoning_tokens == 3
    calls = [item for item in response.output if item.type == "function_call"]
    stage.play = saying(Content("Sunny."))
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "sun"} for call in calls]
    turns: Any = [{"role": "user", "content": "The weather?"}, *response.output, *results]
    assert gpt.responses.create(model="m3-tiny", input=turns, tools=[FUNCTION]).output_text == "Sunny."
    replayed = stage.play.calls[0].messages
    assert replayed is not None and [one["role"] for one in replayed] == ["user", "assistant", "tool", "tool"]
    assert replayed[1]["reasoning_content"] == "I should look."


def test_streams_of_responses(stage: Stage, gpt: openai.OpenAI) -> None:
    stage.play = whole_turn()
    with gpt.responses.stream(model="m3-tiny", input="x", tools=[FUNCTION], reasoning={"summary": "auto"}) as stream:
        events = list(stream)
        response = stream.get_final_response()
    snapshots = [event.snapshot for event in events if event.type == "response.output_text.delta"]
    assert snapshots == ["Looking", "Looking it up."]
    reasoning, message, weather, _ = response.output
    assert reasoning.type == "reasoning" and reasoning.summary[0].text == "I should look."
    assert message.type == "message" and response.output_text == "Looking it up."
    assert weather.type == "function_call" and weather.arguments == '{"city": "Paris", "days": 2}'


def test_a_response_of_a_schema(stage: Stage, gpt: openai.OpenAI) -> None:
    stage.play = saying(Thinking("Hm."), Content('{"city":'), Content(' "Paris"}'))
    assert gpt.responses.parse(model="m3-tiny", input="x", text_format=City).output_parsed == City(city="Paris")
    with gpt.responses.stream(model="m3-tiny", input="x", text_format=City) as stream:
        assert stream.get_final_response().output_parsed == City(city="Paris")
    schema = stage.play.calls[0].schema
    assert isinstance(schema, dict) and schema["properties"].keys() == {"city"}


def test_functions_of_a_namespace(stage: Stage, gpt: openai.OpenAI) -> None:
    stage.play = saying(*called(0, "crm__get_weather", {"city": "Paris"}))
    tools: Any = [{"type": "namespace", "name": "crm", "description": "A desk.", "tools": [FUNCTION]}]
    with gpt.responses.stream(model="m3-tiny", input="x", tools=tools) as stream:
        call = stream.get_final_response().output[0]
    assert call.type == "function_call" and (call.namespace, call.name) == ("crm", "get_weather")


def test_counting_and_errors_of_responses(stage: Stage, gpt: openai.OpenAI) -> None:
    stage.play = saying()
    assert gpt.responses.input_tokens.count(model="m3-tiny", input="x", instructions="y").input_tokens == 11
    with pytest.raises(openai.BadRequestError, match="nothing is stored"):
        gpt.responses.create(model="m3-tiny", input="x", previous_response_id="resp_1")
    stage.play = FakeService([BusyError("full")])
    with pytest.raises(openai.RateLimitError, match="full"):
        gpt.responses.create(model="m3-tiny", input="x")
    stage.play = FakeService([Started(3), Content("Hi"), ValueError("secret")])
    last = list(gpt.responses.create(model="m3-tiny", input="x", stream=True))[-1]
    assert last.type == "response.failed" and last.response.error is not None
    assert last.response.error.message.startswith("internal error")


def test_responses_at_once(stage: Stage, address: str) -> None:
    stage.play = whole_turn()

    async def one(client: openai.AsyncOpenAI) -> str:
        async with client.responses.stream(model="m3-tiny", input="x") as stream:
            return (await stream.get_final_response()).output_text

    async def several() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            assert (await client.responses.create(model="m3-tiny", input="x")).output_text == "Looking it up."
            return await asyncio.gather(*(one(client) for _ in range(4)))

    assert asyncio.run(several()) == ["Looking it up."] * 4
