"""OpenAI's responses: what a request becomes, what a response looks like, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from starlette.testclient import TestClient

from openm3.errors import BusyError, EngineError, PromptError
from openm3.server.calls import Call, Finished, Looked, Started
from openm3.server.protocol import seal, unseal
from openm3.tokens import Content, Thinking
from tests.server.fake import USAGE, FakeService, app_of, called, events_of, saying, whole_turn

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
WEATHER = {"type": "function", "name": "get_weather", "description": "The weather.", "parameters": SCHEMA}
FILES = {
    "type": "namespace",
    "name": "mcp__files__",
    "description": "Files.",
    "tools": [{"type": "function", "name": "read", "parameters": SCHEMA}, {"type": "custom", "name": "patch"}],
}


def post(service: FakeService, path: str = "/v1/responses", **fields: Any) -> Any:
    return TestClient(app_of(service)).post(path, json={"model": "m3-tiny", "input": "Hello", **fields})


def streamed(service: FakeService, **fields: Any) -> list[dict[str, Any]]:
    """The events of a streamed response, each checked against the client's own types."""
    events = events_of(post(service, stream=True, **fields).text)
    for number, (name, data) in enumerate(events):
        assert (data["type"], data["sequence_number"]) == (name, number)
        TypeAdapter(ResponseStreamEvent).validate_python(data)
    return [data for _, data in events]


def call_for(**fields: Any) -> Call:
    """The call that a request becomes."""
    service = saying(Content("Hi."))
    response = post(service, **fields)
    assert response.status_code == 200, response.text
    Response.model_validate(response.json())
    return service.calls[0]


def refusal(**fields: Any) -> str:
    """Why a request is refused."""
    service = saying()
    response = post(service, **fields)
    assert (response.status_code, service.calls) == (400, [])
    assert response.json()["error"]["type"] == "bad_request_error"
    return str(response.json()["error"]["message"])


def messages_for(*items: dict[str, Any], **fields: Any) -> Any:
    return call_for(input=list(items), **fields).messages


def test_a_whole_response() -> None:
    told = post(whole_turn(), tools=[WEATHER], metadata={"a": "b"}, prompt_cache_key="k").json()
    Response.model_validate(told)
    reasoning, message, weather, now = told["output"]
    assert reasoning.keys() == {"id", "type", "summary", "encrypted_content"}
    assert (reasoning["summary"], unseal(reasoning["encrypted_content"])) == ([], "I should look.")
    assert (message["role"], message["status"], message["content"]) == (
        "assistant",
        "completed",
        [{"type": "output_text", "text": "Looking it up.", "annotations": [], "logprobs": []}],
    )
    assert (weather["name"], json.loads(weather["arguments"])) == ("get_weather", {"city": "Paris", "days": 2})
    assert (now["name"], now["arguments"], "namespace" in now) == ("now", "{}", False)
    prefixes = [item["id"].partition("_")[0] for item in told["output"]]
    assert (prefixes, weather["call_id"][:5]) == (["rs", "msg", "fc", "fc"], "call_")
    assert told["usage"] == {
        "input_tokens": 11,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 9,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 20,
    }
    expected = {
        "object": "response",
        "status": "completed",
        "model": "m3-tiny",
        "error": None,
        "incomplete_details": None,
        "store": False,
        "temperature": 1.0,
        "top_p": 0.95,
        "tool_choice": "auto",
        "tools": [WEATHER | {"strict": None}],
        "metadata": {"a": "b"},
        "prompt_cache_key": "k",
        "text": {"format": {"type": "text"}},
    }
    assert told.items() >= expected.items()


def test_a_stream_of_events() -> None:
    events = streamed(whole_turn(), reasoning={"summary": "auto"})
    kinds = [(event["type"].removeprefix("response."), event.get("output_index")) for event in events]
    call = ["output_item.added", "function_call_arguments.delta"]
    called = ["function_call_arguments.done", "output_item.done"]
    items = [
        [
            "output_item.added",
            "reasoning_summary_part.added",
            *["reasoning_summary_text.delta"] * 2,
            "reasoning_summary_text.done",
            "reasoning_summary_part.done",
            "output_item.done",
        ],
        [
            "output_item.added",
            "content_part.added",
            *["output_text.delta"] * 2,
            "output_text.done",
            "content_part.done",
            "output_item.done",
        ],
        [*call, "function_call_arguments.delta", *called],
        [*call, *called],
    ]
    inner = [(kind, index) for index, item in enumerate(items) for kind in item]
    assert kinds == [("created", None), ("in_progress", None), *inner, ("completed", None)]
    done = [event["item"] for event in events if event["type"].endswith("item.done")]
    last = events[-1]["response"]
    assert last["output"] == done
    assert (last["id"], last["status"]) == (events[0]["response"]["id"], "completed")
    assert (events[0]["response"]["status"], events[0]["response"]["output"]) == ("in_progress", [])
    ids = {event["item_id"] for event in events if "item_id" in event}
    assert ids == {item["id"] for item in done}
    told = "".join(event["delta"] for event in events if event["type"] == "response.reasoning_summary_text.delta")
    assert (told, done[0]["summary"]) == ("I should look.", [{"type": "summary_text", "text": "I should look."}])


def test_thoughts_are_told_only_if_asked_for() -> None:
    events = streamed(saying(Thinking("Hm."), Content("Hi.")))
    assert not [event for event in events if "summary" in event["type"]]
    assert unseal(events[-1]["response"]["output"][0]["encrypted_content"]) == "Hm."


@pytest.mark.parametrize("reason", ["length", "timeout"])
def test_a_reply_that_was_cut_off(reason: str) -> None:
    last = streamed(saying(Content("Hi"), reason=reason))[-1]
    assert last["type"] == "response.incomplete"
    assert (last["response"]["status"], last["response"]["output"][0]["status"]) == ("incomplete", "incomplete")
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    told = post(saying(*called(0, "get_weather", {"city": "P"}, complete=False), reason=reason)).json()
    assert told["output"][0]["status"] == "incomplete"


def test_an_empty_reply_and_events_that_are_not_told() -> None:
    assert post(saying(Looked([1], [[[[0]]]]))).json()["output"] == []


def test_what_is_asked_of_sampling() -> None:
    params = call_for(max_output_tokens=5, temperature=0.5, top_p=0.25).params
    assert (params.max_tokens, params.temperature, params.top_p) == (5, 0.5, 0.25)
    params = call_for().params
    assert (params.max_tokens, params.temperature, params.top_p) == (524288, 1.0, 0.95)


@pytest.mark.parametrize(
    ("reasoning", "mode"),
    [
        (None, "adaptive"),
        ({}, "adaptive"),
        ({"effort": None, "summary": "detailed"}, "adaptive"),
        ({"effort": "minimal"}, "adaptive"),
        ({"effort": "xhigh", "summary": "concise"}, "adaptive"),
        ({"effort": "none"}, "disabled"),
    ],
)
def test_modes_of_thinking(reasoning: Any, mode: str) -> None:
    assert call_for(reasoning=reasoning).thinking == mode


def test_functions_of_a_namespace_go_by_both_names() -> None:
    other = {"type": "namespace", "name": "web", "tools": [{"type": "function", "name": "read"}]}
    hosted = [{"type": "web_search"}, {"type": "custom", "name": "apply_patch"}, {"type": "mcp", "server_label": "x"}]
    service = saying(*called(0, "mcp__files__read", {"city": "x"}), *called(1, "web__read", {}))
    told = post(service, tools=[*hosted, WEATHER, FILES, other]).json()
    Response.model_validate(told)
    names = [tool["function"]["name"] for tool in service.calls[0].tools]
    assert names == ["get_weather", "mcp__files__read", "web__read"]
    assert service.calls[0].tools[1]["function"]["parameters"] == SCHEMA
    assert [(item["namespace"], item["name"]) for item in told["output"]] == [("mcp__files__", "read"), ("web", "read")]
    assert [tool["name"] for tool in told["tools"]] == ["get_weather", "mcp__files__", "web"]
    assert [tool["name"] for tool in told["tools"][1]["tools"]] == ["read"]
    call = {"type": "function_call", "call_id": "c", "name": "read", "namespace": "mcp__files__", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "c", "output": "x"}
    found = messages_for({"role": "user", "content": "Hi"}, call, output, tools=[FILES])
    assert found[1]["tool_calls"][0]["function"]["name"] == "mcp__files__read"


@pytest.mark.parametrize(
    ("choice", "expected", "names"),
    [
        (None, "auto", ["get_weather", "mcp__files__read"]),
        ("none", "none", ["get_weather", "mcp__files__read"]),
        ("required", "required", ["get_weather", "mcp__files__read"]),
        ({"type": "function", "name": "get_weather"}, "get_weather", ["get_weather", "mcp__files__read"]),
        (
            {"type": "function", "name": "read", "namespace": "mcp__files__"},
            "mcp__files__read",
            ["get_weather", "mcp__files__read"],
        ),
        (
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]},
            "required",
            ["get_weather"],
        ),
        ({"type": "allowed_tools", "mode": "auto", "tools": []}, "auto", []),
    ],
)
def test_choices_among_tools(choice: Any, expected: str, names: list[str]) -> None:
    call = call_for(tools=[WEATHER, FILES], tool_choice=choice, parallel_tool_calls=choice is None)
    assert (call.tool_choice, [tool["function"]["name"] for tool in call.tools]) == (expected, names)
    assert call.parallel_tool_calls == (choice is None)


def test_forms_of_the_text() -> None:
    form = {"type": "json_schema", "name": "city", "schema": SCHEMA, "strict": True}
    assert call_for(text={"format": form, "verbosity": "low"}).schema == SCHEMA
    assert post(saying(), text={"format": form}).json()["text"] == {"format": form}
    assert call_for(text={"format": {"type": "json_object"}}).schema is True
    assert call_for(text={"format": {"type": "text"}}).schema is None
    assert call_for(text={}).schema is None
    Response.model_validate(post(saying(), text={"format": {"type": "json_schema", "schema": SCHEMA}}).json())


def test_instructions_and_roles() -> None:
    found = messages_for(
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"type": None, "role": "user", "content": "Please."},
        instructions="Help.",
    )
    assert [(message["role"], message["content"]) for message in found] == [
        ("system", "Help."),
        ("system", "Be brief."),
        ("system", "Be kind."),
        ("user", "a\nb"),
        ("assistant", "No."),
        ("user", "Please."),
    ]


def test_a_turn_is_replayed_as_it_was() -> None:
    """What a client gets back from one response goes into the next request as it is."""
    output = post(whole_turn(), tools=[WEATHER]).json()["output"]
    results = [
        {"type": "function_call_output", "call_id": output[2]["call_id"], "output": "sun"},
        {
            "type": "function_call_output",
            "call_id": output[3]["call_id"],
            "output": [{"type": "input_text", "text": "x"}, {"type": "input_text", "text": "y"}],
        },
    ]
    found = messages_for({"role": "user", "content": "Hi"}, *output, *results, tools=[WEATHER])
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "tool"]
    assert (found[1]["reasoning_content"], found[1]["content"]) == ("I should look.", "Looking it up.")
    assert found[1]["tool_calls"][0] == {
        "id": output[2]["call_id"],
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Paris", "days": 2}'},
    }
    assert found[2] == {"role": "tool", "tool_call_id": output[2]["call_id"], "content": "sun"}
    assert found[3]["content"] == "x\ny"


@pytest.mark.parametrize(
    ("item", "thoughts"),
    [
        ({"encrypted_content": seal("Ours — ☃.")}, "Ours — ☃."),
        ({"encrypted_content": seal("Ours."), "summary": [{"type": "summary_text", "text": "Short."}]}, "Ours."),
        ({"encrypted_content": "gAAAAfrom-elsewhere", "summary": [{"type": "summary_text", "text": "S."}]}, "S."),
        ({"content": [{"type": "reasoning_text", "text": "C."}], "summary": []}, "C."),
        ({"encrypted_content": "openm3-1:!!"}, None),
        ({"encrypted_content": "openm3-1:/w=="}, None),
        ({"summary": []}, None),
    ],
)
def test_thoughts_that_come_back(item: dict[str, Any], thoughts: str | None) -> None:
    found = messages_for({"role": "user", "content": "Hi"}, {"type": "reasoning", "id": "rs_1", **item})
    assert found[1].get("reasoning_content") == thoughts


def test_other_items_are_passed_over_and_other_servers_calls_kept() -> None:
    found = messages_for(
        {"role": "user", "content": "Hi"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"type": "custom_tool_call", "call_id": "c", "name": "apply_patch", "input": "*** Begin"},
        {"type": "custom_tool_call_output", "call_id": "c", "output": "ok"},
    )
    assert found[1]["tool_calls"][0]["function"] == {"name": "apply_patch", "arguments": {"input": "*** Begin"}}
    assert found[2]["content"] == "ok"


def test_what_clients_add_is_let_through() -> None:
    call_for(
        store=True,
        include=["reasoning.encrypted_content"],
        client_metadata={"x": "y"},
        truncation="auto",
        service_tier="priority",
        user="u",
        max_tool_calls=3,
        previous_response_id=None,
        conversation=None,
        anything={"else": [1]},
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": None}, "valid string"),
        ({"model": "gpt-9"}, "gpt-9"),
        ({"input": None}, "valid list"),
        ({"input": [], "instructions": "x"}, "input must be a text or hold at least one item"),
        ({"input": {"role": "user"}}, "valid list"),
        ({"input": [{"role": "robot", "content": "x"}]}, "'user', 'assistant', 'system' or 'developer'"),
        ({"input": [{}]}, "type: field required"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference is not supported: nothing is stored"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "type input_image needs a url"),
        ({"input": [{"role": "user", "content": [{"type": "hologram"}]}]}, "'hologram' without text"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "x", "arguments": {}}]}, "valid string"),
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported: nothing is stored"),
        ({"conversation": "conv_1"}, "conversation is not supported"),
        ({"prompt": {"id": "p"}}, "prompt is not supported"),
        ({"max_output_tokens": 524289}, "max_output_tokens must be at most 524288, not 524289"),
        ({"max_output_tokens": -1}, "greater than or equal to 1"),
        ({"temperature": 5.0}, "less than or equal to 2"),
        ({"top_p": 2}, "less than or equal to 1"),
        ({"reasoning": {"effort": "huge"}}, "'none', 'minimal', 'low'"),
        ({"reasoning": {"summary": True}}, "'auto', 'concise' or 'detailed'"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "needs a schema"),
        ({"text": {"format": {"type": "xml"}}}, "'text', 'json_object' or 'json_schema'"),
        ({"tools": [{"type": "function"}]}, "name: field required"),
        ({"tools": [{"name": "x"}]}, "type: field required"),
        ({"tools": [FILES, {**FILES, "name": "mcp__files"}]}, "two tools would be called 'mcp__files__read'"),
        ({"tool_choice": "required"}, "no tool that can be called here"),
        ({"tool_choice": {"type": "function", "name": "x"}, "tools": [WEATHER]}, "none of the tools: get_weather"),
        ({"tool_choice": {"type": "allowed_tools", "tools": []}}, "allowed_tools with mode and tools"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice must be auto, none, required, a function"),
        ({"metadata": {"a": 1}}, "valid string"),
    ],
)
def test_what_is_wrong_is_said(fields: dict[str, Any], words: str) -> None:
    assert words in refusal(**fields)


@pytest.mark.parametrize("inside", ["NaN", "-Infinity", '"\\udfff"'])
def test_values_that_are_no_json(inside: str) -> None:
    given = {"model": "m3-tiny", "input": "x", "tools": [WEATHER | {"extra": "HERE"}]}
    client = TestClient(app_of(saying()), raise_server_exceptions=False)
    text = json.dumps(given).replace('"HERE"', inside)
    response = client.post("/v1/responses", content=text, headers={"content-type": "application/json"})
    assert response.status_code == 400


def test_counting() -> None:
    service = saying()
    told = post(service, "/v1/responses/input_tokens", instructions="Be brief.", tools=[WEATHER]).json()
    assert told == {"object": "response.input_tokens", "input_tokens": 11}
    assert [message["role"] for message in service.calls[0].messages or ()] == ["system", "user"]
    assert post(saying(), "/v1/responses/input_tokens", model=None).status_code == 200
    assert post(saying(), "/v1/responses/input_tokens", model="gpt-9").status_code == 400


@pytest.mark.parametrize(
    ("error", "status"), [(BusyError("full"), 429), (EngineError("gone"), 503), (PromptError("too long"), 400)]
)
def test_calls_that_are_not_let_in(error: Exception, status: int) -> None:
    assert [post(FakeService([error]), stream=stream).status_code for stream in (False, True)] == [status, status]


@pytest.mark.parametrize(
    ("error", "code"),
    [(BusyError("full"), "rate_limit_exceeded"), (PromptError("x"), "invalid_prompt"), (KeyError("s"), "server_error")],
)
def test_errors_in_the_middle_of_a_stream(error: Exception, code: str) -> None:
    service = FakeService([Started(3), Content("Hi"), error])
    last = streamed(service)[-1]
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
    assert last["response"]["error"]["code"] == code
    assert service.num_ended == 1


@pytest.mark.parametrize(("reason", "status"), [("abort", 503), ("error", 500)])
def test_replies_that_were_broken_off(reason: str, status: int) -> None:
    script = (Started(3), Content("Hi"), Finished(reason, USAGE))  # type: ignore[arg-type]
    assert post(FakeService(script)).status_code == status
    assert streamed(FakeService(script))[-1]["type"] == "response.failed"
