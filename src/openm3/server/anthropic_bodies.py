"""What Anthropic's clients get back; for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from openm3.server.extras import Extras


class TextOut(BaseModel):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingOut(BaseModel):
    """Thoughts; where they are left out, the signature holds them, to be sent again with the next turn."""

    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseOut(BaseModel):
    """A call that the model makes."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class OutputDetails(BaseModel):
    """Tokens of the reply that were thought."""

    thinking_tokens: int


class MessageUsage(BaseModel):
    """Tokens; those of the prompt that were read from the cache are counted beside the others."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputDetails
    service_tier: Literal["standard"]


class MessageOut(BaseModel):
    """A whole reply."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextOut | ThinkingOut | ToolUseOut]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage
    openm3: Extras | None = None


class MessageTokens(BaseModel):
    """The tokens of a prompt."""

    input_tokens: int
