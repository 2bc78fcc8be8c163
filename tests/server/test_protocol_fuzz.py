"""Requests that are valid but for a few changes: each is answered or refused in words, whatever was changed."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from openm3.server.calls import Call, Event
from openm3.tokens.chat import TEMPLATE, render
from tests.server.fake import FakeService, app_of, whole_turn

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
MESSAGES = {
    "model": "m3-tiny",
    "max_tokens": 64,
    "stream": False,
    "system": [{"type": "text", "text": "Be brief."}],
    "messages": [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                {"type": "tool_use", "id": "a", "name": "get", "input": {"city": "Paris"}},
            ],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [], "is_error": True}]},
        {"role": "system", "content": "Now."},
    ],
    "tools": [{"name": "get", "description": "x", "input_schema": SCHEMA}],
    "tool_choice": {"type": "tool", "name": "get", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 10, "display": "omitted"},
    "temperature": 1,
    "top_p": 0.5,
    "top_k": 3,
    "stop_sequences": ["x"],
    "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
}
RESPONSE = {
    "model": "m3-tiny",
    "instructions": "Be brief.",
    "stream": False,
    "input": [
        {"role": "developer", "content": "x"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": None, "encrypted_content": "openm3-1:SG0u"},
        {"type": "function_call", "call_id": "a", "name": "get", "namespace": "n", "arguments": '{"city": "Paris"}'},
        {"type": "function_call_output", "call_id": "a", "output": [{"type": "input_text", "text": "x"}]},
        {"type": "custom_tool_call", "call_id": "b", "name": "get", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "b", "output": "x"},
    ],
    "tools": [
        {"type": "function", "name": "get", "description": "x", "parameters": SCHEMA, "strict": True},
        {"type": "namespace", "name": "n", "description": "x", "tools": [{"type": "function", "name": "get"}]},
    ],
    "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get"}]},
    "parallel_tool_calls": True,
    "reasoning": {"effort": "low", "summary": "auto"},
    "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
    "max_output_tokens": 5,
    "temperature": 1,
    "top_p": 1,
    "metadata": {"a": "b"},
    "previous_response_id": None,
}
WORDS = ["", "text", "tool_use", "message", "reasoning", "item_reference", "user", "assistant", "get", "\ud800", "<b>"]
LEAF = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.sampled_from(WORDS), st.text(max_size=4), st.just(10**40)
)
VALUE = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)


class Rendering(FakeService):
    """Makes the prompt of each call, as a model's server would."""

    async def stream(self, call: Call) -> AsyncGenerator[Event]:
        self.rendered(call)
        async for event in super().stream(call):
            yield event

    async def count(self, call: Call) -> int:
        self.rendered(call)
        return await super().count(call)

    def rendered(self, call: Call) -> None:
        controls = re.compile(re.escape("]<]minimax[>["))
        settings = {"template": TEMPLATE, "controls": controls, "add_generation_prompt": True, "variables": {}}
        for text, _ in render(call.messages or (), tools=call.tools, thinking=call.thinking, **settings):  # type: ignore[arg-type]
            text.encode()


def places(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values within a value."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from places(one, (*path, key))


@st.composite
def changed(draw: st.DrawFn, body: dict[str, Any]) -> dict[str, Any]:
    """The body with some of its values left out, doubled or replaced."""
    body = copy.deepcopy(body)
    for _ in range(draw(st.integers(1, 3))):
        *above, last = draw(st.sampled_from(list(places(body))))
        target: Any = body
        for key in above:
            target = target[key]
        match draw(st.sampled_from(["replace", "leave out", "double"])):
            case "replace":
                target[last] = draw(VALUE)
            case "leave out":
                del target[last]
            case "double" if isinstance(target, list):
                target.append(copy.deepcopy(target[last]))
        if not body:
            break
    return body


ROUTES = {
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": MESSAGES,
    "/v1/responses": RESPONSE,
    "/v1/responses/input_tokens": RESPONSE,
}


@pytest.mark.parametrize("path", ROUTES)
def test_nothing_that_a_client_sends_breaks_the_server(path: str) -> None:
    valid = ROUTES[path]
    service = Rendering(whole_turn().script)
    client = TestClient(app_of(service), raise_server_exceptions=False)
    statuses = set()

    @settings(max_examples=300 if "_tokens" not in path else 60)
    @given(changed(valid))
    def send(body: dict[str, Any]) -> None:
        response = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        assert response.status_code in (200, 400), (response.text, body)
        statuses.add(response.status_code)
        if response.status_code == 200 and body.get("stream"):
            assert "event: error" not in response.text and "response.failed" not in response.text
        elif response.status_code == 400:
            assert response.json()["error"]["message"]

    response = client.post(path, json=valid)
    assert response.status_code == 200, response.text
    send()
    assert statuses == {200, 400}
