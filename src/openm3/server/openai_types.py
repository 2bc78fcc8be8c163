"""Requests as OpenAI's clients write them, MiniMax's and vLLM's fields beside OpenAI's own.

Unknown fields are let pass. A known one that is null stands for its default; a wrong type or value of it is an error.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    WrapValidator,
)
from pydantic_core import PydanticCustomError
from pydantic_core.core_schema import ValidatorFunctionWrapHandler

from openm3.engine.request import SamplingParams
from openm3.server.errors import RequestError
from openm3.server.media.parts import media_part

MOST_TOKENS = 524_288
"""The longest reply that the contract lets anybody name; a server gives what it can."""

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

_SEED_STEP = 0x9E3779B97F4A7C15


def expected(what: str) -> WrapValidator:
    """One message in place of one for every member of a union."""

    def check(value: object, inner: ValidatorFunctionWrapHandler) -> object:
        try:
            return inner(value)
        except ValidationError:
            raise PydanticCustomError("expected", "must be {what}", {"what": what}) from None

    return WrapValidator(check)


def _encodable(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    json.dumps(value, ensure_ascii=False).encode()
    return value


JsonObject = Annotated[
    dict[str, JsonValue],
    AfterValidator(_encodable),
    expected("a JSON object without NaN, half surrogate pairs and endless nesting"),
]
"""What others compile and write again; texts of a conversation are taken more easily."""


class Fields(BaseModel):
    """An object of a request."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class StreamOptions(Fields):
    """What a stream tells beside the reply. Continuous usage is told only together with the last one."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


StopTexts = Annotated[
    Annotated[str, Field(min_length=1)]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=64)]
    | None,
    expected("a text or a list of at most 64, none of them empty"),
]


class Sampling(Fields):
    """What chats and completions have in common: the model, how to choose tokens, and how to send them."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="0 and -1 leave all tokens in")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: StopTexts = None
    n: int | None = Field(None, ge=1, le=8)
    min_tokens: int | None = Field(None, ge=0, le=MOST_TOKENS)
    ignore_eos: bool | None = None
    service_tier: Literal["auto", "default", "flex", "standard", "priority"] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def choices(self) -> int:
        """How many replies are asked for."""
        return self.n or 1

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def tells_progress(self) -> bool:
        """Whether every chunk of a stream tells the usage so far."""
        return self.tells_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def params(self, choice: int, *, max_tokens: int, top_p: float, logprobs: int | None) -> SamplingParams:
        """How choice number so many is written; each has a seed of its own, the first the request's."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=_or(self.temperature, 1.0),
            top_k=max(self.top_k or 0, 0),
            top_p=_or(self.top_p, top_p),
            min_p=self.min_p or 0.0,
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=None if self.seed is None else _seed(self.seed, choice),
            stop=tuple(stop),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
            priority=int(self.service_tier == "priority"),
        )


_ADDRESS = (
    "an object with `url` (a data URI, `mm_file://FILE_ID` or, where allowed, a web address), `detail` (low, default, "
    "high) and `max_long_side_pixel` (150 to 3584)"
)


class Part(Fields):
    """A part of a message's content."""

    type: str = Field(json_schema_extra={"enum": ["text", "image_url", "video_url", "file", "thinking", "refusal"]})
    text: str | None = None
    image_url: Any = Field(None, description=f"{_ADDRESS}, which may be all there is")
    video_url: Any = Field(None, description=f"{_ADDRESS} and `fps`, 0.2 to 5 frames a second")
    thinking: str | None = None
    refusal: str | None = None


class CalledFunction(Fields):
    """What a replayed tool call calls; arguments are JSON text."""

    name: str
    arguments: Annotated[str | JsonObject | None, expected("JSON text")] = None


class CalledTool(Fields):
    """A tool call that the model made before."""

    id: str | None = None
    function: CalledFunction


class ReasoningDetail(Fields):
    """A part of replayed reasoning."""

    text: str | None = None


class Message(Fields):
    """A message of a conversation. Of an assistant's reasoning any of the three forms is read, or inline thinking."""

    role: str = Field(json_schema_extra={"enum": ["system", "developer", "root", "user", "assistant", "tool"]})
    content: Annotated[
        str | Annotated[list[str | Part], Field(fail_fast=True)] | None, expected("text or a list of content parts")
    ] = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    reasoning_details: list[ReasoningDetail] | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | None = None

    def plain(self, where: str) -> dict[str, Any]:
        """As `Call.messages` has it. Raises RequestError for content that is no text."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if isinstance(self.content, list):
            message["content"] = [_plain_part(part, f"{where}.content[{i}]") for i, part in enumerate(self.content)]
        message |= {key: value for key in ("name", "tool_call_id") if (value := getattr(self, key)) is not None}
        if self.role != "assistant":
            return message
        details = "".join(detail.text or "" for detail in self.reasoning_details or ())
        if thoughts := self.reasoning_content or self.reasoning or details:
            message["reasoning_content"] = thoughts
        else:
            _take_thinking(message)
        if self.tool_calls:
            message["tool_calls"] = [_plain_call(call) for call in self.tool_calls]
        return message


class Function(Fields):
    """A function that the model may call."""

    name: str = Field(pattern=r'^[^<>"\r\n]{1,128}$')
    description: str | None = None
    parameters: JsonObject | None = None

    def plain(self) -> dict[str, Any]:
        """As `Call.tools` has it."""
        fields = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": {key: value for key, value in fields.items() if value is not None}}


class Tool(Fields):
    """A tool. Only functions are offered to the model."""

    type: str = "function"
    function: Function | None = None


class NamedFunction(Fields):
    """A function by its name."""

    name: str


class NamedTool(Fields):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Fields):
    """A schema for the reply."""

    name: str | None = None
    schema_: JsonObject = Field(alias="schema")


class ResponseFormat(Fields):
    """What the reply must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ThinkingOptions(Fields):
    """Whether to think, and how long at most."""

    type: Literal["disabled", "adaptive", "enabled"]
    budget_tokens: int | None = Field(None, ge=1)


class Reasoning(Fields):
    """Whether to reason, as some gateways write it."""

    enabled: bool | None = None
    effort: Effort | None = None


class TemplateOptions(Fields):
    """Options of the chat template, as vLLM takes them."""

    thinking_mode: Literal["disabled", "adaptive", "enabled"] | None = None
    enable_thinking: bool | None = None


def _plain_part(part: str | Part, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if (shown := media_part(dict(part), where)) is not None:
        return shown
    kind = "thinking" if part.type == "thinking" else "text"
    text = part.refusal if part.type == "refusal" else getattr(part, kind)
    if part.type not in ("text", "thinking", "refusal"):
        what = "the type of a part must be text, image_url or video_url"
        raise RequestError(f"{where}: {what}, not {part.type!r}", param=where)
    if text is None:
        raise RequestError(f"{where}: a part of type {part.type} must have its text", param=where)
    return {"type": kind, kind: text}


def _plain_call(call: CalledTool) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call.function.arguments or "{}"}
    return {"id": call.id, "type": "function", "function": function}


def _take_thinking(message: dict[str, Any]) -> None:
    """Make inline thinking, as replies without `reasoning_split` hold it, reasoning again."""
    content = message["content"]
    first = content[0] if isinstance(content, list) and content else {"type": "text", "text": content}
    text = (first.get("text") or "").lstrip()
    if not text.startswith("<think>") or "</think>" not in text:
        return
    thoughts, _, rest = text.removeprefix("<think>").partition("</think>")
    if thoughts:
        message["reasoning_content"] = thoughts
    message["content"] = [{"type": "text", "text": rest}, *content[1:]] if isinstance(content, list) else rest


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _seed(seed: int, choice: int) -> int:
    """A seed for each choice, far from those that people write."""
    return (seed + choice * _SEED_STEP + 2**63) % 2**64 - 2**63
