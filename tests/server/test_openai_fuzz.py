"""Bodies made from good ones by breaking them: all are answered or refused, none is an error of the server."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from openm3.server.calls import Looked
from openm3.tokens import Content, Thinking
from tests.server.fake import FakeService, app_of, called, finished, reply

USER = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
CHAT: dict[str, Any] = {
    "model": "m3-tiny",
    "messages": [
        {"role": "system", "content": "s"},
        USER,
        {
            "role": "assistant",
            "content": "<think>t</think>",
            "reasoning_details": [{"text": "r"}],
            "tool_calls": [CALL],
        },
        {"role": "tool", "tool_call_id": "c", "content": "1"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
    "thinking": {"type": "enabled", "budget_tokens": 10},
    "reasoning": {"enabled": True, "effort": "low"},
    "reasoning_effort": "low",
    "chat_template_kwargs": {"thinking_mode": "enabled", "enable_thinking": True},
    "reasoning_split": True,
    "stream": False,
    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    "max_completion_tokens": 9,
    "min_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "repetition_penalty": 1.1,
    "seed": 1,
    "n": 2,
    "stop": ["x"],
    "logprobs": True,
    "top_logprobs": 2,
    "service_tier": "priority",
    "xray": True,
    "evidence": True,
    "documents": [{"name": "a.txt", "text": "a"}],
}
COMPLETION: dict[str, Any] = {
    "model": "m3-tiny",
    "prompt": [[104, 105], [104]],
    "echo": True,
    "logprobs": 1,
    "max_tokens": 4,
    "n": 2,
    "best_of": 2,
    "suffix": "",
    "stop": "x",
    "stream": False,
    "seed": 1,
}
SCRIPT = reply(Thinking("t"), Content("ab"), Looked([1], [[[[0]]]]), *called(0, "f", {"a": 1}), last=finished("stop"))

STRANGE = [0, -1, 2**31, 2**63, 2**200, 1e400, float("nan"), 0.5, "", "auto", "a\ud800", "\x00", [], {}, [[]], [{}]]

odd = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(
        [0, -1, 2**31, 2**63, 2**200, 1e400, float("nan"), 0.5, "", "auto", "a\ud800", "\x00", [], {}, [[]], [{}]]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.recursive(st.none() | st.text(max_size=2), lambda inner: st.lists(inner, max_size=2), max_leaves=4),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside."""
    inner = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [path] * bool(path) + [place for key, one in inner for place in places(one, (*path, key))]


@st.composite
def broken(draw: st.DrawFn, body: dict[str, Any]) -> dict[str, Any]:
    """A body with some values replaced by odd ones, left out, or doubled."""
    body = copy.deepcopy(body)
    for _ in range(draw(st.integers(1, 3))):
        *above, key = draw(st.sampled_from(places(body)))
        holder: Any = body
        for step in above:
            holder = holder[step]
        how = draw(st.sampled_from(["replace", "replace", "remove", "double"]))
        if how == "replace":
            holder[key] = copy.deepcopy(draw(odd))
        elif how == "remove":
            del holder[key]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        if not places(body):
            break
    return body


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)])
def test_broken_bodies_are_answered_or_refused(path: str, body: dict[str, Any]) -> None:
    service = FakeService(SCRIPT)
    statuses: set[int] = set()
    with TestClient(app_of(service)) as client:
        assert client.post(path, json=body).status_code == 200

        @settings(max_examples=200)
        @given(broken(body))
        def check(changed: dict[str, Any]) -> None:
            response = client.post(path, content=json.dumps(changed), headers={"content-type": "application/json"})
            assert response.status_code in (200, 400), response.text
            if response.status_code == 400:
                assert response.json()["error"]["message"]
            elif changed.get("stream"):
                assert response.text.endswith("data: [DONE]\n\n")
            assert service.num_running == 0
            statuses.add(response.status_code)

        check()
    assert statuses == {200, 400}
