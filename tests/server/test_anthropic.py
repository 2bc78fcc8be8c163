"""Anthropic's protocol: what a request becomes, what a reply looks like, and what is refused."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter
from starlette.testclient import TestClient

from openm3.engine.request import Usage
from openm3.errors import BusyError, EngineError, PromptError
from openm3.server import stream
from openm3.server.calls import Call, Finished, Looked, Started
from openm3.server.protocol import seal
from openm3.tokens import Content, Thinking
from tests.server.fake import USAGE, FakeService, app_of, called, events_of, saying, whole_turn

WEATHER = {
    "name": "get_weather",
    "description": "The weather of some days.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
}
USER = {"role": "user", "content": "Hello"}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "m3-tiny", "max_tokens": 64, "messages": [USER], **fields}


def post(service: FakeService, path: str = "/v1/messages", **fields: Any) -> Any:
    return TestClient(app_of(service)).post(path, json=body(**fields))


def call_for(**fields: Any) -> Call:
    """The call that a request becomes."""
    service = saying(Content("Hi."))
    response = post(service, **fields)
    assert response.status_code == 200, response.text
    return service.calls[0]


def refusal(**fields: Any) -> str:
    """Why a request is refused."""
    service = saying()
    response = post(service, **fields)
    assert (response.status_code, service.calls) == (400, [])
    told = response.json()
    assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error")
    return str(told["error"]["message"])


def messages_for(*messages: dict[str, Any], **fields: Any) -> Any:
    return call_for(messages=list(messages), **fields).messages


def test_a_whole_message() -> None:
    told = post(whole_turn()).json()
    Message.model_validate(told)
    assert re.fullmatch(r"msg_[0-9a-f]{24}", told.pop("id"))
    ids = [block.pop("id") for block in told["content"][2:]]
    assert all(re.fullmatch(r"toolu_[0-9a-f]{24}", one) for one in ids) and len(set(ids)) == 2
    assert told == {
        "type": "message",
        "role": "assistant",
        "model": "m3-tiny",
        "content": [
            {
                "type": "thinking",
                "thinking": "I should look.",
                "signature": hashlib.sha256(b"I should look.").hexdigest(),
            },
            {"type": "text", "text": "Looking it up."},
            {"type": "tool_use", "name": "get_weather", "input": {"city": "Paris", "days": 2}},
            {"type": "tool_use", "name": "now", "input": {}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 7,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 4,
            "output_tokens": 9,
            "output_tokens_details": {"thinking_tokens": 3},
            "service_tier": "standard",
        },
    }


def test_a_stream_of_events() -> None:
    response = post(whole_turn(), stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.text)
    for name, data in events:
        assert data["type"] == name
        TypeAdapter(RawMessageStreamEvent).validate_python(data)
    kinds = [
        (name.removeprefix("content_block_"), data.get("index"), data.get("delta", {}).get("type"))
        for name, data in events
    ]
    assert kinds == [
        ("message_start", None, None),
        ("start", 0, None),
        ("delta", 0, "thinking_delta"),
        ("delta", 0, "thinking_delta"),
        ("delta", 0, "signature_delta"),
        ("stop", 0, None),
        ("start", 1, None),
        ("delta", 1, "text_delta"),
        ("delta", 1, "text_delta"),
        ("stop", 1, None),
        ("start", 2, None),
        ("delta", 2, "input_json_delta"),
        ("delta", 2, "input_json_delta"),
        ("stop", 2, None),
        ("start", 3, None),
        ("delta", 3, "input_json_delta"),
        ("stop", 3, None),
        ("message_delta", None, None),
        ("message_stop", None, None),
    ]
    assert events[1][1]["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}
    assert events[6][1]["content_block"] == {"type": "text", "text": ""}
    assert events[10][1]["content_block"].items() >= {"type": "tool_use", "name": "get_weather", "input": {}}.items()
    arguments = "".join(data["delta"]["partial_json"] for _, data in events[11:13])
    assert json.loads(arguments) == {"city": "Paris", "days": 2}


def test_usage_comes_first_as_an_estimate_and_last_as_it_was() -> None:
    events = [data for _, data in events_of(post(whole_turn(), stream=True).text)]
    first, last = events[0]["message"]["usage"], events[-2]["usage"]
    assert (first["input_tokens"], first["cache_read_input_tokens"], first["output_tokens"]) == (11, 0, 0)
    assert (last["input_tokens"], last["cache_read_input_tokens"], last["output_tokens"]) == (7, 4, 9)


@pytest.mark.parametrize(
    ("finished", "reason", "sequence"),
    [
        ({"reason": "stop"}, "end_turn", None),
        ({"reason": "stop", "stop": "\n\n"}, "stop_sequence", "\n\n"),
        ({"reason": "length"}, "max_tokens", None),
        ({"reason": "timeout"}, "max_tokens", None),
        ({"reason": "tool_calls"}, "tool_use", None),
    ],
)
def test_why_it_stopped(finished: dict[str, Any], reason: str, sequence: str | None) -> None:
    whole = post(saying(Content("Hi."), **finished)).json()
    delta = events_of(post(saying(Content("Hi."), **finished), stream=True).text)[-2][1]["delta"]
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)
    assert delta == {"stop_reason": reason, "stop_sequence": sequence}


def test_a_call_that_was_cut_off_keeps_the_reason() -> None:
    events = called(0, "get_weather", {"city": "Par"}, complete=False)
    told = post(saying(*events, reason="length")).json()
    assert (told["content"][0]["input"], told["stop_reason"]) == ({"city": "Par"}, "max_tokens")


def test_an_empty_reply_and_events_that_are_not_told() -> None:
    assert post(saying(Looked([1], [[[[0]]]]))).json()["content"] == []


def test_no_token_is_a_prompt_read_and_nothing_said() -> None:
    service = saying(Thinking("Hm."), Content("H"))
    told = post(service, max_tokens=0, thinking={"type": "adaptive"}, tool_choice={"type": "auto"}).json()
    Message.model_validate(told)
    assert service.calls[0].params.max_tokens == 1
    assert (told["content"], told["stop_reason"], told["stop_sequence"]) == ([], "max_tokens", None)
    assert (told["usage"]["input_tokens"], told["usage"]["output_tokens"]) == (7, 0)
    assert told["usage"]["output_tokens_details"] == {"thinking_tokens": 0}


def test_thoughts_that_are_not_to_be_shown_travel_in_the_signature() -> None:
    thinking = {"type": "adaptive", "display": "omitted"}
    told = post(saying(Thinking("Hm."), Content("Hi.")), thinking=thinking).json()
    assert told["content"][0] == {"type": "thinking", "thinking": "", "signature": seal("Hm.")}
    events = events_of(post(saying(Thinking("Hm."), Content("Hi.")), thinking=thinking, stream=True).text)
    assert [data["delta"]["type"] for name, data in events if name == "content_block_delta"] == [
        "signature_delta",
        "text_delta",
    ]
    again = messages_for(USER, {"role": "assistant", "content": told["content"]}, USER)
    assert again[1] == {"role": "assistant", "content": "Hi.", "reasoning_content": "Hm."}


def test_what_is_asked_of_sampling() -> None:
    params = call_for(temperature=0.5, top_p=0.25, top_k=7, stop_sequences=["END", "\n"]).params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (64, 0.5, 0.25, 7)
    assert tuple(params.stop) == ("END", "\n")
    params = call_for().params
    assert (params.temperature, params.top_p, params.top_k, tuple(params.stop)) == (1.0, 0.95, 0, ())
    assert call_for(temperature=0, max_tokens=524288).params.temperature == 0


@pytest.mark.parametrize(
    ("thinking", "mode", "budget"),
    [
        (None, "adaptive", None),
        ({"type": "adaptive"}, "adaptive", None),
        ({"type": "between_tools"}, "adaptive", None),
        ({"type": "disabled"}, "disabled", None),
        ({"type": "enabled", "budget_tokens": 2048}, "enabled", 2048),
        ({"type": "enabled"}, "enabled", None),
    ],
)
def test_modes_of_thinking(thinking: Any, mode: str, budget: int | None) -> None:
    call = call_for(thinking=thinking)
    assert (call.thinking, call.thinking_budget) == (mode, budget)


def test_tools_keep_their_order_and_servers_own_are_passed_over() -> None:
    schema = {"type": "object", "properties": {"z": {"type": "string"}, "a": {"type": "string"}}}
    tools = [
        {"type": "web_search_20260101", "name": "web_search", "max_uses": 3},
        {"type": "custom", "name": "z.first-of", "input_schema": schema, "cache_control": {"type": "ephemeral"}},
        WEATHER,
    ]
    first, second = call_for(tools=tools).tools
    assert first == {"type": "function", "function": {"name": "z.first-of", "parameters": schema}}
    assert list(first["function"]["parameters"]["properties"]) == ["z", "a"]
    assert second["function"]["description"] == "The weather of some days."


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ("auto", True)),
        ({"type": "auto"}, ("auto", True)),
        ({"type": "auto", "disable_parallel_tool_use": True}, ("auto", False)),
        ({"type": "any"}, ("required", True)),
        ({"type": "none"}, ("none", True)),
        ({"type": "tool", "name": "get_weather"}, ("get_weather", True)),
    ],
)
def test_choices_among_tools(choice: Any, expected: tuple[str, bool]) -> None:
    call = call_for(tools=[WEATHER], tool_choice=choice)
    assert (call.tool_choice, call.parallel_tool_calls) == expected


@pytest.mark.parametrize("field", ["output_format", "output_config"])
def test_a_schema_for_the_text(field: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "schema": schema}
    value = form if field == "output_format" else {"format": form, "effort": "high"}
    assert call_for(**{field: value}).schema == schema
    assert call_for(output_config={"effort": "low"}).schema is None


def test_system_prompts() -> None:
    assert messages_for(USER, system="Be brief.")[0] == {"role": "system", "content": "Be brief."}
    blocks = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197; cch=0af31;"},
        {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Be brief."},
    ]
    assert messages_for(USER, system=blocks)[0]["content"] == "You are an agent.\nBe brief."
    assert messages_for(USER, system="") == [USER]
    later = messages_for(USER, {"role": "system", "content": "Reminder."})
    assert later == [USER, {"role": "system", "content": "Reminder."}]


def test_neighbours_of_one_role_are_one_turn() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert messages_for({"role": "user", "content": parts}, USER) == [{"role": "user", "content": "a\nb\nHello"}]
    found = messages_for(
        USER, {"role": "assistant", "content": "One "}, {"role": "assistant", "content": "turn."}, USER
    )
    assert found[1] == {"role": "assistant", "content": "One turn."}
    assert messages_for({"role": "user", "content": []}) == [{"role": "user", "content": ""}]


def test_thinking_between_calls_is_replayed_in_its_place() -> None:
    def called(number: int) -> dict[str, Any]:
        return {"type": "tool_use", "id": f"toolu_{number}", "name": "get_weather", "input": {"days": number}}

    def gave(number: int, **fields: Any) -> dict[str, Any]:
        return {"type": "tool_result", "tool_use_id": f"toolu_{number}", **fields}

    def thought(text: str) -> dict[str, Any]:
        return {"type": "thinking", "thinking": text, "signature": "from elsewhere"}

    redacted = {"type": "redacted_thinking", "data": "?"}
    first = [thought("First."), redacted, {"type": "text", "text": "Two at once."}, called(1), called(2)]
    results = [gave(1, content="sun"), gave(2, content=[{"type": "text", "text": "no"}, {"type": "text", "text": "x"}])]
    found = messages_for(
        USER,
        {"role": "assistant", "content": first},
        {"role": "user", "content": [{"type": "text", "text": "Hurry."}, results[0], results[1] | {"is_error": True}]},
        {"role": "assistant", "content": [thought("Then."), called(3)]},
        {"role": "user", "content": [gave(3)]},
        tools=[WEATHER],
    )
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "tool", "user", "assistant", "tool"]
    assert (found[1]["reasoning_content"], found[1]["content"]) == ("First.", "Two at once.")
    assert found[1]["tool_calls"][1] == {
        "id": "toolu_2",
        "type": "function",
        "function": {"name": "get_weather", "arguments": {"days": 2}},
    }
    assert found[2] == {"role": "tool", "tool_call_id": "toolu_1", "content": "sun"}
    assert found[3]["content"] == "Error: no\nx"
    assert (found[4]["content"], found[5]["reasoning_content"], found[6]["content"]) == ("Hurry.", "Then.", "")


def test_what_other_servers_tools_left_behind_is_passed_over() -> None:
    left = [
        {"type": "server_tool_use", "id": "srv_1", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "srv_1", "content": []},
        {"type": "text", "text": "Found."},
    ]
    assert messages_for(USER, {"role": "assistant", "content": left}, USER)[1]["content"] == "Found."


def test_what_clients_add_is_let_through() -> None:
    call_for(
        metadata={"user_id": "u"},
        service_tier="auto",
        context_management={"edits": [{"type": "clear_thinking_20251015"}]},
        container=None,
        mcp_servers=[],
        betas=["x"],
        anything={"else": [1]},
        stream=False,
        system=None,
        tools=None,
        thinking=None,
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": -1}, "greater than or equal to 0"),
        ({"max_tokens": 0, "stream": True}, "max_tokens is 0, which asks for no reply: leave out stream"),
        ({"max_tokens": 0, "thinking": {"type": "enabled", "budget_tokens": 5}}, "leave out thinking"),
        (
            {"max_tokens": 0, "tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "any"}},
            "tool_choice",
        ),
        ({"max_tokens": 0, "output_config": {"format": {"type": "json_schema", "schema": {}}}}, "output_config"),
        ({"max_tokens": 524289}, "max_tokens must be at most 524288, not 524289"),
        ({"max_tokens": 10**30}, "at most 524288"),
        ({"max_tokens": "64"}, "valid integer"),
        ({"model": "gpt-9"}, "gpt-9"),
        ({"messages": []}, "at least 1 item"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "'user', 'assistant' or 'system'"),
        ({"messages": [{"role": "user", "content": {"text": "x"}}]}, "valid list"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "field required"),
        ({"messages": [{"role": "user", "content": [{"type": "txt"}]}]}, "'txt' is not understood in user content"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "type: field required"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0]: a part of type image needs a url",
        ),
        ({"messages": [USER, {"role": "assistant", "content": "{"}]}, "cannot be continued"),
        ({"system": [{"type": "document", "source": {}}]}, "document blocks are not supported"),
        ({"temperature": 5.0}, "less than or equal to 2"),
        ({"temperature": True}, "valid number"),
        ({"top_p": -0.1}, "greater than or equal to 0"),
        ({"top_k": -1}, "greater than or equal to 0"),
        ({"stop_sequences": [""]}, "at least 1 character"),
        ({"stop_sequences": "END"}, "valid list"),
        ({"thinking": True}, "valid dictionary"),
        ({"thinking": {"type": "on"}}, "'enabled', 'disabled', 'adaptive'"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "greater than or equal to 1"),
        ({"tool_choice": {"type": "any"}}, "no tool that can be called here"),
        ({"tool_choice": {"type": "tool"}}, "needs the name of one"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "none of the tools: get_weather"),
        ({"tools": [{"name": "x"}]}, "tools.0 needs a name and an input_schema"),
        ({"tools": [{"input_schema": {}}]}, "tools.0 needs a name and an input_schema"),
        ({"output_config": {"format": {"type": "json_object"}}}, "'json_schema'"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "schema: field required"),
    ],
)
def test_what_is_wrong_is_said(fields: dict[str, Any], words: str) -> None:
    assert words in refusal(**fields)


@pytest.mark.parametrize(("role", "kind"), [("user", "tool_use"), ("user", "thinking"), ("assistant", "tool_result")])
def test_blocks_have_their_place(role: str, kind: str) -> None:
    block = {"type": kind, "id": "a", "name": "x", "input": {}, "tool_use_id": "a", "thinking": "x"}
    told = refusal(messages=[USER, {"role": role, "content": [block]}, USER | {"role": "system"}])
    assert f"a block of type {kind} cannot stand in {role} content" in told


@pytest.mark.parametrize("inside", ["NaN", "Infinity", '"\\ud800"', "[" * 400 + "]" * 400])
def test_values_that_are_no_json(inside: str) -> None:
    text = json.dumps(body(tools=[WEATHER | {"input_schema": {"default": "HERE"}}])).replace('"HERE"', inside)
    service = saying(Content("Hi."))
    client = TestClient(app_of(service), raise_server_exceptions=False)
    response = client.post("/v1/messages", content=text, headers={"content-type": "application/json"})
    assert response.status_code == (200 if inside.startswith("[") else 400)


def test_threads_are_refused_in_words_that_anthropics_client_acts_on() -> None:
    """Passed over, a conversation would go on without all that was said before."""
    service = saying()
    for thread in ({"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}):
        response = post(service, thread=thread)
        assert (response.status_code, service.calls) == (400, [])
        details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        assert response.json()["error"]["details"] == details
    assert "details" not in post(service, max_tokens=-1).json()["error"]


def test_counting_needs_no_length() -> None:
    service = saying()
    client = TestClient(app_of(service))
    request = {"model": "m3-tiny", "messages": [USER], "system": "Be brief.", "tools": [WEATHER]}
    for prefix in ("", "/anthropic"):
        response = client.post(f"{prefix}/v1/messages/count_tokens", json=request)
        assert (response.status_code, response.json()) == (200, {"input_tokens": 11})
    assert service.calls[0].messages == [{"role": "system", "content": "Be brief."}, USER]
    assert service.calls[0].tools[0]["function"]["name"] == "get_weather"
    assert client.post("/v1/messages/count_tokens", json={"model": "m3-tiny"}).status_code == 400


def test_the_same_stands_under_anthropic() -> None:
    assert post(saying(Content("Hi.")), "/anthropic/v1/messages?beta=true").json()["content"][0]["text"] == "Hi."


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (BusyError("full"), 429, "rate_limit_error"),
        (EngineError("gone"), 503, "overloaded_error"),
        (PromptError("too long"), 400, "invalid_request_error"),
    ],
)
def test_calls_that_are_not_let_in(error: Exception, status: int, kind: str) -> None:
    for stream_it in (False, True):
        response = post(FakeService([error]), stream=stream_it)
        assert (response.status_code, response.json()["error"]["type"]) == (status, kind)


def test_errors_in_the_middle_of_a_stream(caplog: pytest.LogCaptureFixture) -> None:
    service = FakeService([Started(3), Content("Hi"), ValueError("secret")])
    events = events_of(post(service, stream=True).text)
    assert [name for name, _ in events] == ["message_start", "content_block_start", "content_block_delta", "error"]
    assert events[-1][1]["error"]["type"] == "api_error"
    assert "secret" not in json.dumps(events)
    assert "a stream failed" in caplog.text
    assert service.num_ended == 1


@pytest.mark.parametrize(("reason", "status"), [("abort", 503), ("error", 500)])
def test_replies_that_were_broken_off(reason: str, status: int) -> None:
    script = (Started(3), Content("Hi"), Finished(reason, USAGE))  # type: ignore[arg-type]
    assert post(FakeService(script)).status_code == status
    name, data = events_of(post(FakeService(script), stream=True).text)[-1]
    assert (name, data["type"]) == ("error", "error")


def test_pings_fill_silences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "PING_SECONDS", 0.01)
    gate = asyncio.Event()

    class Slow(FakeService):
        async def stream(self, call: Call) -> Any:
            async for event in super().stream(call):
                yield event
                asyncio.get_running_loop().call_later(0.05, gate.set)

    events = events_of(post(Slow([Started(3), gate, Finished("stop", Usage(3, 0, 1))]), stream=True).text)
    assert ("ping", {"type": "ping"}) in events
    assert [name for name, _ in events if name != "ping"] == ["message_start", "message_delta", "message_stop"]
