"""OpenAI's responses: /v1/responses and /v1/responses/input_tokens. Nothing is stored: clients send all turns again."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal
from uuid import uuid4

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from openm3.engine.request import SamplingParams
from openm3.server.calls import Call, Serves
from openm3.server.errors import RequestError
from openm3.server.media.parts import content_of, media_part
from openm3.server.parts import with_documents
from openm3.server.protocol import (
    TEMPERATURE,
    TOP_P,
    answer,
    check_json,
    checked,
    function,
    sampling,
    tool_call,
    unseal,
)
from openm3.server.responses_bodies import ResponseOut, ResponseTokens
from openm3.server.responses_reply import Reply
from openm3.server.responses_types import (
    CallOutput,
    CountRequest,
    CustomCall,
    FunctionCall,
    FunctionTool,
    Item,
    MessageItem,
    NamespaceTool,
    OtherItem,
    Part,
    ReasoningItem,
    ResponsesRequest,
    Tool,
    ToolChoice,
)
from openm3.server.stream import EVENT_STREAM

_STORED = ("previous_response_id", "conversation", "prompt")


def routes(service: Serves) -> APIRouter:
    """The routes of OpenAI's responses."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/responses", response_model=None, responses={200: {"model": ResponseOut} | EVENT_STREAM})
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        model = service.check_model(body.model)
        longest = service.max_tokens if body.max_output_tokens is None else body.max_output_tokens
        params = sampling(service, longest, temperature=body.temperature, top_p=body.top_p, field="max_output_tokens")
        tools = _Tools(body.tools or ())
        call = replace(_call(body, tools, params), evidence=bool(body.evidence), xray=bool(body.xray))
        response = _response(body, model, tools)
        check_json(response)
        summarise = body.reasoning is not None and body.reasoning.summary is not None
        reply = Reply(response, tools.origins, summarise=summarise)
        return await answer(reply, service.stream(call), request, stream=body.stream)

    @router.post("/v1/responses/input_tokens")
    async def input_tokens(body: CountRequest) -> ResponseTokens:
        if body.model is not None:
            service.check_model(body.model)
        call = _call(body, _Tools(body.tools or ()), SamplingParams())
        return ResponseTokens(object="response.input_tokens", input_tokens=await service.count(call))

    return router


class _Tools:
    """The functions among a request's tools. Those of a namespace are called by both names, which `origins` undoes."""

    def __init__(self, tools: Sequence[Tool]) -> None:
        self.functions: dict[str, dict[str, Any]] = {}
        self.origins: dict[str, tuple[str | None, str]] = {}
        self.echo: list[dict[str, Any]] = []
        for tool in tools:
            if isinstance(tool, FunctionTool):
                self._add(None, tool)
                self.echo.append(tool.model_dump())
            elif isinstance(tool, NamespaceTool):
                inner = [one for one in tool.tools if isinstance(one, FunctionTool)]
                for one in inner:
                    self._add(tool.name, one)
                self.echo.append({**tool.model_dump(), "tools": [one.model_dump() for one in inner]})

    def _add(self, namespace: str | None, tool: FunctionTool) -> None:
        name = _called(namespace, tool.name)
        if self.origins.setdefault(name, (namespace, tool.name)) != (namespace, tool.name):
            raise RequestError(f"two tools would be called {name!r}", param="tools")
        self.functions[name] = function(name, tool.description, tool.parameters)


def _called(namespace: str | None, name: str) -> str:
    """What the model calls a function by. Namespaces of MCP servers often end as their names are joined anyway."""
    return f"{namespace.removesuffix('__')}__{name}" if namespace else name


def _call(body: CountRequest, tools: _Tools, params: SamplingParams) -> Call:
    for field in _STORED:
        if getattr(body, field, None) is not None:
            raise RequestError(
                f"{field} is not supported: nothing is stored here, send all turns as input", param=field
            )
    choice, functions = _choice(body.tool_choice or "auto", tools)
    thinks = body.reasoning is None or body.reasoning.effort != "none"
    return checked(
        Call(
            messages=with_documents(_messages(body), body.documents),
            tools=functions,
            tool_choice=choice,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            thinking="adaptive" if thinks else "disabled",
            schema=_schema(body),
            params=params,
        )
    )


def _choice(choice: str | ToolChoice, tools: _Tools) -> tuple[str, list[dict[str, Any]]]:
    """Which tools, in `Call`'s words, and those that there are to choose from."""
    if isinstance(choice, str):
        return choice, list(tools.functions.values())
    if choice.type == "function" and choice.name:
        return _called(choice.namespace, choice.name), list(tools.functions.values())
    if choice.type == "allowed_tools" and choice.mode and choice.tools is not None:
        allowed = {_called(tool.namespace, tool.name) for tool in choice.tools if tool.name}
        return choice.mode, [tool for name, tool in tools.functions.items() if name in allowed]
    raise RequestError(
        "tool_choice must be auto, none, required, a function with its name, or allowed_tools with mode and tools",
        param="tool_choice",
    )


def _schema(body: CountRequest) -> Mapping[str, Any] | Literal[True] | None:
    form = body.text and body.text.format
    if not form or form.type == "text":
        return None
    if form.type == "json_object":
        return True
    if form.json_schema is None:
        raise RequestError("text.format of type json_schema needs a schema", param="text.format.schema")
    return form.json_schema


def _messages(body: CountRequest) -> list[dict[str, Any]]:
    """The conversation in OpenAI's older format; what the assistant did between two others' turns is one message."""
    if body.input == []:
        raise RequestError("input must be a text or hold at least one item", param="input")
    found: list[dict[str, Any]] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    for i, item in enumerate(_items(body.input)):
        match item:
            case CallOutput():
                content = _content(item.output, f"input[{i}].output")
                found.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
            case MessageItem(role="user"):
                found.append({"role": "user", "content": _content(item.content, f"input[{i}].content")})
            case MessageItem(role="system" | "developer"):
                found.append({"role": "system", "content": _content(item.content, f"input[{i}].content")})
            case OtherItem():
                if item.type == "item_reference":
                    raise RequestError("item_reference is not supported: nothing is stored here", param="input")
            case _:
                if not found or found[-1]["role"] != "assistant":
                    found.append({"role": "assistant", "content": ""})
                _add(item, found[-1])
    return found


def _items(given: str | Sequence[Item]) -> Sequence[Item]:
    return [MessageItem(role="user", content=given)] if isinstance(given, str) else given


def _add(item: Item, message: dict[str, Any]) -> None:
    """Add what the assistant thought, said or called to its message."""
    match item:
        case ReasoningItem():
            told = item.content or item.summary or ()
            thoughts = unseal(item.encrypted_content) or "\n".join(part.text for part in told if part.text)
            if thoughts:
                message["reasoning_content"] = message.get("reasoning_content", "") + thoughts
        case MessageItem():
            text = item.content if isinstance(item.content, str) else "".join(map(_text, item.content))
            message["content"] += text
        case FunctionCall():
            call = tool_call(item.call_id, _called(item.namespace, item.name), item.arguments)
            message.setdefault("tool_calls", []).append(call)
        case CustomCall():
            call = tool_call(item.call_id, item.name, {"input": item.input})
            message.setdefault("tool_calls", []).append(call)


def _content(content: str | Sequence[Part], where: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    shown = [media_part(dict(part), f"{where}[{i}]") or _text(part) for i, part in enumerate(content)]
    return content_of(shown, between="\n")


def _text(part: Part) -> str:
    text = part.refusal if part.text is None else part.text
    if text is None:
        raise RequestError(f"a part of type {part.type!r} without text is not understood", param="input")
    return text


def _response(body: ResponsesRequest, model: str, tools: _Tools) -> dict[str, Any]:
    """The response before there is any output: mostly what was asked, with defaults filled in."""
    choice = body.tool_choice or "auto"
    form = body.text.format if body.text else None
    named = {"name": "response"} if form and form.type == "json_schema" else {}
    return {
        "id": f"resp_{uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {
            "effort": body.reasoning and body.reasoning.effort,
            "summary": body.reasoning and body.reasoning.summary,
        },
        "service_tier": "default",
        "store": False,
        "temperature": TEMPERATURE if body.temperature is None else body.temperature,
        "text": {
            "format": {**named, **form.model_dump(by_alias=True, exclude_none=True)} if form else {"type": "text"}
        },
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(exclude_none=True),
        "tools": tools.echo,
        "top_p": TOP_P if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
    }
