"""Conversations to prompts: checked, rendered by a Jinja template, split into ordinary text and control tokens.

The template is the checkpoint's own or `TEMPLATE`. What callers write can never become a control token: while the
template runs, a mark (a private-use character found neither in the conversation nor in the template) stands around
every caller's string and inside every control token's text in it; only unmarked control tokens, those the template
itself wrote, are taken as such, and the marks are then removed. Knows no ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from openm3.errors import PromptError
from openm3.tokens.media import Media, check_kinds, expand

TEMPLATE: str = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
"""openm3's own template in M3's grammar; also readable by transformers."""

THINKING = ("enabled", "disabled", "adaptive")
"""The thinking modes: forced, suppressed, left to the model."""

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
# Words that templates compare with stay unmarked: alone they are no control token, and all around them is marked.
_WORDS = {
    *_ROLES,
    "text",
    "image",
    "video",
    "function",
    "string",
    "number",
    "integer",
    "boolean",
    "object",
    "array",
    "null",
}
_MEDIA_PARTS = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
_NAMES = ("properties", "$defs", "definitions", "patternProperties")

TAG_NAME = re.compile(r'[^<>"\r\n/][^<>"\r\n]{0,127}')
"""Keys that can be written as a tag."""

INVOKE_NAME = re.compile(r'[^<>"\r\n]{1,128}')
"""Names of functions that can be called."""


def render(
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str,
    controls: re.Pattern[str],
    tools: Sequence[Mapping[str, Any]] | None,
    thinking: str,
    add_generation_prompt: bool,
    variables: Mapping[str, str],
    media: Sequence[Media] = (),
) -> list[tuple[str, bool]]:
    """The prompt as pieces (text, whether it is one control token), in order, its media written out.

    `controls` matches the text of any control token, longest first; `variables` are further ones for the template;
    `media` are what the messages' image and video parts stand for. Raises PromptError for anything that is not a
    conversation in OpenAI's format, that does not fit its media, or that the template refuses.
    """
    if thinking not in THINKING:
        raise PromptError(f"thinking must be one of {', '.join(THINKING)}, not {thinking!r}")
    try:
        checked = _checked_messages(messages)
        check_kinds(_shown(checked), media)
        written = json.dumps([checked, _checked_tools(tools)], ensure_ascii=False)
    except PromptError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"messages and tools may hold JSON values only: {error}") from None
    conversation, functions = json.loads(written)
    guard = _Guard(controls, written + template)
    try:
        prompt = _compiled(template).render(
            **variables,
            messages=guard.marked(conversation),
            tools=guard.marked(functions) or None,
            thinking_mode=thinking,
            add_generation_prompt=add_generation_prompt,
        )
    except jinja2.TemplateSyntaxError as error:
        raise PromptError(f"the chat template is not valid Jinja: {error}") from None
    except Exception as error:  # a template can fail in any way
        raise PromptError(f"the chat template failed on these messages: {error}") from None
    return list(expand(guard.pieces(prompt), media))


def render_tool_call(name: str, arguments: Mapping[str, Any]) -> str:
    """One call in the namespace grammar, as the model writes it and `parse_tool_calls` reads it.

    Arguments that are None are left out. Raises PromptError for a name or an argument name that cannot stand in a tag.
    """
    if not INVOKE_NAME.fullmatch(name):
        raise PromptError(f"the function name {name!r} cannot stand in a tag")
    for key in arguments:
        if not TAG_NAME.fullmatch(key):
            raise PromptError(f"the argument name {key!r} cannot stand in a tag")
    module = _compiled(TEMPLATE).make_module({"messages": []})
    call = {"function": {"name": name, "arguments": {key: _taggable(value) for key, value in arguments.items()}}}
    return str(module.tool_block([call]))  # type: ignore[attr-defined]  # a macro of the template


def _checked_messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, list | tuple):
        raise PromptError(f"messages must be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise PromptError("messages is empty: a conversation needs at least one message")
    return [_checked_message(message, f"message {i}") for i, message in enumerate(messages)]


def _checked_message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise PromptError(f"{where} must be an object with role and content, not {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise PromptError(f"{where} has the role {role!r}: it must be one of {', '.join(_ROLES)}")
    is_ai = role == "assistant"
    checked = {key: value for key, value in message.items() if key not in ("tool_calls", "reasoning_content")}
    checked["role"] = _ROLES[role]
    thoughts, calls = message.get("reasoning_content"), message.get("tool_calls")
    if not isinstance(thoughts, str | None) or not isinstance(calls, list | tuple | None):
        raise PromptError(f"{where}: reasoning_content must be text and tool_calls a list")
    thinking = [thoughts] if is_ai and thoughts else []
    checked["content"] = _checked_content(message.get("content"), where, thinking if is_ai else None)
    if is_ai and thinking:
        checked["reasoning_content"] = "".join(thinking)
    if is_ai and calls:
        checked["tool_calls"] = [_checked_call(call, where) for call in calls]
    if message.get("content") is None and not checked.keys() & {"reasoning_content", "tool_calls"}:
        raise PromptError(f"{where} ({role}) has no content")
    return checked


def _checked_content(content: object, where: str, thinking: list[str] | None) -> str | list[dict[str, str]]:
    """`content` as text or parts; what thinking parts hold is added to `thinking`, if they are allowed here.

    Of a picture or video only the kind is kept: what it holds comes beside the messages.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list | tuple):
        raise PromptError(f"{where} has a content of type {type(content).__name__}: it must be text or a list of parts")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if isinstance(kind, str) and kind in _MEDIA_PARTS:
            parts.append({"type": _MEDIA_PARTS[kind]})
            continue
        text = part.get("thinking" if kind == "thinking" else "text") if isinstance(part, Mapping) else None
        if kind not in (("text",) if thinking is None else ("text", "thinking")):
            raise PromptError(f"{where} has a content part of type {kind!r}: only text, image and video are known")
        if not isinstance(text, str):
            raise PromptError(f"{where} has a {kind} part without text")
        if kind == "text":
            parts.append({"type": "text", "text": text})
        elif thinking is not None:
            thinking.append(text)
    return parts


def _shown(messages: list[dict[str, Any]]) -> list[str]:
    """The kinds of the pictures and videos in checked messages, in order."""
    contents = [message["content"] for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part["type"] for part in parts if part["type"] in _MEDIA_PARTS]


def _checked_call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise PromptError(f"{where} has a tool call without a function")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise PromptError(f"{where} has a tool call without a function name")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{where}: the arguments of {name!r} are not JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise PromptError(f"{where}: the arguments of {name!r} must be a JSON object")
    fields = {str(key): _taggable(value) for key, value in arguments.items()}
    return {**call, "function": {**function, "arguments": fields}}


def _checked_tools(tools: object) -> list[dict[str, Any]]:
    if tools is None:
        return []
    if not isinstance(tools, list | tuple):
        raise PromptError(f"tools must be a list of functions, not {type(tools).__name__}")
    checked = []
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise PromptError(f"tool {i} must be a function with a name")
        checked.append({"type": "function", "function": dict(function)})
    return checked


def _taggable(value: Any) -> Any:
    """`value` with every object that cannot be written as tags replaced by its JSON text, which parses back."""
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) and TAG_NAME.fullmatch(key) for key in value) or set(value) == {"item"}:
            return json.dumps(value, ensure_ascii=False)
        return {key: _taggable(inner) for key, inner in value.items()}
    return [_taggable(inner) for inner in value] if isinstance(value, list | tuple) else value


class _Guard:
    """Marks callers' strings before rendering and splits the rendered prompt after it."""

    def __init__(self, controls: re.Pattern[str], text: str) -> None:
        """`text` holds all that may come into the prompt: the mark is a character that it lacks."""
        self._controls = controls
        used = set(text)
        for code in chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE)):
            # A template may write JSON with escapes.
            self._mark, self._escaped_mark = chr(code), json.dumps(chr(code))[1:-1]
            if self._mark not in used and self._escaped_mark not in text:
                return
        raise PromptError("the messages use every private-use character of Unicode: one must be left free")

    def marked(self, value: Any, keys: Literal["known", "names", "data"] = "known") -> Any:
        """A copy with marks. `keys` says what the keys of objects are: known to templates, names, or free data."""
        if isinstance(value, str):
            return self._around(value)
        if isinstance(value, list | tuple):
            return [self.marked(inner, keys) for inner in value]
        if not isinstance(value, Mapping):
            return value
        copy = {}
        for key, inner in value.items():
            below: Literal["known", "names", "data"] = "known"
            if keys == "data" or (keys == "known" and key == "arguments"):
                below = "data"
            elif keys == "known" and key in _NAMES:
                below = "names"
            copy[self._inside(key) if keys == "known" else self._around(key)] = self.marked(inner, below)
        return copy

    def _around(self, text: str) -> str:
        """Mark both ends, within white space, which templates may trim, and all control tokens."""
        core = text.strip()
        if not core or core in _WORDS:
            return text
        start = text.index(core)
        return f"{text[:start]}{self._mark}{self._inside(core)}{self._mark}{text[start + len(core) :]}"

    def _inside(self, text: str) -> str:
        """Mark after the first character of every control token, overlapping ones too."""
        parts, end = [], 0
        match = self._controls.search(text)
        while match:
            parts += [text[end : match.start() + 1], self._mark]
            end = match.start() + 1
            match = self._controls.search(text, end)
        return "".join([*parts, text[end:]])

    def pieces(self, prompt: str) -> Iterator[tuple[str, bool]]:
        end = 0
        for match in self._controls.finditer(prompt):
            if match.start() > end:
                yield self._unmarked(prompt[end : match.start()]), False
            yield match.group(), True
            end = match.end()
        if end < len(prompt):
            yield self._unmarked(prompt[end:]), False

    def _unmarked(self, text: str) -> str:
        return text.replace(self._mark, "").replace(self._escaped_mark, "")


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    """Compiled as transformers does it, so that a checkpoint's template means the same."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
