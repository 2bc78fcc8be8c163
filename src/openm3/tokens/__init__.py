"""Text to ids and back: tokenizer, prompt grammar, and the router that splits what the model writes."""

from openm3.tokens.chat import TEMPLATE, THINKING, render_tool_call
from openm3.tokens.media import Media, Run, expand, runs
from openm3.tokens.router import (
    Content,
    Event,
    StreamRouter,
    Thinking,
    ToolArguments,
    ToolCall,
    ToolEnd,
    ToolStart,
    parse_tool_calls,
)
from openm3.tokens.tokenizer import SPECIALS, StreamDecoder, Tokenizer, train_bpe

__all__ = [
    "SPECIALS",
    "TEMPLATE",
    "THINKING",
    "Content",
    "Event",
    "Media",
    "Run",
    "StreamDecoder",
    "StreamRouter",
    "Thinking",
    "Tokenizer",
    "ToolArguments",
    "ToolCall",
    "ToolEnd",
    "ToolStart",
    "expand",
    "parse_tool_calls",
    "render_tool_call",
    "runs",
    "train_bpe",
]
