"""What every protocol asks of the model, and what comes back, in words of no protocol.

A protocol's module turns a request's body into a `Call` and a stream of `Event` into its own chunks or its own whole
reply. `service.Service` runs calls. Thinking, content and tool calls come apart here already.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from openm3.engine.request import Logprob, SamplingParams, Timings, Usage
from openm3.tokens import Content, Media, Run, StreamDecoder, Thinking, ToolArguments, ToolEnd, ToolStart


@dataclass(frozen=True, kw_only=True)
class Call:
    """One reply that is asked for: a conversation, or a bare prompt (text or token ids) whose reply is all content.

    `messages` and `tools` are in OpenAI's format (`reasoning_content`, `tool_calls` and role `tool` included); pictures
    and videos among their parts are as `media.parts` makes them.
    `tool_choice` is "auto", "none", "required" or the name of one tool. `schema` is None for free text, True for any
    JSON object, or a JSON schema. At most `thinking_budget` tokens are thought, None for as many as it takes. `echo`
    has the log-probabilities of the prompt's own tokens computed as well (`params.logprobs` says how many).
    `xray` reports which blocks each token attended to. `evidence` finds the prompt's passages behind the answer.
    `progress` counts the reply's tokens as they come.
    """

    messages: Sequence[Mapping[str, Any]] | None = None
    prompt: str | Sequence[int] | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    thinking: Literal["enabled", "disabled", "adaptive"] = "adaptive"
    thinking_budget: int | None = None
    schema: Mapping[str, Any] | Literal[True] | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    echo: bool = False
    xray: bool = False
    evidence: bool = False
    progress: bool = False


@dataclass(frozen=True)
class Prompt:
    """What the model reads: token ids, the pictures and videos in it, in order, and where their tokens stand."""

    ids: Sequence[int]
    media: Sequence[Media] = ()
    runs: Sequence[Run] = ()


@dataclass(frozen=True)
class Started:
    """The call is let in, its prompt so long; the first event of every call."""

    prompt_tokens: int


@dataclass(frozen=True)
class Progress:
    """The reply's tokens so far, those of the text that comes next among them; only where `Call.progress` asks."""

    completion_tokens: int


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the tokens whose text the next events bring; only where they were asked for."""

    tokens: Sequence[Logprob]


@dataclass(frozen=True)
class PromptScores:
    """Those of a prompt's own tokens: the first has none before it, so its value is NaN. Before all text."""

    tokens: Sequence[Logprob]


@dataclass(frozen=True)
class Looked:
    """Which blocks some tokens attended to: `blocks[token][layer][group]`, ascending; dense layers are empty."""

    ids: Sequence[int]
    blocks: Sequence[Sequence[Sequence[Sequence[int]]]]


@dataclass(frozen=True)
class Passage:
    """A part of the prompt that the answer was drawn from, with its share of the attention to all that may be quoted.

    The `source` is a document's name, None for other texts; `lines` are its first and last one there, from 1.
    """

    text: str
    share: float
    source: str | None = None
    lines: tuple[int, int] | None = None


@dataclass(frozen=True)
class Evidence:
    """Where an answer came from: passages, most attended first.

    `missing` says why there are none, None if there are. `attended_share` is the part of the visible context that was
    read, None where no token of an answer was. `num_tokens` of the prompt are of the texts that are quoted.
    """

    passages: Sequence[Passage]
    missing: str | None
    attended_share: float | None
    num_tokens: int


Reason = Literal["stop", "length", "tool_calls", "timeout", "abort", "error"]


@dataclass(frozen=True)
class Finished:
    """The last event of every call. `stop` is the stop string that ended it, if one did.

    `usage` counts as the engine does; `thinking_tokens` are those of `usage.completion_tokens` that were thought.
    `evidence` and `timings` are there where `Call.evidence` asks.
    """

    reason: Reason
    usage: Usage
    thinking_tokens: int = 0
    stop: str | None = None
    evidence: Evidence | None = None
    timings: Timings | None = None


Event = (
    Started
    | PromptScores
    | Progress
    | Scores
    | Looked
    | Thinking
    | Content
    | ToolStart
    | ToolArguments
    | ToolEnd
    | Finished
)
"""In order: `Started`; any of the others; `Finished`. Texts are coalesced: 5 to 200 characters, the first at once."""


class Serves(Protocol):
    """What protocols need of the service behind them; `service.Service` is it."""

    @property
    def model_names(self) -> Sequence[str]:
        """Names that requests may call the model by, its own first."""

    @property
    def max_tokens(self) -> int:
        """The longest reply anybody may ask for."""

    def check_model(self, name: object) -> str:
        """The name a reply is to bear. Raises RequestError for a model that is not served here."""

    def stream(self, call: Call) -> AsyncGenerator[Event]:
        """Run a call; closing the iterator ends it within one step of the engine. Raises as `errors.refusal` knows."""

    async def count(self, call: Call) -> int:
        """The tokens of a call's prompt."""

    def token_bytes(self, id: int) -> bytes:
        """A token's own text as UTF-8, of which it may hold a part; nothing for ids that stand for no token."""

    async def prompt(self, call: Call) -> Prompt:
        """A call's prompt, as `stream` would have the model read it. Raises as `count` does."""

    def decoder(self) -> StreamDecoder:
        """A fresh decoder of the model's ids, one at a time."""
