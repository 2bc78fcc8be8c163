"""What OpenAI's chats and completions have in common: choices from calls, whole or as a stream of chunks, and usage."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import StreamingResponse

from openm3.engine.request import Usage
from openm3.server.calls import Event, Finished, Progress, Started
from openm3.server.errors import RequestError, error_body, refusal
from openm3.server.openai_types import Sampling
from openm3.server.several import Numbered, opened, together
from openm3.server.stream import event_stream, packet, whole

_log = logging.getLogger(__name__)

LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of zero, which JSON cannot say."""


class Reply(ABC):
    """The reply to one request, of a choice for each of `streams`; `choices` in a row answer one prompt.

    A choice's events become pieces, which a stream sends one by one and a whole reply joins: they cannot differ.
    """

    kind: str
    chunk_kind: str
    prefix: str

    def __init__(self, body: Sampling, model: str, streams: Sequence[AsyncGenerator[Event]]) -> None:
        self.id = f"{self.prefix}-{uuid4().hex}"
        self.model = model
        self.created = int(time.time())
        self._body = body
        self._streams = streams
        self._usages = [Usage(0, 0, 0)] * len(streams)
        self._thought = [0] * len(streams)

    @abstractmethod
    def pieces(self, number: int, event: Event) -> Iterator[dict[str, Any]]:
        """What an event adds to choice `number`, as the choices of chunks."""

    @abstractmethod
    def joined(self, pieces: list[dict[str, Any]]) -> dict[str, Any]:
        """All pieces of a choice as one choice of a whole reply."""

    async def answer(self, request: Request) -> dict[str, Any] | StreamingResponse:
        """The whole reply or its stream, as the request has it. Raises what refuses the request."""
        if self._body.stream:
            return event_stream(self._packets(request, await opened(self._streams)))
        pieces: list[list[dict[str, Any]]] = [[] for _ in self._streams]
        for number, event in await whole(request, together(self._streams)):
            pieces[number] += self._heard(number, event)
        return self.envelope(self.kind, [self.joined(own) for own in pieces]) | {"usage": self._usage()}

    def envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A reply or chunk around choices."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    async def _packets(self, request: Request, events: AsyncGenerator[Numbered]) -> AsyncGenerator[str]:
        tells = self._body.tells_usage
        try:
            async for number, event in events:
                for piece in self._heard(number, event):
                    chunk = self.envelope(self.chunk_kind, [piece])
                    if tells:
                        chunk["usage"] = self._usage() if self._body.tells_progress else None
                    yield packet(chunk)
            if tells:
                yield packet(self.envelope(self.chunk_kind, []) | {"usage": self._usage()})
        except Exception as error:
            told = refusal(error)
            request_id = getattr(request.state, "request_id", self.id)
            if told.status == 500 and told is not error:
                _log.exception("the stream of request %s failed", request_id)
            yield packet(error_body(told, request.url.path, request_id))
        finally:
            await events.aclose()
        yield packet("[DONE]")

    def _heard(self, number: int, event: Event) -> Iterator[dict[str, Any]]:
        match event:
            case Started(prompt_tokens):
                self._usages[number] = Usage(prompt_tokens, 0, 0)
            case Progress(completion_tokens):
                self._usages[number] = Usage(self._usages[number].prompt_tokens, 0, completion_tokens)
            case Finished(reason="error"):
                raise RequestError("the model computed values that are no numbers", status=500)
            case Finished(reason="abort"):
                raise RequestError("the reply was broken off: the server is stopping", status=503)
            case Finished():
                self._usages[number], self._thought[number] = event.usage, event.thinking_tokens
        yield from self.pieces(number, event)

    def _usage(self) -> dict[str, Any]:
        prompts = self._usages[:: self._body.choices]
        prompt_tokens = sum(usage.prompt_tokens for usage in prompts)
        completion_tokens = sum(usage.completion_tokens for usage in self._usages)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "total_characters": 0,
            "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in prompts)},
            "completion_tokens_details": {"reasoning_tokens": sum(self._thought)},
        }


def finish_reason(event: Finished) -> str:
    """In OpenAI's words: a reply that ran out of time is one that ran out of length."""
    return "length" if event.reason == "timeout" else event.reason


def finite(logprob: float) -> float:
    """A log-probability that JSON can say."""
    return max(logprob, LEAST_LOGPROB)
