"""Anthropic's protocol: /v1/messages and /v1/messages/count_tokens, and the same under /anthropic."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal
from uuid import uuid4

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from openm3.engine.request import SamplingParams, Usage
from openm3.server.anthropic_bodies import MessageOut, MessageTokens
from openm3.server.anthropic_types import (
    Block,
    CountRequest,
    MessagesRequest,
    OtherBlock,
    TextBlock,
    ThinkingBlock,
    ThinkingConfig,
    Tool,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
)
from openm3.server.calls import Call, Event, Finished, Serves, Started
from openm3.server.errors import RequestError, error_body
from openm3.server.extras import extra
from openm3.server.media.parts import content_of, media_part
from openm3.server.parts import with_documents
from openm3.server.protocol import (
    answer,
    check_end,
    checked,
    function,
    sampling,
    seal,
    tool_call,
    unseal,
)
from openm3.server.stream import EVENT_STREAM, packet, without_text
from openm3.tokens import Content, Thinking, ToolArguments, ToolEnd, ToolStart

PING = packet({"type": "ping"}, "ping")

MESSAGE = {"model": MessageOut} | EVENT_STREAM

# What earlier turns with another server's own tools or caches leave in a conversation: nothing that a model reads.
_PASSED_OVER = ("redacted_thinking", "server_tool_use", "mcp_tool_use", "container_upload", "compaction")
_STOP_REASONS = {"tool_calls": "tool_use", "length": "max_tokens", "timeout": "max_tokens"}
# Anthropic's client then sends all messages by itself, where it would go on with the last one alone.
_NO_THREAD = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
# Claude Code puts it before its prompt, with a part that changes from call to call: no prefix would ever be reused.
_BILLING = "x-anthropic-billing-header:"


def routes(service: Serves) -> APIRouter:
    """The routes of Anthropic's protocol."""
    router = APIRouter(tags=["Anthropic"])

    async def messages(body: MessagesRequest, request: Request) -> Response:
        model = service.check_model(body.model)
        if body.thread is not None:
            raise RequestError(
                "nothing is kept here: send all messages, and no thread", param="thread", details=_NO_THREAD
            )
        params = sampling(
            service,
            max(body.max_tokens, 1),
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            stop=body.stop_sequences or (),
        )
        call = replace(_call(body, params), evidence=bool(body.evidence), xray=bool(body.xray))
        events = service.stream(call)
        if not body.max_tokens:
            _check_silent(body)
            events = without_text(events)
        omits = body.thinking is not None and body.thinking.display == "omitted"
        reply = _Reply(model, getattr(request.state, "request_id", ""), omit_thinking=omits)
        return await answer(reply, events, request, stream=body.stream, ping=PING)

    async def count_tokens(body: CountRequest) -> MessageTokens:
        service.check_model(body.model)
        return MessageTokens(input_tokens=await service.count(_call(body)))

    for prefix in ("", "/anthropic"):
        path = f"{prefix}/v1/messages"
        router.add_api_route(path, messages, methods=["POST"], response_model=None, responses={200: MESSAGE})
        router.add_api_route(f"{path}/count_tokens", count_tokens, methods=["POST"])
    return router


def _call(body: CountRequest, params: SamplingParams | None = None) -> Call:
    given = (body.output_config and body.output_config.format) or body.output_format
    choice, parallel = _choice(body.tool_choice)
    thinking, budget = _thinking(body.thinking)
    return checked(
        Call(
            messages=with_documents(_messages(body), body.documents),
            tools=_functions(body.tools or ()),
            tool_choice=choice,
            parallel_tool_calls=parallel,
            thinking=thinking,
            thinking_budget=budget,
            schema=given.json_schema if given else None,
            params=params or SamplingParams(),
        )
    )


def _check_silent(body: MessagesRequest) -> None:
    """Without a token the prompt is only read, for the cache: raises RequestError for what says how to reply."""
    says = {
        "stream": body.stream,
        "thinking": body.thinking is not None and body.thinking.type == "enabled",
        "output_config": body.output_format or (body.output_config and body.output_config.format),
        "tool_choice": body.tool_choice is not None and body.tool_choice.type in ("any", "tool"),
    }
    for name, is_said in says.items():
        if is_said:
            raise RequestError(f"max_tokens is 0, which asks for no reply: leave out {name}", param=name)


def _choice(choice: ToolChoice | None) -> tuple[str, bool]:
    """Which tools, in `Call`'s words, and whether several calls may come at once."""
    if choice is None:
        return "auto", True
    if choice.type == "tool" and not choice.name:
        raise RequestError("tool_choice of type tool needs the name of one", param="tool_choice")
    names = {"any": "required", "tool": choice.name or ""}
    return names.get(choice.type, choice.type), not choice.disable_parallel_tool_use


def _thinking(config: ThinkingConfig | None) -> tuple[Literal["enabled", "disabled", "adaptive"], int | None]:
    if config is None or config.type == "between_tools":
        return "adaptive", None
    return config.type, config.budget_tokens if config.type == "enabled" else None


def _functions(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    found = []
    for i, tool in enumerate(tools):
        if tool.type in (None, "custom"):
            if not tool.name or tool.input_schema is None:
                raise RequestError(f"tools.{i} needs a name and an input_schema", param="tools")
            found.append(function(tool.name, tool.description, tool.input_schema))
    return found


def _messages(body: CountRequest) -> list[dict[str, Any]]:
    """The conversation in OpenAI's format."""
    if body.messages[-1].role == "assistant":
        raise RequestError("the last message is the assistant's: its words cannot be continued", param="messages")
    found = _system(_blocks(body.system or "", "system"))
    for role, turns in groupby(enumerate(body.messages), key=lambda numbered: numbered[1].role):
        blocks = [block for i, turn in turns for block in _blocks(turn.content, f"messages[{i}].content")]
        found += {"user": _user, "assistant": _assistant, "system": _system}[role](blocks)
    return found


@dataclass(frozen=True)
class _Placed:
    """A block and its place in the request."""

    block: Block
    where: str


def _blocks(content: str | Sequence[Block], where: str) -> list[_Placed]:
    if isinstance(content, str):
        return [_Placed(TextBlock(type="text", text=content), where)]
    return [_Placed(block, f"{where}[{i}]") for i, block in enumerate(content)]


def _system(placed: Sequence[_Placed]) -> list[dict[str, Any]]:
    content = _content([one for one in placed if not _is_billing(one.block)], "system")
    return [{"role": "system", "content": content}] if content else []


def _is_billing(block: Block) -> bool:
    return isinstance(block, TextBlock) and block.text.startswith(_BILLING)


def _user(placed: Sequence[_Placed]) -> list[dict[str, Any]]:
    """What the calls gave, then what the user says to it."""
    results = [
        {"role": "tool", "tool_call_id": one.block.tool_use_id, "content": _result(one.block, one.where)}
        for one in placed
        if isinstance(one.block, ToolResultBlock)
    ]
    content = _content([one for one in placed if not isinstance(one.block, ToolResultBlock)], "user")
    return results + ([{"role": "user", "content": content}] if content or not results else [])


def _result(block: ToolResultBlock, where: str) -> str | list[dict[str, Any]]:
    content = _content(_blocks(block.content or "", f"{where}.content"), "tool_result")
    if not block.is_error:
        return content
    return f"Error: {content}" if isinstance(content, str) else [{"type": "text", "text": "Error: "}, *content]


def _assistant(placed: Sequence[_Placed]) -> list[dict[str, Any]]:
    """One turn: all its thoughts, all its text, all its calls, as the model's grammar has them."""
    message: dict[str, Any] = {"role": "assistant"}
    blocks = [one.block for one in placed]
    thoughts = [block for block in blocks if isinstance(block, ThinkingBlock)]
    calls = [block for block in blocks if isinstance(block, ToolUseBlock)]
    others = [one for one in placed if not isinstance(one.block, ThinkingBlock | ToolUseBlock)]
    message["content"] = _content(others, "assistant", between="")
    if thoughts:
        message["reasoning_content"] = "".join(block.thinking or unseal(block.signature) for block in thoughts)
    if calls:
        message["tool_calls"] = [tool_call(block.id, block.name, block.input) for block in calls]
    return [message]


def _content(placed: Sequence[_Placed], place: str, between: str = "\n") -> str | list[dict[str, Any]]:
    """What the blocks say and show. Raises RequestError for those that do neither or cannot stand at this place."""
    return content_of((part for one in placed for part in _part(one.block, one.where, place)), between)


def _part(block: Block, where: str, place: str) -> Iterator[str | dict[str, Any]]:
    if isinstance(block, TextBlock):
        yield block.text
    elif not isinstance(block, OtherBlock):
        raise RequestError(f"a block of type {block.type} cannot stand in {place} content", param="messages")
    elif (shown := media_part(dict(block), where)) is not None:
        yield shown
    elif block.type == "document":
        raise RequestError(f"{where}: document blocks are not supported: send text in documents", param=where)
    elif block.type not in _PASSED_OVER and not block.type.endswith("_tool_result"):
        raise RequestError(f"a block of type {block.type!r} is not understood in {place} content", param="messages")


class _Reply:
    """A message as it grows: each event of the call adds to it, and gives the stream's events that tell of that."""

    def __init__(self, model: str, request_id: str, *, omit_thinking: bool) -> None:
        self.body: dict[str, Any] = {
            "id": f"msg_{uuid4().hex[:24]}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {},
        }
        self._request_id = request_id
        self._omits_thinking = omit_thinking
        self._block: dict[str, Any] | None = None
        self._texts: list[str] = []

    def add(self, event: Event) -> Iterator[dict[str, Any]]:
        """The stream's events. Raises as `check_end` does."""
        match event:
            case Started(prompt_tokens):
                self.body["usage"] = {**_usage(Usage(prompt_tokens, 0, 0)), "service_tier": "standard"}
                yield {"type": "message_start", "message": self.body}
            case Thinking(text):
                yield from self._opened({"type": "thinking", "thinking": "", "signature": ""})
                self._texts.append(text)
                if not self._omits_thinking:
                    yield self._delta(type="thinking_delta", thinking=text)
            case Content(text):
                yield from self._opened({"type": "text", "text": ""})
                self._texts.append(text)
                yield self._delta(type="text_delta", text=text)
            case ToolStart(_, name):
                yield from self._closed()
                number = f"toolu_{uuid4().hex[:24]}"
                yield from self._opened({"type": "tool_use", "id": number, "name": name, "input": {}})
            case ToolArguments(_, text):
                yield self._delta(type="input_json_delta", partial_json=text)
            case ToolEnd(_, arguments):
                assert self._block is not None
                self._block["input"] = arguments
                yield from self._closed()
            case Finished():
                check_end(event)
                yield from self._closed()
                yield from self._ended(event)

    def fail(self, error: RequestError) -> dict[str, Any]:
        """The last event of a stream in which something went wrong."""
        return error_body(error, "/v1/messages", self._request_id)

    def _opened(self, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A block of this kind open at the end of the message."""
        if self._block is None or self._block["type"] != block["type"]:
            yield from self._closed()
            self._block = block
            self.body["content"].append(block)
            yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _closed(self) -> Iterator[dict[str, Any]]:
        block, self._block = self._block, None
        text, self._texts = "".join(self._texts), []
        if block is None:
            return
        if block["type"] == "text":
            block["text"] = text
        if block["type"] == "thinking":
            block["thinking"] = "" if self._omits_thinking else text
            block["signature"] = seal(text) if self._omits_thinking else hashlib.sha256(text.encode()).hexdigest()
            yield self._delta(type="signature_delta", signature=block["signature"])
        yield {"type": "content_block_stop", "index": self._index}

    def _delta(self, **delta: str) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _ended(self, finished: Finished) -> Iterator[dict[str, Any]]:
        reason = "stop_sequence" if finished.stop is not None else "end_turn"
        ending = {
            "stop_reason": _STOP_REASONS.get(finished.reason, reason),
            "stop_sequence": finished.stop,
        }
        usage = _usage(finished.usage, finished.thinking_tokens)
        self.body |= ending
        self.body["usage"] |= usage
        found = extra(finished)
        yield {"type": "message_delta", "delta": ending, "usage": usage} | ({"openm3": found} if found else {})
        yield {"type": "message_stop"}

    @property
    def _index(self) -> int:
        return len(self.body["content"]) - 1


def _usage(usage: Usage, thinking_tokens: int = 0) -> Mapping[str, Any]:
    """Anthropic counts tokens that were read from the cache beside the others, not among them."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"thinking_tokens": thinking_tokens},
    }
