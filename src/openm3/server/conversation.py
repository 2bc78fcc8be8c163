"""Conversations as clients send them, made ready for the chat template: roles, and which result answers which call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from openm3.errors import PromptError

Message = Mapping[str, Any]

ROOT = "These instructions come first; where what follows contradicts them, they hold:\n"
"""Stands above what role `root` says: chat templates know no such role."""


def conversation(messages: object) -> list[Message]:
    """Messages in OpenAI's format as `Tokenizer.chat` takes them; raises PromptError for what no model could answer.

    What MiniMax's role `root` says becomes the beginning of the system message, before the system's own words. Each
    tool result answers one open call of the assistant messages before it, and all of them must be answered, or none.
    Everything else is checked where it is rendered.
    """
    if not isinstance(messages, list | tuple):
        raise PromptError(f"messages must be a list of messages, not {type(messages).__name__}")
    listed = [message for message in messages if isinstance(message, Mapping)]
    if len(listed) < len(messages):
        raise PromptError("messages must hold objects with role and content only")
    _check_results(listed)
    return _rooted([_filled(message) for message in listed])


def _filled(message: Message) -> Message:
    """With a content, where leaving it out means that there is none: empty results and replies."""
    if message.get("content") is None and message.get("role") in ("assistant", "tool"):
        return {**message, "content": ""}
    return message


def _check_results(messages: Sequence[Message]) -> None:
    waiting: list[object] = []
    answered = False
    for i, message in enumerate(messages):
        role = message.get("role")
        if role == "tool":
            name = message.get("tool_call_id")
            if name not in waiting:
                open_calls = ", ".join(map(repr, waiting)) or "none"
                raise PromptError(f"message {i}: tool_call_id {name!r} answers no open tool call; open: {open_calls}")
            waiting.remove(name)
            answered = True
            continue
        if answered:
            _check_all_answered(waiting, i)
        if role != "assistant" or answered:
            waiting = []
        answered = False
        calls = message.get("tool_calls") if role == "assistant" else None
        waiting += [call.get("id") for call in calls or () if isinstance(call, Mapping)]
    if answered:
        _check_all_answered(waiting, len(messages))


def _check_all_answered(waiting: Sequence[object], place: int) -> None:
    if waiting:
        missing = ", ".join(map(repr, waiting))
        raise PromptError(f"message {place - 1} answers only some of the tool calls before it; missing: {missing}")


def _rooted(messages: list[Message]) -> list[Message]:
    roots = [message for message in messages if message.get("role") == "root"]
    if not roots:
        return messages
    others = [message for message in messages if message.get("role") != "root"]
    if not others:
        raise PromptError("messages holds root messages alone: a conversation needs at least one other message")
    parts: list[Any] = [{"type": "text", "text": ROOT}]
    for message in roots:
        parts += [*_parts(message), {"type": "text", "text": "\n\n"}]
    has_system = others[0].get("role") in ("system", "developer")
    if has_system:
        return [{**others[0], "content": [*parts, *_parts(others[0])]}, *others[1:]]
    return [{"role": "system", "content": parts[:-1]}, *others]


def _parts(message: Message) -> list[Any]:
    content = message.get("content")
    if isinstance(content, list | tuple):
        return list(content)
    if not isinstance(content, str):
        raise PromptError(f"the {message['role']} message needs a content: text or a list of parts")
    return [{"type": "text", "text": content}]
