"""Anthropic's own Python client, against `openm3 serve` with m3-tiny; where tools are called, against the stage."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import pytest
from anthropic import beta_tool
from pydantic import BaseModel

from openm3.tokens import render_tool_call
from tests.e2e.questions import Question
from tests.e2e.scripted import Stage

pytestmark = pytest.mark.e2e

PLAIN: Any = {
    "model": "m3-tiny",
    "max_tokens": 64,
    "thinking": {"type": "disabled"},
    "extra_body": {"temperature": 0},
}
"""The likeliest tokens, and no thoughts."""


class Line(BaseModel):
    """What a reply is read as: nothing in it may be as long as a weak model likes."""

    kind: Literal["class", "function"]
    is_public: bool
    number: Literal[1, 2, 3]


@pytest.fixture(scope="module", params=["", "/anthropic"])
def client(served: str, request: pytest.FixtureRequest) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served + request.param, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def played(theatre: tuple[Stage, str]) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=theatre[1], api_key="none", max_retries=0) as client:
        yield client


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_a_message_is_what_the_model_says(client: anthropic.Anthropic, question: Question) -> None:
    message = client.messages.create(messages=question.messages, **PLAIN)
    assert (text_of(message), message.stop_reason) == (question.answer, "end_turn")
    usage = message.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == len(question.ids)
    assert usage.output_tokens == len(question.reply)
    counted = client.messages.count_tokens(model="m3-tiny", messages=question.messages, thinking={"type": "disabled"})
    assert counted.input_tokens == len(question.ids)
    usage = client.messages.create(messages=question.messages, **PLAIN).usage
    assert usage.cache_read_input_tokens is not None
    assert len(question.ids) - 128 <= usage.cache_read_input_tokens < len(question.ids)


def test_a_stream_says_the_same(client: anthropic.Anthropic, question: Question) -> None:
    with client.messages.stream(messages=question.messages, **PLAIN) as stream:
        pieces = list(stream.text_stream)
        message = stream.get_final_message()
    assert "".join(pieces) == text_of(message) == question.answer
    assert len(pieces) > 1
    assert (message.stop_reason, message.usage.output_tokens) == ("end_turn", len(question.reply))


def test_ends_before_the_end(client: anthropic.Anthropic, question: Question) -> None:
    short = client.messages.create(messages=question.messages, **PLAIN | {"max_tokens": 5})
    assert (short.stop_reason, short.usage.output_tokens) == ("max_tokens", 5)
    assert text_of(short) and question.answer.startswith(text_of(short))
    stopped = client.messages.create(messages=question.messages, stop_sequences=["(Exc", "never"], **PLAIN)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "(Exc")
    assert text_of(stopped) == question.answer.partition("(Exc")[0]


def test_many_at_once(served: str, questions: list[Question]) -> None:
    async def ask(client: anthropic.AsyncAnthropic, question: Question, stream: bool) -> str:
        if not stream:
            return text_of(await client.messages.create(messages=question.messages, **PLAIN))
        async with client.messages.stream(messages=question.messages, **PLAIN) as chunks:
            return "".join([text async for text in chunks.text_stream])

    async def ask_all() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=served, api_key="none", max_retries=0) as client:
            asked = [ask(client, question, stream) for question in questions for stream in (False, True)]
            return await asyncio.gather(*asked)

    assert asyncio.run(ask_all()) == [question.answer for question in questions for _ in range(2)]


def test_models(client: anthropic.Anthropic) -> None:
    listed = client.models.list()
    assert [(model.id, model.type) for model in listed] == [("m3-tiny", "model")]
    assert client.models.retrieve("m3-tiny").id == "m3-tiny"
    with pytest.raises(anthropic.NotFoundError, match="m3-tiny"):
        client.models.retrieve("claude-opus-4-5")


def test_refusals_are_the_clients_own_errors(client: anthropic.Anthropic, question: Question) -> None:
    for wrong in ({"thinking": {"type": "loud"}}, {"max_tokens": -1}, {"messages": []}):
        with pytest.raises(anthropic.BadRequestError, match=next(iter(wrong))) as caught:
            client.messages.create(**{**PLAIN, "messages": question.messages, **wrong})
        assert caught.value.request_id == caught.value.response.headers["request-id"]
    with pytest.raises(anthropic.NotFoundError, match="m3-tiny"):
        client.messages.create(**PLAIN | {"messages": question.messages, "model": "claude-opus-4-5"})


@pytest.mark.parametrize("stream", [False, True])
def test_the_clients_own_loop_runs_tools(stage: Stage, played: anthropic.Anthropic, stream: bool) -> None:
    """Its tool runner sends back what the tools give until the model calls no more.

    It begins with a thread, which the server would have to keep, and is told that there is none.
    """
    stage.play(
        "<mm:think>Two sums.</mm:think>First these."
        + render_tool_call("add", {"numbers": [4700, 11]})
        + render_tool_call("add", {"numbers": [1.5, -2]}),
        "</mm:think>" + render_tool_call("add", {"numbers": []}),
        "</mm:think>4711, -0.5 and 0.",
    )
    given: list[list[float]] = []

    @beta_tool
    def add(numbers: list[float]) -> str:
        """Add numbers.

        Args:
            numbers: The numbers.
        """
        given.append(numbers)
        return str(sum(numbers))

    runner: Any = played.beta.messages.tool_runner(
        model="m3-tiny",
        max_tokens=200,
        tools=[add],
        messages=[{"role": "user", "content": "Add."}],
        thinking={"type": "enabled", "budget_tokens": 1024},
        stream=stream,
    )
    messages = [turn.get_final_message() for turn in runner] if stream else list(runner)
    assert [line["status"] for line in stage.requests] == [400, 200, 200, 200]
    stage.requests.clear()
    assert given == [[4700, 11], [1.5, -2], []]
    assert [message.stop_reason for message in messages] == ["tool_use", "tool_use", "end_turn"]
    assert [block.type for block in messages[0].content] == ["thinking", "text", "tool_use", "tool_use"]
    assert text_of(messages[2]) == "4711, -0.5 and 0."
    assert stage.calls[0].tools[0]["function"]["description"] == "Add numbers."
    read = stage.calls[2].messages
    assert read is not None
    assert [message["role"] for message in read] == ["user", "assistant", "tool", "tool", "assistant", "tool"]
    assert [message["content"] for message in read if message["role"] == "tool"] == ["4711.0", "-0.5", "0"]
    assert (read[1]["content"], read[1]["reasoning_content"]) == ("First these.", "Two sums.")


def test_a_reply_of_a_form(client: anthropic.Anthropic, question: Question) -> None:
    """m3-tiny has no idea of JSON: that there is some is the grammar's doing."""
    message = client.messages.parse(messages=question.messages, output_format=Line, **PLAIN | {"max_tokens": 100})
    assert message.stop_reason == "end_turn"
    assert isinstance(message.parsed_output, Line)


def test_a_call_that_must_be(client: anthropic.Anthropic, question: Question) -> None:
    schema = {"type": "object", "properties": {"path": {"enum": ["a.py", "b.py"]}}, "required": ["path"]}
    message = client.messages.create(
        messages=question.messages,
        tools=[{"name": "read", "input_schema": schema}],
        tool_choice={"type": "tool", "name": "read", "disable_parallel_tool_use": True},
        **PLAIN | {"max_tokens": 100},
    )
    assert message.stop_reason == "tool_use"
    (call,) = message.content
    assert call.type == "tool_use" and call.name == "read" and call.input["path"] in ("a.py", "b.py")
