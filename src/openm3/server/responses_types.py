"""What OpenAI's clients may send to /v1/responses. Items, tools and fields that are not named here are let through."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from openm3.server.parts import Documents
from openm3.server.protocol import Open, TextOr


class Part(Open):
    """A part of a message, of thoughts or of what a call gave; `text` or `refusal` holds what it says."""

    type: str
    text: str | None = None
    refusal: str | None = None


class MessageItem(Open):
    """What somebody said."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: TextOr[Part]


class ReasoningItem(Open):
    """The assistant's thoughts of an earlier turn; those sealed here count first."""

    type: Literal["reasoning"]
    summary: list[Part] | None = None
    content: list[Part] | None = None
    encrypted_content: str | None = None


class FunctionCall(Open):
    """A call that the assistant made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


class CustomCall(Open):
    """A call of a tool that takes free text, made on another server: such tools are passed over here."""

    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    input: str


class CallOutput(Open):
    """What a call gave."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: TextOr[Part]


class OtherItem(Open):
    """Any other item; passed over, except a reference to one that is stored."""

    type: str


_NAMED = ("message", "reasoning", "function_call", "custom_tool_call", "function_call_output")


def _item_kind(item: object) -> str:
    fields = item if isinstance(item, dict) else vars(item) if isinstance(item, Open) else {}
    kind = fields.get("type") or ("message" if "role" in fields else None)
    if kind == "custom_tool_call_output":
        return "function_call_output"
    return kind if kind in _NAMED else "other"


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[CustomCall, Tag("custom_tool_call")]
    | Annotated[CallOutput, Tag("function_call_output")]
    | Annotated[OtherItem, Tag("other")],
    Discriminator(_item_kind),
]


class FunctionTool(Open):
    """A function that the client runs."""

    type: Literal["function"]
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class OtherTool(Open):
    """A tool that runs elsewhere, or that takes free text: passed over."""

    type: str


def _tool_kind(tool: object) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return kind if kind in ("function", "namespace") else "other"


def _inner_tool_kind(tool: object) -> str:
    return "function" if _tool_kind(tool) == "function" else "other"


class NamespaceTool(Open):
    """Functions of one origin; their names need to differ only among themselves."""

    type: Literal["namespace"]
    name: str = Field(min_length=1)
    description: str = ""
    tools: list[
        Annotated[
            Annotated[FunctionTool, Tag("function")] | Annotated[OtherTool, Tag("other")],
            Discriminator(_inner_tool_kind),
        ]
    ]


Tool = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[NamespaceTool, Tag("namespace")]
    | Annotated[OtherTool, Tag("other")],
    Discriminator(_tool_kind),
]


class ToolChoice(Open):
    """One function by its name, or `allowed_tools` with several."""

    type: str
    name: str | None = None
    namespace: str | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[ToolChoice] | None = None


class Reasoning(Open):
    """Whether to think, and whether to tell. Any `effort` but "none" lets the model think as long as it takes."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class TextFormat(Open):
    """The form of the reply's text."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")


class TextConfig(Open):
    """How the reply's text is written."""

    format: TextFormat | None = None


class CountRequest(Open):
    """A conversation. Without `reasoning` the model itself decides whether to think."""

    model: str | None = None
    input: TextOr[Item]
    instructions: str | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    previous_response_id: str | None = None
    documents: Documents = None


class ResponsesRequest(CountRequest):
    """A conversation and how the reply to it is to be written. `store` is accepted, and nothing is stored."""

    model: str
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    stream: bool | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    evidence: bool | None = Field(None, description="quote the passages that the answer was drawn from")
    xray: bool | None = Field(None, description="tell which blocks each token attended to")
