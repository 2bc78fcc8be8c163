"""Splits what the model writes, as it comes, into thinking, content and tool calls.

The text holds the control tokens' own text. A tag may arrive in any number of parts; only an ending that could still
become a tag awaited at that place is held back. Rules for text that is out of order, by which nothing is lost:

- Thinking stands only at the start. There, the tag that the prompt already holds may be repeated and is dropped, and
  white space before a tag too. When thinking was left to the model and it began with neither tag, the first
  `</mm:think>` is dropped. All other think tags are ordinary content.
- Tool tags count only behind the namespace token `]<]minimax[>[`; everything else that looks like one is content.
- Text between calls is content. A `<tool_call>` with no call in it is dropped if empty, else content as it stands.
- A call that is not closed ends where the next one starts, where the block ends, or at `finish` (`complete` is False).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from openm3.errors import PromptError
from openm3.tokens.chat import THINKING
from openm3.tokens.toolcalls import CallBuilder

NAMESPACE = "]<]minimax[>["
_OPEN_THINK, _CLOSE_THINK = "<mm:think>", "</mm:think>"
_OPEN_BLOCK, _CLOSE_BLOCK = f"{NAMESPACE}<tool_call>", f"{NAMESPACE}</tool_call>"
_CLOSE_CALL = f"{NAMESPACE}</invoke>"
_TAG = re.compile(r"<([^<>\r\n]{1,144})>")
_PARTIAL_TAG = re.compile(r"(?:<[^<>\r\n]{0,144})?")
_INVOKE = re.compile(r'invoke name="([^"]+)"')


@dataclass(frozen=True)
class Thinking:
    """Reasoning before the answer."""

    text: str


@dataclass(frozen=True)
class Content:
    """The answer itself."""

    text: str


@dataclass(frozen=True)
class ToolStart:
    """Call number `index` (from 0) begins."""

    index: int
    name: str


@dataclass(frozen=True)
class ToolArguments:
    """More of a call's arguments as JSON text; all texts of a call, joined, are one JSON object."""

    index: int
    text: str


@dataclass(frozen=True)
class ToolEnd:
    """A call ends. `complete` is False when the model did not close it: better not run it."""

    index: int
    arguments: dict[str, Any]
    complete: bool = True


Event = Thinking | Content | ToolStart | ToolArguments | ToolEnd


@dataclass(frozen=True)
class ToolCall:
    """A whole call."""

    name: str
    arguments: dict[str, Any]


class StreamRouter:
    """Turns decoded text into events.

    `tools` (OpenAI's format) give arguments their types, `thinking` is the mode that the prompt was made with. How the
    text is cut into pushes changes nothing but into how many parts texts of one kind are cut. Nothing that the model
    can write raises.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None = None, thinking: str = "adaptive") -> None:
        if thinking not in THINKING:
            raise PromptError(f"thinking must be one of {', '.join(THINKING)}, not {thinking!r}")
        self._mode = thinking
        self._parameters = dict(_named_parameters(tools or ()))
        self._place: Literal["start", "thinking", "content", "block", "call"] = "start"
        self._think_tag_due = thinking == "adaptive"
        self._buffer = ""
        self._events: list[Event] = []
        self._num_calls = 0
        self._call = CallBuilder(None)
        self._gap = ""
        self._is_prose = self._is_empty_block = False

    def push(self, text: str) -> list[Event]:
        """The events that this text completes, in order, neighbours of one kind joined."""
        self._buffer += text
        step = {
            "start": self._at_start,
            "thinking": self._in_thinking,
            "content": self._in_content,
            "block": self._in_block,
            "call": self._in_call,
        }
        while step[self._place]():
            pass
        events, self._events = self._events, []
        return events

    def finish(self) -> list[Event]:
        """The rest, at the end of the stream: what was held back comes out as text of the place where it stands."""
        rest, self._buffer = self._buffer, ""
        if self._place == "call":
            self._emit_arguments(self._call.add_text(rest))
            self._end_call(complete=False)
        elif self._place == "block":
            self._between_calls(rest)
        else:
            is_thinking = self._place == "thinking" or (self._place == "start" and self._mode == "enabled")
            self._emit(Thinking(rest) if is_thinking else Content(rest))
        self._place = "content"
        events, self._events = self._events, []
        return events

    def _at_start(self) -> bool:
        text = self._buffer.lstrip()
        awaited = {"enabled": (_OPEN_THINK,), "disabled": (_CLOSE_THINK,), "adaptive": (_OPEN_THINK, _CLOSE_THINK)}
        for tag in awaited[self._mode]:
            if text.startswith(tag):
                self._buffer = text[len(tag) :]
                self._think_tag_due = False
                self._place = "thinking" if tag == _OPEN_THINK else "content"
                return True
            if tag.startswith(text):
                return False
        self._place = "thinking" if self._mode == "enabled" else "content"
        return True

    def _in_thinking(self) -> bool:
        text, tag = self._until(_CLOSE_THINK)
        self._emit(Thinking(text))
        if tag:
            self._place = "content"
        return tag is not None

    def _in_content(self) -> bool:
        text, tag = self._until(_OPEN_BLOCK, *([_CLOSE_THINK] if self._think_tag_due else []))
        self._emit(Content(text))
        if tag == _CLOSE_THINK:
            self._think_tag_due = False
        elif tag:
            self._place, self._gap, self._is_prose, self._is_empty_block = "block", tag, False, True
        return tag is not None

    def _in_block(self) -> bool:
        text, tag = self._until_markup()
        self._between_calls(text)
        if tag is None:
            return False
        invoke = _INVOKE.fullmatch(tag)
        if invoke:
            self._start_call(invoke[1])
        elif tag != "/tool_call":
            self._between_calls(_markup(tag))
        else:
            if self._is_prose and self._is_empty_block:
                self._emit(Content(_CLOSE_BLOCK))
            self._place = "content"
        return True

    def _between_calls(self, text: str) -> None:
        """White space between tags is dropped; any other text is content, with the space around it."""
        self._gap += text
        if self._is_prose or text.strip():
            self._emit(Content(self._gap))
            self._gap, self._is_prose = "", True

    def _in_call(self) -> bool:
        key = self._call.verbatim_key
        if key is None:
            text, tag = self._until_markup()
        else:
            text, source = self._until(_markup(f"/{key}"), _CLOSE_CALL, _CLOSE_BLOCK)
            tag = source and source[len(NAMESPACE) + 1 : -1]
        self._emit_arguments(self._call.add_text(text))
        if tag is None:
            return False
        invoke = _INVOKE.fullmatch(tag)
        if invoke:
            self._end_call(complete=False)
            self._start_call(invoke[1])
        elif tag == "/invoke" and not self._call.has_open("invoke"):
            self._end_call(complete=True)
        elif tag == "/tool_call" and not self._call.has_open("tool_call"):
            self._end_call(complete=False)
            self._place = "content"
        elif tag.startswith("/"):
            self._emit_arguments(self._call.close_tag(tag[1:], _markup(tag)))
        elif '"' in tag:
            self._emit_arguments(self._call.add_text(_markup(tag)))
        else:
            self._emit_arguments(self._call.open_tag(tag, _markup(tag)))
        return True

    def _start_call(self, name: str) -> None:
        self._place = "call"
        self._call = CallBuilder(self._parameters.get(name))
        self._emit(ToolStart(self._num_calls, name))

    def _end_call(self, complete: bool) -> None:
        text, arguments = self._call.finish()
        self._emit_arguments(text)
        self._emit(ToolEnd(self._num_calls, arguments, complete))
        self._num_calls += 1
        self._place, self._gap, self._is_prose, self._is_empty_block = "block", "", False, False

    def _emit_arguments(self, text: str) -> None:
        self._emit(ToolArguments(self._num_calls, text))

    def _emit(self, event: Event) -> None:
        """Add an event; one without text is left out, one like the last is joined to it."""
        if isinstance(event, ToolStart | ToolEnd):
            self._events.append(event)
        elif event.text:
            last = self._events[-1] if self._events else None
            if type(last) is type(event):
                self._events[-1] = replace(event, text=last.text + event.text)
            else:
                self._events.append(event)

    def _until(self, *tags: str) -> tuple[str, str | None]:
        """Take the text before the first of `tags` and the tag, or the text that cannot belong to one."""
        found = [(start, tag) for tag in tags if (start := self._buffer.find(tag)) >= 0]
        if found:
            start, tag = min(found)
            return self._take(start, start + len(tag)), tag
        longest = max(_overlap(self._buffer, tag) for tag in tags)
        end = len(self._buffer) - longest
        return self._take(end, end), None

    def _until_markup(self) -> tuple[str, str | None]:
        """The same for any tag behind the namespace token; the tag comes back bare, without `<` and `>`."""
        start = self._buffer.find(NAMESPACE)
        while start >= 0:
            after = start + len(NAMESPACE)
            tag = _TAG.match(self._buffer, after)
            if tag:
                return self._take(start, tag.end()), tag[1]
            if _PARTIAL_TAG.fullmatch(self._buffer, after):
                return self._take(start, start), None
            start = self._buffer.find(NAMESPACE, after)
        end = len(self._buffer) - _overlap(self._buffer, NAMESPACE)
        return self._take(end, end), None

    def _take(self, end: int, start: int) -> str:
        """The buffer up to `end`; what begins at `start` stays."""
        text, self._buffer = self._buffer[:end], self._buffer[start:]
        return text


def parse_tool_calls(text: str, tools: Sequence[Mapping[str, Any]] | None = None) -> list[ToolCall]:
    """All calls in a whole answer, by the rules of `StreamRouter` with adaptive thinking; unclosed ones included."""
    router = StreamRouter(tools)
    events = router.push(text) + router.finish()
    names = [event.name for event in events if isinstance(event, ToolStart)]
    return [ToolCall(names[event.index], event.arguments) for event in events if isinstance(event, ToolEnd)]


def _markup(tag: str) -> str:
    return f"{NAMESPACE}<{tag}>"


def _overlap(text: str, tag: str) -> int:
    """The length of the longest ending of `text` that begins `tag` without being all of it."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)


def _named_parameters(tools: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function.get("parameters"), Mapping):
            yield str(function.get("name")), function["parameters"]
