"""OpenAI's own Python client, against `openm3 serve` with m3-tiny; where tools are called, against the stage."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from openm3.model.model import Model
from openm3.tokens import render_tool_call
from tests.e2e.programs import readme
from tests.e2e.questions import Question
from tests.e2e.scripted import Stage

pytestmark = pytest.mark.e2e

PLAIN: Any = {"temperature": 0, "extra_body": {"thinking": {"type": "disabled"}}}
"""The likeliest tokens, and no thoughts."""


class Weather(BaseModel):
    """What a tool is called with."""

    city: str
    days: int
    unit: Literal["celsius", "kelvin"]


class Open(BaseModel):
    """Open a file."""

    path: Literal["a.py", "b.py"]
    line: Annotated[int, Field(ge=1, le=99)]


class Line(BaseModel):
    """What a reply is read as: nothing in it may be as long as a weak model likes."""

    kind: Literal["class", "function"]
    is_public: bool
    number: Annotated[int, Field(ge=1, le=99)]


@pytest.fixture(scope="module")
def client(served: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def played(theatre: tuple[Stage, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{theatre[1]}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_chat_is_what_the_model_says(client: openai.OpenAI, question: Question) -> None:
    reply = client.chat.completions.create(model="m3-tiny", messages=question.messages, **PLAIN)
    choice, usage = reply.choices[0], reply.usage
    assert (choice.message.content, choice.finish_reason, reply.model) == (question.answer, "stop", "m3-tiny")
    assert usage is not None and usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(question.ids), len(question.reply))
    again = client.chat.completions.create(model="m3-tiny", messages=question.messages, **PLAIN)
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert cached is not None and len(question.ids) - 128 <= cached < len(question.ids)


def test_a_stream_says_the_same(client: openai.OpenAI, question: Question) -> None:
    options: Any = {"include_usage": True}
    with client.chat.completions.stream(
        model="m3-tiny", messages=question.messages, stream_options=options, **PLAIN
    ) as stream:
        chunks = [event.chunk for event in stream if event.type == "chunk"]
        reply = stream.get_final_completion()
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (question.answer, "stop")
    assert len(chunks) > 3
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(question.ids), len(question.reply))


def test_many_at_once(served: str, questions: list[Question]) -> None:
    async def ask(client: openai.AsyncOpenAI, question: Question, stream: bool) -> str | None:
        if not stream:
            reply = await client.chat.completions.create(model="m3-tiny", messages=question.messages, **PLAIN)
            return reply.choices[0].message.content
        chunks = await client.chat.completions.create(model="m3-tiny", messages=question.messages, stream=True, **PLAIN)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks if chunk.choices])

    async def ask_all() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0) as client:
            asked = [ask(client, question, stream) for question in questions for stream in (False, True)]
            return await asyncio.gather(*asked)

    assert asyncio.run(ask_all()) == [question.answer for question in questions for _ in range(2)]


def test_a_response_and_its_prompt_counted(client: openai.OpenAI, question: Question) -> None:
    asked: Any = {"model": "m3-tiny", "input": question.messages, "reasoning": {"effort": "none"}}
    reply = client.responses.create(temperature=0, **asked)
    assert (reply.status, reply.output_text) == ("completed", question.answer)
    assert reply.usage is not None
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (len(question.ids), len(question.reply))
    assert client.responses.input_tokens.count(**asked).input_tokens == len(question.ids)
    with client.responses.stream(temperature=0, **asked) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == question.answer
    assert len(deltas) > 1


def test_a_completion_with_probabilities(client: openai.OpenAI, model: Model, question: Question) -> None:
    reply = client.completions.create(
        model="m3-tiny", prompt=question.ids, max_tokens=8, temperature=0, logprobs=2, echo=True
    )
    ids = question.ids + question.reply[:8]
    assert reply.choices[0].text == model.tokenizer.decode(ids)
    assert reply.choices[0].logprobs is not None and reply.choices[0].logprobs.token_logprobs is not None
    found = reply.choices[0].logprobs.token_logprobs
    own = model.logits(ids).log_softmax(-1)
    expected = [own[place, token].item() for place, token in enumerate(ids[1:])]
    assert found[0] is None
    assert found[1:] == pytest.approx(expected, abs=1e-3)


def test_models_and_files(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["m3-tiny"]
    assert client.models.retrieve("m3-tiny").id == "m3-tiny"
    with pytest.raises(openai.NotFoundError, match="m3-tiny"):
        client.models.retrieve("gpt-4")
    kept = client.files.create(file=("notes.txt", b"heron 4711\n"), purpose="user_data")
    assert (kept.filename, kept.bytes, kept.purpose) == ("notes.txt", 11, "user_data")
    assert [file.id for file in client.files.list()] == [kept.id]
    assert client.files.retrieve(kept.id) == kept
    assert client.files.content(kept.id).read() == b"heron 4711\n"
    assert client.files.delete(kept.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(kept.id)


def test_what_the_readme_says(served: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(readme("python", "import anthropic", served), {})
    assert "main" in capsys.readouterr().out


def test_refusals_are_the_clients_own_errors(client: openai.OpenAI, question: Question) -> None:
    for wrong in ({"temperature": 5.0}, {"max_tokens": -1}, {"messages": []}):
        with pytest.raises(openai.BadRequestError, match=next(iter(wrong))) as caught:
            client.chat.completions.create(**{"model": "m3-tiny", "messages": question.messages} | wrong)
        assert caught.value.request_id == caught.value.response.headers["x-request-id"]
    with pytest.raises(openai.NotFoundError, match="m3-tiny"):
        client.chat.completions.create(model="gpt-4", messages=question.messages)


@pytest.mark.parametrize("stream", [False, True])
def test_tools_in_a_chat(stage: Stage, played: openai.OpenAI, stream: bool) -> None:
    asked = [{"city": "Zürich", "days": 2, "unit": "kelvin"}, {"city": "Rome", "days": 1, "unit": "celsius"}]
    stage.play(
        "<mm:think>Both.</mm:think>Let me see." + "".join(render_tool_call("Weather", call) for call in asked),
        "Cold, then warm.",
    )
    tools = [openai.pydantic_function_tool(Weather)]
    messages: list[Any] = [{"role": "user", "content": "The weather in Zürich and Rome?"}]
    extra = {"reasoning_split": True}

    def ask() -> Any:
        if not stream:
            return played.chat.completions.parse(model="m3-tiny", messages=messages, tools=tools, extra_body=extra)
        with played.chat.completions.stream(
            model="m3-tiny", messages=messages, tools=tools, extra_body=extra
        ) as chunks:
            return chunks.get_final_completion()

    choice = ask().choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
    assert choice.message.reasoning_content == "Both."
    calls = choice.message.tool_calls
    assert [call.function.parsed_arguments for call in calls] == [Weather(**call) for call in asked]
    messages.append(choice.message)
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "-3"} for call in calls]
    choice = ask().choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Cold, then warm.", "stop")
    read = stage.calls[1].messages
    assert read is not None
    assert [message["role"] for message in read] == ["user", "assistant", "tool", "tool"]
    assert (read[1]["content"], read[1]["reasoning_content"]) == ("Let me see.", "Both.")
    assert [json.loads(call["function"]["arguments"]) for call in read[1]["tool_calls"]] == asked


def test_tools_in_responses(stage: Stage, played: openai.OpenAI) -> None:
    asked = {"city": "Zürich", "days": 2, "unit": "kelvin"}
    stage.play("<mm:think>Look.</mm:think>" + render_tool_call("weather", asked), "Cold.")
    tools: Any = [{"type": "function", "name": "weather", "parameters": Weather.model_json_schema(), "strict": True}]
    turns: list[Any] = [{"role": "user", "content": "The weather in Zürich?"}]
    with played.responses.stream(model="m3-tiny", input=turns, tools=tools, store=False) as stream:
        arguments = "".join(e.delta for e in stream if e.type == "response.function_call_arguments.delta")
        reply = stream.get_final_response()
    assert json.loads(arguments) == asked
    assert [item.type for item in reply.output] == ["reasoning", "function_call"]
    turns += [item.model_dump(exclude_none=True) for item in reply.output]
    call = next(item for item in reply.output if item.type == "function_call")
    turns.append({"type": "function_call_output", "call_id": call.call_id, "output": "-3"})
    reply = played.responses.create(model="m3-tiny", input=turns, tools=tools, store=False)
    assert reply.output_text == "Cold."
    read = stage.calls[1].messages
    assert read is not None
    assert [message["role"] for message in read] == ["user", "assistant", "tool"]
    assert (read[1]["reasoning_content"], read[2]["content"]) == ("Look.", "-3")


def test_a_reply_of_a_form(client: openai.OpenAI, question: Question) -> None:
    """m3-tiny has no idea of JSON: that there is some is the grammar's doing."""
    asked: Any = {"model": "m3-tiny", "messages": question.messages, "max_tokens": 100} | PLAIN
    parsed = client.chat.completions.parse(response_format=Line, **asked).choices[0]
    assert parsed.finish_reason == "stop"
    assert isinstance(parsed.message.parsed, Line)
    with client.chat.completions.stream(response_format=Line, **asked) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed.message.parsed
    reply = client.responses.parse(
        model="m3-tiny",
        input=question.messages,
        text_format=Line,
        temperature=0,
        reasoning={"effort": "none"},
        max_output_tokens=100,
    )
    assert reply.output_parsed == parsed.message.parsed


def test_a_call_that_must_be(client: openai.OpenAI, question: Question) -> None:
    reply = client.chat.completions.parse(
        model="m3-tiny",
        messages=question.messages,
        tools=[openai.pydantic_function_tool(Open)],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=100,
        **PLAIN,
    )
    assert reply.choices[0].finish_reason == "tool_calls"
    (call,) = reply.choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Open)
