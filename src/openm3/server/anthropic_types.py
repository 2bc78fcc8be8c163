"""What Anthropic's clients may send to /v1/messages. Blocks and fields that are not named here are let through."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from openm3.server.parts import Documents
from openm3.server.protocol import Open, TextOr


class TextBlock(Open):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(Open):
    """The assistant's thoughts of an earlier turn, as they were sent out. Signatures are not verified."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(Open):
    """A call that the assistant made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class OtherBlock(Open):
    """Any other block: media, what servers' own tools leave behind, or a mistake."""

    type: str


class ToolResultBlock(Open):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: TextOr[ResultBlock] | None = None
    is_error: bool | None = None


_NAMED = ("text", "thinking", "tool_use", "tool_result")


def _kind(block: object) -> str:
    kind = block.get("type") if isinstance(block, dict) else getattr(block, "type", None)
    return kind if kind in _NAMED else "other"


def _result_kind(block: object) -> str:
    return "text" if _kind(block) == "text" else "other"


ResultBlock = Annotated[
    Annotated[TextBlock, Tag("text")] | Annotated[OtherBlock, Tag("other")], Discriminator(_result_kind)
]
Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")]
    | Annotated[OtherBlock, Tag("other")],
    Discriminator(_kind),
]


class Message(Open):
    """One turn, or a part of one: neighbours of one role count as one turn."""

    role: Literal["user", "assistant", "system"]
    content: TextOr[Block]


class Tool(Open):
    """A tool; those whose type is neither missing nor "custom" run elsewhere and are passed over."""

    type: str | None = None
    name: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None


class ToolChoice(Open):
    """Which tools the reply is to use."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(Open):
    """How the reply is thought over. Budgets of any size are kept; "omitted" leaves the thoughts in the signature."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = Field(default=None, ge=1)
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Open):
    """The JSON schema that the reply's text is to fit."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Open):
    """How the reply is written; `effort` is accepted and changes nothing."""

    format: OutputFormat | None = None


class CountRequest(Open):
    """A conversation. Without `thinking` the model itself decides whether to think, as in MiniMax's own API."""

    model: str
    messages: list[Message] = Field(min_length=1)
    system: TextOr[ResultBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    documents: Documents = None


class MessagesRequest(CountRequest):
    """A conversation and how its next message is to be written. A `thread`, of which only the end comes, is refused."""

    max_tokens: int = Field(ge=0, description="0 reads the prompt into the cache, and replies nothing")
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    stop_sequences: list[Annotated[str, Field(min_length=1)]] | None = None
    thread: dict[str, Any] | None = None
    evidence: bool | None = Field(None, description="quote the passages that the answer was drawn from")
    xray: bool | None = Field(None, description="tell which blocks each token attended to")


ToolResultBlock.model_rebuild()
