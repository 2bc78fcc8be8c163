"""What clients of OpenAI's responses get back; for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

from openm3.server.extras import Extras

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class SummaryPart(BaseModel):
    """Thoughts in plain text."""

    type: Literal["summary_text"]
    text: str


class ReasoningOut(BaseModel):
    """Thoughts, sealed: to be sent again with the next turn."""

    id: str
    type: Literal["reasoning"]
    summary: list[SummaryPart]
    encrypted_content: str


class OutputText(BaseModel):
    """Text."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(BaseModel):
    """What the model says."""

    id: str
    type: Literal["message"]
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class FunctionCallOut(BaseModel):
    """A call that the model makes; `namespace` where its tool has one."""

    id: str
    type: Literal["function_call"]
    status: Status
    call_id: str
    name: str
    namespace: str | None = None
    arguments: str


class InputDetails(BaseModel):
    """Tokens of the prompt that were not computed again."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(BaseModel):
    """Tokens of the reply that were thought."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(BaseModel):
    """Why a response is cut off."""

    reason: Literal["max_output_tokens"]


class ResponseOut(BaseModel):
    """A whole response; beside these it repeats what was asked."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[ReasoningOut | OutputMessage | FunctionCallOut]
    parallel_tool_calls: bool
    temperature: float
    top_p: float
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    text: dict[str, Any]
    usage: ResponseUsage
    openm3: Extras | None = None


class ResponseTokens(BaseModel):
    """The tokens of a prompt."""

    object: Literal["response.input_tokens"]
    input_tokens: int
