"""The text behind an X-ray: what stands in each block of a context, and in which document, on which lines.

A context is a prompt and the tokens of the reply to it. Selections name its blocks; they come with the reply itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from openm3.config import BLOCK
from openm3.evidence.places import decoded
from openm3.server.calls import Call, Prompt, Serves
from openm3.server.errors import RequestError
from openm3.server.media.parts import with_media
from openm3.server.parts import Documents, Part, located, with_documents
from openm3.tokens import Media, Run, StreamDecoder

NUM_KEPT = 4
"""Contexts that are kept decoded: a million tokens take about 8 MiB."""


class ThinkingMode(BaseModel):
    """How the prompt was made: as in the request that the reply was an answer to."""

    type: Literal["enabled", "disabled", "adaptive"] = "adaptive"


class ContextBody(BaseModel):
    """A conversation as in /v1/chat/completions, and the ids of the reply to it as far as they are known."""

    messages: list[dict[str, Any]]
    documents: Documents = None
    tools: list[dict[str, Any]] = []
    thinking: ThinkingMode = ThinkingMode()
    reply: list[int] = []


class BlockBody(BaseModel):
    """A block of a context. `context` is the name that /xray/context gave it; without one, the conversation itself."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": ["messages"]}, {"required": ["context"]}]})

    block: int = Field(ge=0)
    context: str | None = None
    messages: list[dict[str, Any]] | None = None
    documents: Documents = None
    tools: list[dict[str, Any]] = []
    thinking: ThinkingMode = ThinkingMode()
    reply: list[int] = []


class PartReply(BaseModel):
    """Tokens `tokens[0]` to before `tokens[1]` are of one message or, with a `source`, of one document in it."""

    role: str
    source: str | None
    tokens: tuple[int, int]


class MediaReply(BaseModel):
    """A picture or video and its cells, one a token.

    Cells go row by row, frame by frame: `grid` has frames, rows and columns, which share the `size` in pixels (height,
    width) evenly. `runs` are [token, cell, count]: tokens from `token` on are the cells from `cell` on. `seconds` is
    when each frame was, null for a picture.
    """

    kind: Literal["image", "video"]
    size: tuple[int, int]
    grid: tuple[int, int, int]
    seconds: list[float] | None
    runs: list[tuple[int, int, int]]


class ContextReply(BaseModel):
    """What a context is made of. `reply` holds the text of each of the reply's tokens: joined, its text."""

    context: str
    tokens: int
    block_size: int
    parts: list[PartReply]
    media: list[MediaReply]
    reply: list[str]


class PlaceReply(BaseModel):
    """Whose text a block holds: a message's or a document's, `lines` being its first and last one there, from 1."""

    role: str
    source: str | None
    lines: tuple[int, int] | None


class BlockReply(BaseModel):
    """A block's text. Together the blocks are the whole text; a character belongs to the block that ends it."""

    context: str
    block: int
    tokens: tuple[int, int]
    text: str
    places: list[PlaceReply]


@dataclass(frozen=True)
class Context:
    """A decoded context; token t begins at character `begins[t]`, and the last entry is the text's length."""

    name: str
    text: str
    begins: Sequence[int]
    parts: Sequence[Part]
    prompt: Prompt

    @property
    def num_tokens(self) -> int:
        """The tokens of prompt and reply."""
        return len(self.begins) - 1

    def described(self) -> ContextReply:
        """The whole of it, for a map."""
        parts = []
        for part in self.parts:
            tokens = bisect_right(self.begins, part.start) - 1, bisect_left(self.begins, part.stop)
            parts.append(PartReply(role=part.role, source=part.source, tokens=tokens))
        reply = [self.text[i:k] for i, k in pairwise(self.begins[len(self.prompt.ids) :])]
        media = [_media_reply(item, i, self.prompt.runs) for i, item in enumerate(self.prompt.media)]
        return ContextReply(
            context=self.name, tokens=self.num_tokens, block_size=BLOCK, parts=parts, media=media, reply=reply
        )

    def block(self, block: int) -> BlockReply:
        """One block of it. Raises RequestError if there are fewer."""
        num_blocks = -(-self.num_tokens // BLOCK)
        if block >= num_blocks:
            raise RequestError(
                f"block must be below {num_blocks}, the blocks of this context, not {block}", param="block"
            )
        first, last = block * BLOCK, min((block + 1) * BLOCK, self.num_tokens)
        start, stop = self.begins[first], self.begins[last]
        places = [
            PlaceReply(role=part.role, source=part.source, lines=self._lines(part, start, stop))
            for part in self.parts
            if part.start < stop and start < part.stop
        ]
        return BlockReply(
            context=self.name, block=block, tokens=(first, last), text=self.text[start:stop], places=places
        )

    def _lines(self, part: Part, start: int, stop: int) -> tuple[int, int] | None:
        start, stop = max(start, part.body), min(stop, part.stop)
        if part.source is None or start >= stop:
            return None
        first = self.text.count("\n", part.body, start) + 1
        return first, first + self.text.count("\n", start, stop - 1)


def routes(service: Serves) -> APIRouter:
    """The routes under /xray: a context's parts, and the text of one of its blocks."""
    router = APIRouter(tags=["xray"])
    contexts = _Contexts(service)

    @router.post("/xray/context", summary="The documents and messages of a context, and its reply's tokens as text")
    async def context(body: ContextBody) -> ContextReply:
        return (await contexts.get(body)).described()

    @router.post("/xray/block", summary="The text of one block, with its document and lines", responses={404: {}})
    async def block(body: BlockBody) -> BlockReply:
        if body.context is not None and (kept := contexts.kept(body.context)):
            return kept.block(body.block)
        if body.messages is None:
            what = "context or messages is missing" if body.context is None else "the context is not kept any more"
            raise RequestError(
                f"{what}: give the messages", status=400 if body.context is None else 404, code="context_not_found"
            )
        return (await contexts.get(ContextBody.model_validate(body.model_dump()))).block(body.block)

    return router


class _Contexts:
    """The contexts asked for last, by the hash of all that makes them."""

    def __init__(self, service: Serves) -> None:
        self._service = service
        self._kept: OrderedDict[str, Context] = OrderedDict()

    def kept(self, name: str) -> Context | None:
        if name in self._kept:
            self._kept.move_to_end(name)
        return self._kept.get(name)

    async def get(self, body: ContextBody) -> Context:
        """Raises what `Serves.ids` does for messages that are no conversation."""
        name = hashlib.sha256(json.dumps(body.model_dump()).encode()).hexdigest()
        if found := self.kept(name):
            return found
        messages = with_documents(with_media(body.messages), body.documents)
        prompt = await self._service.prompt(Call(messages=messages, tools=body.tools, thinking=body.thinking.type))
        made = await asyncio.to_thread(_made, name, messages, prompt, body.reply, self._service.decoder())
        self._kept[name] = made
        while len(self._kept) > NUM_KEPT:
            self._kept.popitem(last=False)
        return made


def _made(
    name: str, messages: Sequence[dict[str, Any]], prompt: Prompt, reply: Sequence[int], decoder: StreamDecoder
) -> Context:
    text, begins = decoded(decoder, (*prompt.ids, *reply))
    parts = list(located(messages, text))
    if reply:
        start = begins[len(prompt.ids)]
        parts.append(Part("assistant", None, start, len(text), start))
    return Context(name, text, begins, parts, prompt)


def _media_reply(item: Media, number: int, runs: Sequence[Run]) -> MediaReply:
    frames = sum(t for t, _, _ in item.grids)
    _, height, width = item.grids[0]
    return MediaReply(
        kind=item.kind,
        size=item.size,
        grid=(frames, height // 2, width // 2),
        seconds=None if item.seconds is None else list(item.seconds),
        runs=[(run.first, run.offset, run.count) for run in runs if run.media == number],
    )
