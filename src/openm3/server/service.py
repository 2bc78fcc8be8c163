"""Runs calls on the engine: prompt in, events out. What all protocols stand on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path
from time import time

from openm3.config import BLOCK
from openm3.engine.asynchronous import AsyncEngine, Reply
from openm3.engine.constraint import Constraint
from openm3.engine.request import Attention, Delta, SamplingParams
from openm3.errors import BusyError, OpenM3Error
from openm3.model.model import Model
from openm3.ops import native
from openm3.server.calls import Call, Event, Evidence, Finished, Prompt, Started
from openm3.server.conversation import conversation
from openm3.server.errors import RequestError
from openm3.server.evidence import find
from openm3.server.files import FileStore
from openm3.server.grammar import json_constraint, reply_constraint
from openm3.server.logs import count_tokens
from openm3.server.media.parts import settled, wanted
from openm3.server.media.reader import MediaReader
from openm3.server.metrics import Metrics
from openm3.server.reply import ReplyEvents, offered
from openm3.server.settings import ServerSettings
from openm3.tokens import Media, StreamDecoder

PACE = 0.04
"""Seconds between two packets of a reply at least: quick to the eye, and a step's work is not in sending."""

SILENCE = 0.25
"""Seconds that text too short for a packet waits for more: models of four tokens a second still fill their packets."""


class Service:
    """One model, which `engine` serves, behind any number of protocols.

    `close` it: replies that run may end, what comes later is refused.
    """

    def __init__(self, engine: AsyncEngine, model: Model, settings: ServerSettings | None = None) -> None:
        self.settings = settings or ServerSettings()
        self.tokenizer = model.tokenizer
        self.vocab_size = model.config.vocab_size
        self._think_end = model.tokenizer.token_id("</mm:think>")
        self.metrics = Metrics()
        self.created = int(time())
        self.files = FileStore(self.settings)
        self._media = MediaReader(self.files, self.settings)
        self._sees = model.config.vision is not None
        self._check_media = model.check_media
        self._engine = engine
        self._names = self.settings.names or (Path(model.name).resolve().name,)
        pool = engine.engine.pages.num_pages * BLOCK
        self.max_model_len = min(model.config.max_positions, pool + 1)
        self._num_running = 0
        self._idle = asyncio.Event()
        self._closing = False

    @property
    def model_names(self) -> Sequence[str]:
        """Names that requests may call the model by, its own first."""
        return self._names

    @property
    def max_tokens(self) -> int:
        """The longest reply anybody may ask for; one that does not fit behind its prompt is cut to what fits."""
        return self.settings.max_tokens

    @property
    def alive(self) -> bool:
        """Whether the engine runs."""
        return self._engine.running

    @property
    def ready(self) -> bool:
        """Whether calls are let in."""
        return self.alive and not self._closing

    def check_model(self, name: object) -> str:
        """The name a reply is to bear, the first one for None. Raises RequestError for a model not served here."""
        if name is None:
            return self._names[0]
        if isinstance(name, str) and name in self._names:
            return name
        served = ", ".join(self._names)
        message = f"the model {name!r} does not exist here; this server has: {served}"
        raise RequestError(message, status=404, param="model", code="model_not_found")

    async def stream(self, call: Call) -> AsyncGenerator[Event]:
        """Run a call; closing the iterator ends it within one step of the engine. Raises as `errors.refusal` knows."""
        if self._closing:
            raise _stopping()
        self._num_running += 1
        try:
            async with contextlib.aclosing(self._run(call)) as events:
                async for event in events:
                    yield event
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._idle.set()

    async def count(self, call: Call) -> int:
        """The tokens of a call's prompt."""
        return len((await self.prompt(call)).ids)

    async def prompt(self, call: Call) -> Prompt:
        """A call's prompt, as `stream` would have the model read it. Raises as `count` does."""
        call, media = await self._seen(call)
        ids = await asyncio.to_thread(self._ids, call, media)
        return Prompt(ids, media, self._check_media(ids, media))

    def decoder(self) -> StreamDecoder:
        """A fresh decoder of the model's ids, one at a time."""
        return self.tokenizer.decoder()

    def token_bytes(self, id: int) -> bytes:
        """A token's own text as UTF-8, of which it may hold a part; nothing for ids that stand for no token."""
        return self.tokenizer.token_bytes(id)

    async def stats(self) -> dict[str, float] | None:
        """What the engine says of itself between two steps; None if it does not within a second, or has stopped."""
        with contextlib.suppress(TimeoutError, OpenM3Error):
            return await asyncio.wait_for(self._engine.stats(), 1.0) if self.alive else None
        return None

    async def close(self, grace: float = 0.0) -> None:
        """Refuse new calls, give those that run `grace` seconds, end the rest with an error, and close the engine."""
        self._closing = True
        self._idle.clear()
        try:
            if self._num_running:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._idle.wait(), grace)
        finally:
            # Also where nobody waits any longer: its threads would hold up the end of the process.
            self._media.close()
        await self._engine.close()

    async def _run(self, call: Call) -> AsyncGenerator[Event]:
        call, media = await self._seen(call)
        ids, constraint = await asyncio.to_thread(self._prepared, call, media)
        params = self._fitting(call, len(ids))
        try:
            reply = await self._engine.submit(ids, params, constraint=constraint, media=media, pace=PACE)
        except BusyError:
            if self._closing:
                raise _stopping() from None
            raise
        told = ReplyEvents(call, self.tokenizer)
        count_tokens(prompt=len(ids))
        self.metrics.started(len(ids))
        with contextlib.closing(reply), self.metrics.written() as written:
            yield Started(len(ids))
            delta = None
            while delta is None or delta.completion is None:
                delta = await _next(reply, told)
                if delta is None:
                    for event in told.flush():
                        yield event
                    continue
                count_tokens(completion=written.add(delta))
                if self._closing and delta.finish_reason == "abort":
                    raise _stopping()
                if constraint is not None and delta.finish_reason == "error":
                    raise RequestError("no token goes on with this reply as the schema or tools ask: make them simpler")
                for event in told.take(delta):
                    if isinstance(event, Finished) and delta.completion is not None and call.evidence:
                        attention = delta.completion.attention if told.answers else None
                        evidence = await asyncio.to_thread(_evidence, call, ids, self.decoder(), attention)
                        event = replace(event, evidence=evidence, timings=delta.completion.timings)
                    yield event

    async def _seen(self, call: Call) -> tuple[Call, list[Media]]:
        """The call with its conversation as the chat template wants it, and what its messages show, in order."""
        if call.messages is None:
            return call, []
        messages = conversation(call.messages)
        shown = wanted(messages)
        if shown and not self._sees:
            where = shown[0].where
            raise RequestError(f"{where}: this model sees no pictures and videos, it reads text alone", param=where)
        media = await self._media.read(shown)
        return replace(call, messages=settled(messages, media)), media

    def _prepared(self, call: Call, media: Sequence[Media]) -> tuple[list[int], Constraint | None]:
        """The prompt and what the reply may be made of: in a thread, since both may take seconds."""
        ids = self._ids(call, media)
        if call.messages is None:
            return ids, None if call.schema is None else json_constraint(self.tokenizer, call.schema)
        return ids, reply_constraint(
            self.tokenizer,
            tools=call.tools,
            choice=call.tool_choice,
            parallel=call.parallel_tool_calls,
            schema=call.schema,
            thinking=call.thinking,
            budget=call.thinking_budget,
        )

    def _ids(self, call: Call, media: Sequence[Media]) -> list[int]:
        if call.messages is not None:
            return self.tokenizer.chat(call.messages, tools=offered(call), thinking=call.thinking, media=media)
        if isinstance(call.prompt, str):
            return self.tokenizer.encode(call.prompt)
        return list(call.prompt or ())

    def _fitting(self, call: Call, num_prompt: int) -> SamplingParams:
        """The call's own parameters, within what the context and the server's time allow."""
        params = call.params
        room = self.max_model_len - num_prompt
        if room < 1:
            message = f"prompt is too long: {num_prompt} tokens > {self.max_model_len - 1} maximum"
            param = "prompt" if call.messages is None else "messages"
            raise RequestError(message, param=param, code="context_length_exceeded")
        longest = min(params.max_tokens, room)
        limit = self.settings.reply_seconds
        timeout = limit if params.timeout is None else min(params.timeout, limit or params.timeout)
        return replace(
            params,
            max_tokens=longest,
            min_tokens=min(params.min_tokens, longest),
            timeout=timeout,
            prompt_logprobs=params.logprobs if call.echo else params.prompt_logprobs,
            trace=call.xray or params.trace,
            attention=call.evidence or params.attention,
            attention_after=self._think_end if call.messages is not None else params.attention_after,
        )


async def _next(reply: Reply, told: ReplyEvents) -> Delta | None:
    """The next delta; None after a silence in which there is text to send."""
    if not told.holds:
        return await anext(reply)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SILENCE):
            return await anext(reply)
    return None


def _evidence(call: Call, ids: list[int], decoder: StreamDecoder, attention: Attention | None) -> Evidence:
    try:
        return find(call, ids, decoder, attention)
    finally:
        native.release_threads()


def _stopping() -> RequestError:
    return RequestError("the server is shutting down: try again later", status=503, code="shutting_down")
