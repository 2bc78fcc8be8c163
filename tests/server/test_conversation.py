"""Roles, and which result answers which call."""

from __future__ import annotations

from typing import Any

import pytest

from openm3.errors import PromptError
from openm3.model.model import Model
from openm3.server.conversation import ROOT, conversation

USER = {"role": "user", "content": "Hi"}


def calling(*ids: str) -> dict[str, Any]:
    calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": "{}"}} for i in ids]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def result(name: object, content: Any = "ok") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": name, "content": content}


@pytest.mark.parametrize(
    "messages",
    [
        [USER, calling("a", "b"), result("a"), result("b")],
        [USER, calling("a", "b"), result("b"), result("a"), USER],
        [USER, calling("a"), calling("b"), result("a"), result("b")],
        [USER, calling("a"), result("a"), calling("a"), result("a")],
        [USER, calling("a", "a"), result("a"), result("a")],
        [USER, calling("a")],
        [USER, calling("a"), USER],
        [USER, {"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}, USER],
        [{"role": "system", "content": "x"}, USER, {"role": "system", "content": "y"}],
        [{"role": "developer", "content": "x"}, USER],
        [USER, calling("a"), result("a", "")],
        [USER, calling("a"), result("a", None)],
        [USER, calling("a"), result("a", [{"type": "text", "text": "x"}])],
        [USER, {"role": "assistant"}, USER],
    ],
)
def test_what_clients_send_is_a_conversation(messages: list[dict[str, Any]], model: Model) -> None:
    assert len(model.tokenizer.chat(conversation(messages))) > 5


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([], "messages is empty"),
        ("Hi", "messages must be a list of messages, not str"),
        (["Hi"], "messages must hold objects"),
        ([{"role": "robot", "content": "x"}], "message 0 has the role 'robot'"),
        ([{"content": "x"}], "message 0 has the role None"),
        ([{"role": "user"}], r"message 0 \(user\) has no content"),
        ([USER, calling("a"), result("a", {"x": 1})], "message 2 has a content of type dict"),
        ([USER, result("a")], "message 1: tool_call_id 'a' answers no open tool call; open: none"),
        ([USER, calling("a"), result("b")], "message 2: tool_call_id 'b' answers no open tool call; open: 'a'"),
        ([USER, calling("a"), result(None)], "message 2: tool_call_id None answers no"),
        ([USER, calling("a"), result({"x": 1})], "message 2: tool_call_id {'x': 1} answers no"),
        ([USER, calling("a"), result("a"), result("a")], "message 3: tool_call_id 'a' answers no open"),
        ([USER, calling("a"), USER, result("a")], "message 3: tool_call_id 'a' answers no open"),
        ([USER, calling("a", "b"), result("a")], "message 2 answers only some .* missing: 'b'"),
        ([USER, calling("a", "b"), result("b"), USER], "message 2 answers only some .* missing: 'a'"),
        ([USER, calling("a", "b"), result("b"), calling("c"), result("c")], "missing: 'a'"),
        ([{"role": "root", "content": "x"}], "root messages alone"),
        ([{"role": "root"}, USER], "the root message needs a content"),
        ([{"role": "root", "content": [3]}, USER], "content part of type 'int'"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any, why: str, model: Model) -> None:
    with pytest.raises(PromptError, match=why):
        model.tokenizer.chat(conversation(messages))


def test_root_stands_before_what_the_system_says(model: Model) -> None:
    root, system = {"role": "root", "content": "You are R."}, {"role": "system", "content": "You are S."}
    with_system = model.tokenizer.decode(model.tokenizer.chat(conversation([system, root, USER])))
    assert f"system\n{ROOT}You are R.\n\nYou are S." in with_system
    alone = conversation([root, USER])
    assert [message["role"] for message in alone] == ["system", "user"]
    assert "".join(part["text"] for part in alone[0]["content"]) == f"{ROOT}You are R."


def test_messages_are_not_changed() -> None:
    messages = [{"role": "root", "content": "x"}, {"role": "system", "content": "y"}, USER, calling("a"), result("a")]
    before = repr(messages)
    conversation(messages)
    assert repr(messages) == before
