"""What OpenAI's clients get back, MiniMax's fields beside OpenAI's own. Fields with a default may be missing."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from openm3.server.extras import Extras


class PromptDetails(BaseModel):
    """Tokens of the prompt that were not computed again."""

    cached_tokens: int


class CompletionDetails(BaseModel):
    """Tokens of the reply that were thought."""

    reasoning_tokens: int


class Usage(BaseModel):
    """Tokens of a reply: a prompt is counted once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    total_characters: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class TokenLogprob(BaseModel):
    """A token's log-probability; `bytes` are its own where it holds a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    """That of a token of the reply, and those of the likeliest at its place."""

    top_logprobs: list[TokenLogprob]


class ChoiceLogprobs(BaseModel):
    """Those of all tokens of the reply in order, thinking and tool calls too."""

    content: list[ChosenLogprob]
    refusal: None


class FunctionCall(BaseModel):
    """A function's name and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class ReasoningPart(BaseModel):
    """Reasoning in MiniMax's form."""

    type: str
    id: str
    format: str
    index: int
    text: str


class AssistantMessage(BaseModel):
    """The model's message."""

    role: Literal["assistant"]
    content: str | None
    name: str
    audio_content: str
    reasoning_content: str = ""
    reasoning_details: list[ReasoningPart] = []
    tool_calls: list[ToolCall] = []
    openm3: Extras | None = None


class ChatChoice(BaseModel):
    """One of the replies asked for."""

    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class MiniMaxStatus(BaseModel):
    """MiniMax's own status; 0 is success."""

    status_code: int
    status_msg: str


class ChatCompletion(BaseModel):
    """A whole reply."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    input_sensitive: bool
    output_sensitive: bool
    base_resp: MiniMaxStatus


class TextLogprobs(BaseModel):
    """Tokens, their log-probabilities, those of the likeliest by their text, and where in the text each begins."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One of the texts asked for; those of the first prompt come first."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(BaseModel):
    """A whole reply."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
