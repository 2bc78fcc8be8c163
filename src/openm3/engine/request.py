"""One request: what was asked, how far it is, and what comes back. Plain data; knows no tensors."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from openm3.engine.constraint import Constraint
from openm3.errors import PromptError
from openm3.tokens.media import Media, Run

FinishReason = Literal["stop", "length", "abort", "timeout", "error"]
"""Why a reply ended: stop token or string, longest length, client, time, or that no token could be drawn.

The last comes of logits that are no numbers, and of a constraint that fails or allows nothing.
"""


_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a reply is written. Greedy by default, up to 128 tokens, ended by the model's end token.

    `temperature` 0 is greedy; `top_k` 0 keeps all tokens, `top_p` the fewest that hold this share, `min_p` those at
    least this likely relative to the likeliest. Penalties as in OpenAI's API; `repetition_penalty` divides the logits
    of tokens seen. The draw of each token depends on `seed` and its place alone; without a seed each request gets one.
    `stop` are strings that end the reply and are not part of it, `stop_ids` tokens likewise, `ignore_eos` goes on after
    the model's end token. `min_tokens` come before any end token. `logprobs` asks for so many likeliest tokens at each
    place (0: the chosen one alone), `prompt_logprobs` for the same at the places of the prompt, none of which is then
    read from the cache; only with it may `max_tokens` be 0. `trace` asks which blocks each token was drawn from,
    `attention` what the reply attended to; with `attention_after` what it attended to after that token, if it has it.
    Requests of a larger `priority` go first, as if they had come 10 seconds a step earlier. After `timeout` seconds the
    reply ends as it is. Raises PromptError for impossible values.
    """

    max_tokens: int = 128
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    trace: bool = False
    attention: bool = False
    attention_after: int | None = None
    priority: int = 0
    timeout: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        self._check_types()
        for name, ok, allowed in (
            ("max_tokens", self.max_tokens >= (self.prompt_logprobs is None), "at least 1"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"between 0 and max_tokens {self.max_tokens}"),
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 <= self.top_p <= 1, "between 0 and 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "between 0.01 and 100"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**63, "a whole number of 64 bits"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "between 0 and 20"),
            ("prompt_logprobs", self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 20, "between 0 and 20"),
            ("timeout", self.timeout is None or self.timeout > 0, "more than 0 seconds"),
        ):
            if not ok:
                raise PromptError(f"{name} must be {allowed}, not {getattr(self, name)!r}")

    def _check_types(self) -> None:
        """Whatever gets through here is compared and computed with in steps that others have a part in."""
        whole = [(name, getattr(self, name)) for name in ("max_tokens", "min_tokens", "top_k", "priority")]
        optional = ("seed", "logprobs", "prompt_logprobs", "attention_after")
        whole += [(name, value) for name in optional if (value := getattr(self, name)) is not None]
        numbers = [(name, getattr(self, name)) for name in _NUMBERS]
        numbers += [("timeout", self.timeout)] if self.timeout is not None else []
        for kind, allowed, values in (("a whole number", int, whole), ("a number", int | float, numbers)):
            for name, value in values:
                if not isinstance(value, allowed) or isinstance(value, bool):
                    raise PromptError(f"{name} must be {kind}, not {value!r}")
        for name, text, item in (("stop", "strings", str), ("stop_ids", "token ids", int)):
            values = getattr(self, name)
            if not isinstance(values, Sequence) or not all(isinstance(value, item) for value in values):
                raise PromptError(f"{name} must be {text}, not {values!r}")
        for name in ("trace", "attention"):
            if not isinstance(getattr(self, name), bool):
                raise PromptError(f"{name} must be true or false, not {getattr(self, name)!r}")

    @property
    def plain(self) -> bool:
        """Greedy and unpenalised: the token is the largest logit's."""
        return self.temperature == 0 and not self.penalises

    @property
    def penalises(self) -> bool:
        """Whether tokens seen before change the logits."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompt, those of them that were not computed again, and tokens of the reply.

    `drafted` tokens were proposed ahead, and `accepted` of them were the model's own.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds: waiting to be taken in, reading the prompt, and in all; `between` the tokens after the first."""

    queue: float
    prefill: float
    total: float
    between: tuple[float, ...] = ()

    @property
    def first_token(self) -> float:
        """From arrival to the first token."""
        return self.queue + self.prefill


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability, and those of the likeliest tokens at its place, likeliest first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Attention:
    """What drawn tokens attended to, as `openm3.model.witness` adds it up.

    `mass_S` is the squared attention paid to each token of the prompt, `share` the part of the visible context that was
    read, None where no token counts.
    """

    mass_S: NDArray[np.float64]
    share: float | None


@dataclass(frozen=True)
class Completion:
    """A whole reply. `ids` are its tokens, the end token or the tokens of a stop string not among them.

    `prompt_logprobs` are one for each token of the prompt; the first has none before it, so its value is NaN. Like
    `attention` they are there where they were asked for.
    """

    ids: list[int]
    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    logprobs: list[Logprob] | None = None
    prompt_logprobs: list[Logprob] | None = None
    attention: Attention | None = None


@dataclass(frozen=True)
class Delta:
    """What a step added to a reply: tokens, and the text that is certain by now; the last has the whole reply.

    Where asked for, there are `logprobs` and `blocks` for each of the tokens: the logical blocks that the place it was
    drawn from selected, int32 [layers, groups, K], ascending, -1 at the tail, -1 alone in dense layers. The first delta
    has the `prompt_logprobs`.
    """

    ids: list[int]
    text: str
    finish_reason: FinishReason | None = None
    completion: Completion | None = None
    logprobs: list[Logprob] | None = None
    blocks: list[NDArray[np.int32]] | None = None
    prompt_logprobs: list[Logprob] | None = None


@dataclass(frozen=True)
class Placed:
    """Placeholders in a prompt: `count` from position `first` on.

    They stand for tokens from `offset` on of one row of the grids of a picture or video.
    """

    media: Media
    row: int
    first: int
    offset: int
    count: int

    @property
    def key(self) -> tuple[bytes, int]:
        """What the row's content is."""
        return self.media.digest, self.row

    def within(self, first: int, stop: int) -> range:
        """Its positions from `first` up to `stop`."""
        return range(max(first, self.first), min(stop, self.first + self.count))


def placed(media: Sequence[Media], found: Sequence[Run]) -> list[Placed]:
    """Runs of placeholders, cut at the rows of their pictures' and videos' grids, ascending."""
    parts = []
    for run in found:
        start = 0
        for row, (t, h, w) in enumerate(media[run.media].grids):
            size = t * h * w // 4
            first, stop = max(start, run.offset), min(start + size, run.offset + run.count)
            if first < stop:
                parts.append(Placed(media[run.media], row, run.first + first - run.offset, first - start, stop - first))
            start += size
    return parts


def named(ids: Sequence[int], media: Sequence[Placed], first: int = 0) -> list[int]:
    """Tokens that stand in a prompt from position `first` on, by what their keys depend on.

    A placeholder stands for its part of a picture or video: a number below zero, drawn from the content's hash.
    """
    names = list(ids)
    for part in media:
        for i in part.within(first, first + len(ids)):
            token = struct.pack(">qq", part.row, i - part.first + part.offset)
            digest = hashlib.blake2b(part.media.digest + token, digest_size=8).digest()
            names[i - first] = -1 - (int.from_bytes(digest, "big") >> 1)
    return names


@dataclass(eq=False)
class Request:
    """A request on its way. Its keys for `ids[:computed]` are in `pages`; the scheduler alone changes those.

    `ids` are the prompt's and the reply's tokens so far, `hashes` those of their full pages as far as they are known.
    `prompt_logprobs` grow from the first token's NaN on if they are asked for, as `mass_S` and `shares` do, what
    `Attention` is made of. `key` orders requests: the smallest goes
    first.
    """

    id: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    arrived: float
    constraint: Constraint | None = None
    ids: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    cached: int = 0
    preempted: int = 0
    drafted: int = 0
    accepted: int = 0
    media: Sequence[Placed] = ()
    begun: float | None = None
    token_times: list[float] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    mass_S: NDArray[np.float64] | None = None
    shares: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)
        if self.params.attention:
            self.mass_S = np.zeros(len(self.prompt))
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [Logprob(self.prompt[0], math.nan)]

    @property
    def key(self) -> tuple[float, int]:
        return self.arrived - 10.0 * self.params.priority, self.id

    @property
    def output(self) -> list[int]:
        """The reply's tokens so far."""
        return self.ids[len(self.prompt) :]

    def names(self, first: int, stop: int) -> list[int]:
        """The tokens from `first` up to `stop` by what their keys depend on; see `named`."""
        return named(self.ids[first:stop], self.media, first)

    def attend(self, seen: Attention, token: int) -> None:
        """Add what was attended to when `token` was drawn."""
        assert self.mass_S is not None and seen.share is not None
        self.mass_S += seen.mass_S
        self.shares.append(seen.share)
        if token == self.params.attention_after:
            self.mass_S[:] = 0
            self.shares.clear()

    @property
    def attention(self) -> Attention | None:
        """What the reply attended to so far; None where nobody asks."""
        if self.mass_S is None:
            return None
        return Attention(self.mass_S, sum(self.shares) / len(self.shares) if self.shares else None)

    def sees(self, first: int, stop: int) -> bool:
        """Whether a picture or video is among its tokens from `first` up to `stop`."""
        return bool(self.media) and first < self.media[-1].first + self.media[-1].count and stop > self.media[0].first

    @property
    def num_output(self) -> int:
        return len(self.ids) - len(self.prompt)

    @property
    def remaining(self) -> int:
        """Tokens whose keys are still to be computed; 1 for a request that writes."""
        return len(self.ids) - self.computed

    @property
    def reusable(self) -> int:
        """Tokens that need not be computed if their keys are found: those before the first whose logits are needed."""
        scored = len(self.prompt_logprobs)
        return scored - 1 if 0 < scored < len(self.prompt) else len(self.ids) - 1

    @property
    def longest(self) -> int:
        """The most keys it can come to: the last token's key is never needed."""
        return len(self.prompt) + max(self.params.max_tokens, 1) - 1

    @property
    def deadline(self) -> float:
        return float("inf") if self.params.timeout is None else self.arrived + self.params.timeout
