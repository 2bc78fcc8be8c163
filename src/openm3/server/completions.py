"""POST /v1/completions: bare prompts gone on with, as text or token ids, several at once, with log-probabilities."""

from __future__ import annotations

import codecs
import math
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field

from openm3.engine.request import Logprob
from openm3.server.calls import Call, Event, Finished, PromptScores, Scores, Serves, Started
from openm3.server.errors import RequestError
from openm3.server.openai_bodies import TextCompletion
from openm3.server.openai_reply import Reply, finish_reason, finite
from openm3.server.openai_types import MOST_TOKENS, Sampling, expected
from openm3.server.stream import EVENT_STREAM, without_text
from openm3.tokens import Content

MOST_CHOICES = 1024
"""Prompts times choices of one request."""

DEFAULT_TOKENS = 16

Ids = Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[
    str
    | Ids
    | Annotated[list[str], Field(min_length=1, fail_fast=True)]
    | Annotated[list[Ids], Field(min_length=1, fail_fast=True)],
    Field(union_mode="left_to_right"),
    expected("a text, a list of token ids, or a list of one of these, none of the lists empty"),
]


class CompletionRequest(Sampling):
    """Prompts to go on with. `echo` puts the prompt before each text; then `max_tokens` may be 0."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    max_tokens: int | None = Field(None, ge=0, le=MOST_TOKENS)
    best_of: int | None = Field(None, ge=1)
    suffix: Annotated[Literal[""] | None, expected("empty: text can be added at the end alone")] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """All prompts of the request."""
        prompt: Any = self.prompt
        is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
        return [prompt] if is_one else prompt

    @property
    def only_prompt(self) -> bool:
        """Whether nothing is to be written."""
        return self.max_tokens == 0

    def calls(self, longest: int) -> list[Call]:
        """A call for each choice of each prompt. Raises RequestError or PromptError for what is wrong."""
        if self.best_of is not None and self.best_of != self.choices:
            raise RequestError(f"best_of must be equal to n, which is {self.choices}", param="best_of")
        if self.only_prompt and not self.echo:
            raise RequestError("max_tokens may be 0 with echo only: nothing would be left to tell", param="max_tokens")
        if len(self.prompts) * self.choices > MOST_CHOICES:
            raise RequestError(f"prompts times n must be at most {MOST_CHOICES}", param="prompt")
        asked = DEFAULT_TOKENS if self.max_tokens is None else max(self.max_tokens, 1)
        echoes_scores = bool(self.echo) and self.logprobs is not None
        params = [
            self.params(choice, max_tokens=min(asked, longest), top_p=1.0, logprobs=self.logprobs)
            for choice in range(self.choices)
        ]
        if echoes_scores and asked == 1:
            # Who scores a text takes it that one token was written, and cuts off one entry: an end token counts too.
            params = [replace(one, ignore_eos=True) for one in params]
        progress = bool(self.stream) and self.tells_progress
        return [
            Call(prompt=prompt, params=one, echo=echoes_scores, progress=progress)
            for prompt in self.prompts
            for one in params
        ]


class TextReply(Reply):
    """The reply to bare prompts."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(
        self, body: CompletionRequest, model: str, streams: Sequence[AsyncGenerator[Event]], service: Serves
    ) -> None:
        super().__init__(body, model, streams)
        self._texts = [_Text(prompt, body, service) for prompt in body.prompts for _ in range(body.choices)]
        self._scored = body.logprobs is not None

    def pieces(self, number: int, event: Event) -> Iterator[dict[str, Any]]:
        """Texts with the log-probabilities of their tokens."""
        text = self._texts[number].added(event)
        reason = finish_reason(event) if isinstance(event, Finished) else None
        if text or reason:
            yield {
                "index": number,
                "text": text,
                "logprobs": self._texts[number].taken_logprobs(),
                "finish_reason": reason,
            }

    def joined(self, pieces: list[dict[str, Any]]) -> dict[str, Any]:
        """All texts as one."""
        scores = [piece["logprobs"] for piece in pieces if piece["logprobs"]]
        lists = {key: [one for score in scores for one in score[key]] for key in _LISTS}
        return {
            "index": pieces[-1]["index"],
            "text": "".join(piece["text"] for piece in pieces),
            "logprobs": lists if self._scored else None,
            "finish_reason": pieces[-1]["finish_reason"],
        }


_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class _Text:
    """A choice's events as text, its tokens' log-probabilities, and where in the text they begin."""

    def __init__(self, prompt: str | list[int], body: CompletionRequest, service: Serves) -> None:
        self._echoed = _text(prompt, service) if body.echo else ""
        self._echo_awaits_scores = body.echo and body.logprobs is not None
        self._service = service
        self._scores: list[Logprob] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def added(self, event: Event) -> str:
        match event:
            case Started() if not self._echo_awaits_scores:
                return self._echoed
            case PromptScores(tokens):
                self._scores += tokens
                return self._echoed
            case Scores(tokens):
                self._scores += tokens
            case Content(text):
                return text
        return ""

    def taken_logprobs(self) -> dict[str, Any] | None:
        scores, self._scores = self._scores, []
        if not scores:
            return None
        entries = [self._entry(score) for score in scores]
        return {key: list(column) for key, column in zip(_LISTS, zip(*entries, strict=True), strict=True)}

    def _entry(self, score: Logprob) -> tuple[str, float | None, dict[str, float] | None, int]:
        data = self._service.token_bytes(score.id)
        offset = self._offset
        self._offset += len(self._decoder.decode(data))
        if math.isnan(score.logprob):
            return _name(data), None, None, offset
        top: dict[str, float] = {}
        for token, logprob in (*score.top, (score.id, score.logprob)):
            top.setdefault(_name(self._service.token_bytes(token)), finite(logprob))
        return _name(data), finite(score.logprob), top, offset


def _text(prompt: str | list[int], service: Serves) -> str:
    """As the tokenizer reads it: half a surrogate pair, say, could not be sent back."""
    if isinstance(prompt, str):
        return prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return b"".join(service.token_bytes(token) for token in prompt).decode("utf-8", "replace")


def _name(data: bytes) -> str:
    """A token as text; one that holds a part of a character by its bytes, as OpenAI writes them."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def routes(service: Serves) -> APIRouter:
    """The route of completions."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=TextCompletion, responses={200: EVENT_STREAM}, tags=["OpenAI"])
    async def create_completion(body: CompletionRequest, request: Request) -> Any:
        """Go on with prompts, whole or as a stream of chunks that ends with `[DONE]`."""
        model = service.check_model(body.model)
        streams = [service.stream(call) for call in body.calls(service.max_tokens)]
        if body.only_prompt:
            streams = [without_text(stream) for stream in streams]
        return await TextReply(body, model, streams, service).answer(request)

    return router
