"""POST /v1/chat/completions: OpenAI's chats with MiniMax's fields, thinking inline or split, tools, several choices."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from secrets import token_hex
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from openm3.engine.request import Logprob
from openm3.server.calls import Call, Event, Finished, Looked, Scores, Serves
from openm3.server.errors import RequestError
from openm3.server.extras import extra, joined
from openm3.server.openai_bodies import ChatCompletion
from openm3.server.openai_reply import Reply, finish_reason, finite
from openm3.server.openai_types import (
    MOST_TOKENS,
    Effort,
    Message,
    NamedTool,
    Reasoning,
    ResponseFormat,
    Sampling,
    TemplateOptions,
    ThinkingOptions,
    Tool,
    expected,
)
from openm3.server.parts import Documents, with_documents
from openm3.server.stream import EVENT_STREAM
from openm3.tokens import Content, Thinking, ToolArguments, ToolStart

TOP_P = 0.95

Mode = Literal["enabled", "disabled", "adaptive"]


class ChatRequest(Sampling):
    """A conversation to go on with.

    Thinking is said in several ways; of those given the first counts: `thinking`, `chat_template_kwargs`, `reasoning`,
    `reasoning_effort`. Without `reasoning_split` it stands in the content, between `<think>` and `</think>`; with it in
    `reasoning_content` and `reasoning_details`, which in a stream hold what is new and not all so far.
    """

    messages: list[Message] = Field(min_length=1)
    thinking: ThinkingOptions | None = None
    reasoning: Annotated[
        Literal["disabled", "adaptive", "enabled"] | Reasoning | None,
        expected('"disabled", "adaptive", "enabled" or an object with enabled or effort'),
    ] = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: TemplateOptions | None = None
    reasoning_split: bool | None = None
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS, description="an older name of max_completion_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Annotated[
        Literal["auto", "none", "required"] | NamedTool | None,
        expected('"auto", "none", "required" or {"type": "function", "function": {"name": ...}}'),
    ] = None
    parallel_tool_calls: bool | None = None
    documents: Documents = None
    evidence: bool | None = Field(None, description="quote the passages that the answer was drawn from")
    xray: bool | None = Field(None, description="tell which blocks each token attended to")

    def calls(self, longest: int) -> list[Call]:
        """A call for each choice, none longer than `longest`. Raises RequestError or PromptError for what is wrong."""
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
        messages = [message.plain(f"messages[{i}]") for i, message in enumerate(self.messages)]
        messages = with_documents(messages, self.documents)
        tools = self._tools()
        max_tokens = min(self.max_completion_tokens or self.max_tokens or longest, longest)
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return [
            Call(
                messages=messages,
                tools=tools,
                tool_choice=self._tool_choice(tools),
                parallel_tool_calls=self.parallel_tool_calls is not False,
                thinking=self._mode(),
                thinking_budget=self.thinking.budget_tokens if self.thinking else None,
                schema=self._schema(),
                params=self.params(choice, max_tokens=max_tokens, top_p=TOP_P, logprobs=logprobs),
                xray=bool(self.xray),
                evidence=bool(self.evidence),
                progress=bool(self.stream) and self.tells_progress,
            )
            for choice in range(self.choices)
        ]

    def _mode(self) -> Mode:
        options, reasoning = self.chat_template_kwargs, self.reasoning
        if self.thinking:
            return self.thinking.type
        if options and options.thinking_mode:
            return options.thinking_mode
        if options and options.enable_thinking is not None:
            return "enabled" if options.enable_thinking else "disabled"
        if isinstance(reasoning, str):
            return reasoning
        if reasoning and reasoning.enabled is not None:
            return "enabled" if reasoning.enabled else "disabled"
        effort = (reasoning and reasoning.effort) or self.reasoning_effort
        return "disabled" if effort == "none" else "adaptive"

    def _tools(self) -> list[dict[str, Any]]:
        functions = [(i, tool.function) for i, tool in enumerate(self.tools or ()) if tool.type == "function"]
        for i, function in functions:
            if function is None:
                raise RequestError(
                    f"tools[{i}].function is missing in a tool of that type", param=f"tools[{i}].function"
                )
        return [function.plain() for _, function in functions if function is not None]

    def _tool_choice(self, tools: Sequence[Mapping[str, Any]]) -> str:
        choice = self.tool_choice or "auto"
        names = [tool["function"]["name"] for tool in tools]
        if isinstance(choice, NamedTool):
            name = choice.function.name
            if name not in names:
                raise RequestError(f"tool_choice names {name!r}, which is none of the tools", param="tool_choice")
            if name in ("auto", "none", "required"):
                raise RequestError(f"a tool of the name {name!r} cannot be chosen by it", param="tool_choice")
            return name
        if choice == "required" and not names:
            raise RequestError("tool_choice is required, but there are no tools to call", param="tool_choice")
        return choice

    def _schema(self) -> Mapping[str, Any] | Literal[True] | None:
        form = self.response_format
        if form is None or form.type == "text":
            return None
        if form.type == "json_object":
            return True
        if form.json_schema is None:
            raise RequestError("response_format of type json_schema needs json_schema", param="response_format")
        return form.json_schema.schema_


class ChatReply(Reply):
    """A chat's reply."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(
        self, body: ChatRequest, model: str, streams: Sequence[AsyncGenerator[Event]], service: Serves
    ) -> None:
        super().__init__(body, model, streams)
        self._service = service
        self._writers = [_Writer(bool(body.reasoning_split)) for _ in streams]
        self._scored = bool(body.logprobs)
        self._scores: list[list[Logprob]] = [[] for _ in streams]

    def envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """With MiniMax's own fields where choices end."""
        body = super().envelope(kind, choices)
        if any(choice["finish_reason"] for choice in choices):
            status = {"status_code": 0, "status_msg": ""}
            body |= {"input_sensitive": False, "output_sensitive": False, "base_resp": status}
        return body

    def pieces(self, number: int, event: Event) -> Iterator[dict[str, Any]]:
        """Deltas; the last of an event's bears the log-probabilities, and the very last how the choice ended."""
        if isinstance(event, Scores):
            self._scores[number] += event.tokens
        deltas = self._writers[number].deltas(event)
        for i, delta in enumerate(deltas, 1):
            piece = {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}
            if i == len(deltas):
                piece["logprobs"] = self._taken_logprobs(number)
                piece["finish_reason"] = finish_reason(event) if isinstance(event, Finished) else None
            yield piece

    def joined(self, pieces: list[dict[str, Any]]) -> dict[str, Any]:
        """A choice whose message is the sum of its deltas."""
        deltas = [piece["delta"] for piece in pieces]
        tool_calls = _joined_calls(deltas)
        content = _text(deltas, "content") or (None if tool_calls else "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "name": self.model, "audio_content": ""}
        if thoughts := _text(deltas, "reasoning_content"):
            message |= _thought(thoughts)
        if tool_calls:
            message["tool_calls"] = tool_calls
        if extras := [delta["openm3"] for delta in deltas if "openm3" in delta]:
            message["openm3"] = joined(extras)
        scores = [one for piece in pieces if piece["logprobs"] for one in piece["logprobs"]["content"]]
        return {
            "index": pieces[-1]["index"],
            "message": message,
            "logprobs": {"content": scores, "refusal": None} if self._scored else None,
            "finish_reason": pieces[-1]["finish_reason"],
        }

    def _taken_logprobs(self, number: int) -> dict[str, Any] | None:
        scores, self._scores[number] = self._scores[number], []
        content = [
            {**self._entry(score.id, score.logprob), "top_logprobs": [self._entry(*likely) for likely in score.top]}
            for score in scores
        ]
        return {"content": content, "refusal": None} if content else None

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._service.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(data)}


class _Writer:
    """A choice's events as deltas. Inline thinking is closed in any case, even where the reply ends in it."""

    def __init__(self, split: bool) -> None:
        self._split = split
        self._begun = self._inside = self._thought = False

    def deltas(self, event: Event) -> list[dict[str, Any]]:
        deltas = list(self._deltas(event))
        if deltas and not self._begun:
            self._begun = True
            deltas.insert(0, {"role": "assistant", "content": ""})
        return deltas

    def _deltas(self, event: Event) -> Iterator[dict[str, Any]]:
        match event:
            case Thinking(text) if text and self._split:
                yield _thought(text, goes_on=self._thought)
                self._thought = True
            case Thinking(text) if text:
                yield {"content": text if self._inside else f"<think>{text}"}
                self._inside = True
            case Content(text) if text:
                yield {"content": self._closing() + text}
            case ToolStart(index, name):
                yield from self._closed()
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": f"call_{token_hex(12)}", "type": "function", "function": function}
                yield {"tool_calls": [call]}
            case ToolArguments(index, text) if text:
                yield {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
            case Looked():
                yield {"openm3": extra(event)}
            case Finished():
                yield from self._closed()
                found = extra(event)
                yield {"openm3": found} if found else {}

    def _closing(self) -> str:
        was_inside, self._inside = self._inside, False
        return "</think>" if was_inside else ""

    def _closed(self) -> Iterator[dict[str, Any]]:
        if closing := self._closing():
            yield {"content": closing}


def _thought(text: str, goes_on: bool = False) -> dict[str, Any]:
    """Reasoning in both forms. What stays the same is said once: clients add the deltas' texts up."""
    detail: dict[str, Any] = {"type": "reasoning.text", "index": 0, "text": text}
    if not goes_on:
        detail |= {"id": "reasoning-text-1", "format": "MiniMax-response-v1"}
    return {"reasoning_content": text, "reasoning_details": [detail]}


def _text(deltas: list[dict[str, Any]], key: str) -> str:
    return "".join(delta.get(key, "") for delta in deltas)


def _joined_calls(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    calls: dict[int, dict[str, Any]] = {}
    for part in (part for delta in deltas for part in delta.get("tool_calls", ())):
        if "id" in part:
            calls[part["index"]] = {key: part[key] for key in ("id", "type")} | {"function": dict(part["function"])}
        else:
            calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    return list(calls.values())


def routes(service: Serves) -> APIRouter:
    """The route of chats."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        response_model_exclude_unset=True,
        responses={200: EVENT_STREAM},
        tags=["OpenAI"],
    )
    async def create_chat_completion(body: ChatRequest, request: Request) -> Any:
        """Go on with a conversation, whole or as a stream of chunks that ends with `[DONE]`."""
        model = service.check_model(body.model)
        streams = [service.stream(call) for call in body.calls(service.max_tokens)]
        return await ChatReply(body, model, streams, service).answer(request)

    return router
