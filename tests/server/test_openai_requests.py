"""Chats: conversations and tools that are taken in as they are, what is refused, and how replies fail."""

import json
import logging
from typing import Any

import pytest
from starlette.testclient import TestClient

from openm3.errors import BusyError, EngineError, PromptError
from openm3.server.calls import Call, Started
from openm3.tokens import Content
from tests.server.fake import ANSWER, FakeService, Step, app_of, chunks_of, finished, reply

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
NO_FUNCTION = {"role": "assistant", "tool_calls": [{"id": "a"}]}
NO_TEXT = {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": 5}}]}
NO_OBJECT = {"type": "function", "function": {"name": "a", "parameters": []}}


def post(service: FakeService, **body: Any) -> Any:
    with TestClient(app_of(service)) as client:
        return client.post(PATH, json={"model": "m3-tiny", "messages": [USER]} | body)


def asked(**body: Any) -> Call:
    """What the service is asked for by a body."""
    service = FakeService()
    response = post(service, **body)
    assert response.status_code == 200, response.text
    return service.call


def heard(*messages: dict[str, Any]) -> list[Any]:
    """Messages as the service gets them."""
    return list(asked(messages=list(messages)).messages or ())


def refused(**body: Any) -> dict[str, Any]:
    """The error of a body that never comes to the service."""
    service = FakeService()
    response = post(service, **body)
    assert response.status_code == 400, response.text
    assert service.calls == []
    error: dict[str, Any] = response.json()["error"]
    assert error["type"] == "bad_request_error"
    assert error["http_code"] == "400"
    return error


@pytest.mark.parametrize("role", ["system", "developer", "root", "user", "tool"])
def test_roles_are_passed_on(role: str) -> None:
    message = {"role": role, "content": "text", "tool_call_id": "call_1"}
    assert heard(message) == [message]


def test_content_may_be_text_parts_or_null() -> None:
    parts = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
    plain = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assistant = {"role": "assistant", "tool_calls": [CALL]}
    assert heard({"role": "user", "content": parts}, assistant, assistant | {"content": None}) == [
        {"role": "user", "content": plain},
        assistant | {"content": None},
        assistant | {"content": None},
    ]


@pytest.mark.parametrize(
    "reasoning",
    [
        {"reasoning_content": "Let me think.", "content": "Hello"},
        {"reasoning": "Let me think.", "content": "Hello"},
        {"reasoning_details": [{"text": "Let me "}, {"text": "think.", "type": "reasoning.text"}], "content": "Hello"},
        {"content": "<think>Let me think.</think>Hello"},
        {"content": "\n<think>Let me think.</think>Hello"},
    ],
)
def test_replayed_reasoning_in_all_its_forms(reasoning: dict[str, Any]) -> None:
    expected = {"role": "assistant", "content": "Hello", "reasoning_content": "Let me think."}
    assert heard({"role": "assistant"} | reasoning) == [expected]


def test_inline_thinking_is_found_in_the_first_part() -> None:
    parts = [{"type": "text", "text": "<think>Hm.</think>Hello"}, {"type": "text", "text": " there"}]
    (message,) = heard({"role": "assistant", "content": parts})
    assert message["reasoning_content"] == "Hm."
    assert message["content"] == [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "<think>mine</think>Hello"},
        {"role": "assistant", "content": "Hello <think>later</think>"},
        {"role": "assistant", "content": "<think>never closed"},
        {"role": "assistant", "content": "<think>quoted</think>Hi", "reasoning_content": "Hm."},
    ],
)
def test_other_think_tags_are_content(message: dict[str, Any]) -> None:
    assert heard(message) == [message]


def test_whole_replies_are_replayed_as_the_model_wrote_them() -> None:
    with TestClient(app_of(FakeService())) as client:
        for split in (False, True):
            body = {"messages": [USER], "reasoning_split": split}
            said = client.post(PATH, json=body).json()["choices"][0]["message"]
            (message,) = heard(said)
            assert message["content"] == "Hello there."
            assert message["reasoning_content"] == "Let me think."


def test_long_and_crooked_conversations() -> None:
    """Several system messages, assistants in a row, an empty and a long tool result, twenty rounds."""
    result = {"role": "tool", "tool_call_id": "call_1", "content": ""}
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    rounds = [USER, {"role": "assistant", "content": "a"}] * 20
    system = {"role": "system", "content": "s"}
    said = {"role": "assistant", "content": "b"}
    conversation = [system, system, *rounds, call, result, call, result | {"content": "x" * 50_000}, said, said]
    assert heard(*conversation) == conversation


def test_tools_keep_the_order_of_their_keys() -> None:
    """Names with - and . too, 30 of them, no parameters or description, a schema that is a choice at its top."""
    properties = {"zebra": {"type": "string"}, "apple": {"type": "integer"}, "mango": {"oneOf": []}}
    first = {"name": "a-b.c", "description": "d", "parameters": {"type": "object", "properties": properties}}
    functions = [first, {"name": "bare"}, {"name": "either", "parameters": {"oneOf": [{"type": "object"}]}}]
    functions += [{"name": f"tool_{i}"} for i in range(27)]
    tools = asked(tools=[{"type": "function", "function": {**one, "strict": True}} for one in functions]).tools
    assert [tool["function"] for tool in tools] == functions
    assert list(tools[0]["function"]["parameters"]["properties"]) == ["zebra", "apple", "mango"]


def test_tools_of_unknown_types_are_passed_over() -> None:
    call = asked(tools=[{"type": "web_search", "options": {}}, TOOL, {"type": "custom", "custom": {"name": "x"}}])
    assert call.tools == [TOOL]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", "auto"),
        ("none", "none"),
        ("required", "required"),
        (None, "auto"),
        ({"type": "function", "function": {"name": "get_weather"}}, "get_weather"),
    ],
)
def test_tool_choice(choice: object, expected: str) -> None:
    call = asked(tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)
    assert call.tool_choice == expected
    assert not call.parallel_tool_calls
    assert asked(tools=[TOOL]).parallel_tool_calls


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, True),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}, {"type": "object"}),
    ],
)
def test_response_formats(form: dict[str, Any], expected: object) -> None:
    assert asked(response_format=form).schema == expected


def test_extras_are_asked_for() -> None:
    call = asked(evidence=True, xray=True)
    assert call.evidence
    assert call.xray


def test_documents_stand_before_the_users_first_words() -> None:
    documents = [{"name": "a.txt", "text": "\ufeffone\r\ntwo\r"}, {"title": "b", "text": "x"}]
    messages = [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Hi."}, USER]
    system, first, *others = asked(documents=documents, messages=messages).messages or ()
    texts = ["File: a.txt\none\ntwo\n\n", "File: b\nx\n\n", USER["content"]]
    assert first == {"role": "user", "content": [{"type": "text", "text": text} for text in texts]}
    assert [system, *others] == [messages[0], *messages[2:]]
    assert asked(documents=[]) == asked(documents=None) == asked()


def test_unknown_fields_are_let_pass() -> None:
    unknown = {"user": "me", "metadata": {"a": 1}, "store": False, "logit_bias": {}, "\u00fc": [None]}
    assert asked(**unknown, messages=[USER | {"unknown": 1}]) == asked()


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [USER | {"content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": {"a": 1}}]}, "messages[0].content"),
        ({"messages": [USER | {"content": [{"type": "text"}]}]}, "messages[0].content[0]"),
        ({"messages": [USER | {"content": [{"type": "blob"}]}]}, "messages[0].content[0]"),
        ({"messages": [USER, NO_FUNCTION]}, "messages[1].tool_calls[0].function"),
        ({"messages": [NO_TEXT]}, "messages[0].tool_calls[0].function.arguments"),
        ({"temperature": 5.0}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": 524289}, "max_completion_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": True}, "stream_options"),
        ({"thinking": True}, "thinking"),
        ({"thinking": {"type": "maybe"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"reasoning": "maybe"}, "reasoning"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"chat_template_kwargs": {"thinking_mode": 1}}, "chat_template_kwargs.thinking_mode"),
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"tools": {}}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "<a>"}}]}, "tools[0].function.name"),
        ({"tools": [NO_OBJECT]}, "tools[0].function.parameters"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"service_tier": "first class"}, "service_tier"),
        ({"evidence": "please"}, "evidence"),
        ({"documents": {}}, "documents"),
        ({"documents": [{"name": "a"}]}, "documents[0].text"),
        ({"documents": [{"name": "a", "text": " \n"}]}, "documents[0].text"),
        ({"documents": [{"name": "a\nb", "text": "x"}]}, "documents[0].name"),
        ({"documents": [{"name": "", "text": "x"}]}, "documents[0].name"),
        ({"documents": [{"name": "a", "text": "x"}], "messages": [{"role": "system", "content": "x"}]}, "documents"),
        ({"model": 5}, "model"),
        ({"model": "gpt-9"}, "model"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_its_name(body: dict[str, Any], named: str) -> None:
    error = refused(**body)
    assert error["param"] == named
    assert named in error["message"] or body.get("model") == "gpt-9"


def test_a_refusal_says_what_would_be_right() -> None:
    choice = '"auto", "none", "required" or {"type": "function", "function": {"name": ...}}'
    assert refused(tool_choice=5)["message"] == f"tool_choice: must be {choice} (2013)"
    assert "less than or equal to 2" in refused(temperature=5.0)["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"hi"', b"\xff", b'{"messages": ' + b"[" * 100_000])
def test_a_body_that_is_no_request_is_refused(body: bytes) -> None:
    with TestClient(app_of(FakeService())) as client:
        assert client.post(PATH, content=body, headers={"content-type": "application/json"}).status_code == 400


def test_half_a_surrogate_pair_in_a_text_is_no_reason_to_refuse_it() -> None:
    service = FakeService()
    with TestClient(app_of(service)) as client:
        body = rb'{"messages": [{"role": "user", "content": "\ud83d"}]}'
        assert client.post(PATH, content=body, headers={"content-type": "application/json"}).status_code == 200
    assert service.call.messages == [{"role": "user", "content": "\ud83d"}]


DEEP = '{"a":' * 500 + "1" + "}" * 500


@pytest.mark.parametrize(
    "parameters", ['{"a": NaN}', '{"a": 1e999}', r'{"\ud800": 1}', r'{"a": "\ud800"}', r'{"\ud800": NaN}', DEEP, "[]"]
)
def test_a_schema_must_be_json_that_can_be_written_again(parameters: str) -> None:
    service = FakeService()
    tools = f'[{{"type": "function", "function": {{"name": "a", "parameters": {parameters}}}}}]'
    body = f'{{"messages": [{{"role": "user", "content": "a"}}], "tools": {tools}}}'
    with TestClient(app_of(service)) as client:
        response = client.post(PATH, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert "tools[0].function.parameters" in response.json()["error"]["message"]
    assert service.calls == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status"), [(PromptError("too long"), 400), (BusyError("later"), 429), (EngineError("broken"), 503)]
)
def test_what_refuses_a_call_gives_a_status(error: Exception, status: int, stream: bool) -> None:
    response = post(FakeService([error]), stream=stream, n=2)
    assert response.status_code == status
    assert response.json()["error"]["http_code"] == str(status)


def test_a_failure_in_a_stream_is_told_in_it(caplog: pytest.LogCaptureFixture) -> None:
    service = FakeService([Started(11), Content("Hello"), RuntimeError("a secret")])
    with caplog.at_level(logging.ERROR):
        response = post(service, stream=True, stream_options={"include_usage": True})
    *chunks, last = chunks_of(response.text)
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hello"},
    ]
    assert last["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert "a secret" in caplog.text
    assert service.num_running == 0


@pytest.mark.parametrize(("reason", "status"), [("error", 500), ("abort", 503)])
def test_a_reply_that_breaks_off_is_an_error(reason: str, status: int) -> None:
    script: list[Step] = reply(Content("Hel"), last=finished(reason))
    assert post(FakeService(script)).status_code == status
    last = chunks_of(post(FakeService(script), stream=True).text)[-1]
    assert last["error"]["http_code"] == str(status)


def test_one_failing_choice_ends_the_others() -> None:
    def script(call: Call) -> list[Step]:
        return ANSWER if call.params.seed == 1 else [Started(11), BusyError("later")]

    service = FakeService(script)
    response = post(service, n=2, seed=1, stream=True)
    assert chunks_of(response.text)[-1]["error"]["http_code"] == "429"
    assert service.num_running == 0
    assert post(FakeService(script), n=2, seed=1).status_code == 429


def test_the_api_is_described() -> None:
    described = app_of(FakeService()).openapi()
    replies = described["paths"][PATH]["post"]["responses"]["200"]["content"]
    assert replies["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatCompletion"}
    assert "text/event-stream" in replies
    request = described["components"]["schemas"]["ChatRequest"]
    assert request["required"] == ["messages"]
    assert {"thinking", "reasoning_split", "max_completion_tokens"} <= set(request["properties"])
    json.dumps(described)
