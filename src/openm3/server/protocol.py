"""What Anthropic's messages and OpenAI's responses share: how bodies are read, checked and answered.

Thoughts travel with the conversation in both: a client gets them back sealed and sends them again with its next turn,
so that nothing has to be remembered here.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Tag
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from openm3.engine.request import SamplingParams
from openm3.server.calls import Call, Event, Finished, Looked, Serves, Started
from openm3.server.errors import RequestError, refusal
from openm3.server.extras import extra, joined
from openm3.server.media.parts import Wanted
from openm3.server.stream import COMMENT, event_stream, opened, packet, whole

TEMPERATURE, TOP_P = 1.0, 0.95
"""M3's own sampling, where a request says nothing."""

_SEAL = "openm3-1:"
_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


class Open(BaseModel):
    """A part of a request: its known fields are of the types they say, unknown ones are let through."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


def _form(value: object) -> str:
    return "text" if isinstance(value, str) else "parts"


TextOr = Annotated[Annotated[str, Tag("text")] | Annotated[list[_T], Tag("parts")], Discriminator(_form)]
"""A string or a list; an error tells of the one that was meant."""


def sampling(
    service: Serves,
    max_tokens: int,
    *,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    stop: Sequence[str] = (),
    field: str = "max_tokens",
) -> SamplingParams:
    """Sampling with M3's defaults. Raises RequestError under the name `field` for more tokens than anybody may have."""
    if max_tokens > service.max_tokens:
        raise RequestError(f"{field} must be at most {service.max_tokens}, not {max_tokens}", param=field)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=TEMPERATURE if temperature is None else temperature,
        top_p=TOP_P if top_p is None else top_p,
        top_k=top_k or 0,
        stop=tuple(stop),
    )


def checked(call: Call) -> Call:
    """The call itself. Raises RequestError for one that no model can make sense of.

    That is one with values that are no JSON, or with a choice that none of its tools meets.
    """
    check_json([call.messages, call.tools, call.schema])
    names = [tool["function"]["name"] for tool in call.tools]
    if call.tool_choice == "required" and not names:
        raise RequestError("tool_choice asks for a call, but no tool that can be called here is given")
    if call.tool_choice not in ("auto", "none", "required", *names):
        raise RequestError(f"tool_choice names {call.tool_choice!r}, which is none of the tools: {', '.join(names)}")
    return call


def check_json(value: object) -> None:
    """Raises RequestError for what Python's parser lets in, but what is no JSON or cannot be written as such again."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False, default=_shown).encode()
    except (ValueError, RecursionError):
        raise RequestError("the request holds NaN, Infinity, half a surrogate pair or endless nesting") from None


def _shown(value: object) -> None:
    """What a part shows is no JSON, and checked where it is read."""
    if not isinstance(value, Wanted):
        raise TypeError(value)


def function(name: str, description: str | None, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """A tool in OpenAI's format."""
    given = {"description": description, "parameters": parameters}
    fields = {key: value for key, value in given.items() if value is not None}
    return {"type": "function", "function": {"name": name, **fields}}


def tool_call(number: str, name: str, arguments: str | Mapping[str, Any]) -> dict[str, Any]:
    """A call in an assistant's message in OpenAI's format."""
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def seal(thoughts: str) -> str:
    """Thoughts as text that clients keep as it is; no secret, but nothing that they would show or count either."""
    return _SEAL + base64.b64encode(thoughts.encode()).decode()


def unseal(sealed: str | None) -> str:
    """What was sealed; nothing from what another server sealed."""
    if sealed is None or not sealed.startswith(_SEAL):
        return ""
    try:
        return base64.b64decode(sealed.removeprefix(_SEAL), validate=True).decode()
    except ValueError:
        return ""


class Grows(Protocol):
    """A reply in a protocol's own shape, that each event of a call adds to."""

    body: dict[str, Any]
    """The reply so far; all of it once the call has finished."""

    def add(self, event: Event) -> Iterator[dict[str, Any]]:
        """What a stream tells of an event; the reply has grown by it once all is taken. Raises as `check_end` does."""

    def fail(self, error: RequestError) -> dict[str, Any]:
        """What a stream ends with when something goes wrong."""


async def answer(
    reply: Grows, events: AsyncGenerator[Event], request: Request, *, stream: bool | None, ping: str = COMMENT
) -> Response:
    """A call's reply, whole or streamed. Raises what refuses the call.

    What is told beside the protocol is `openm3` of the whole reply. In a stream what tokens read is that of the event
    after them, and not told again at the end: it is longer than all the rest.
    """
    if stream:
        started, _ = await opened(events)
        return event_stream(_packets(reply, started, events), ping)
    collected = await whole(request, events)
    for event in collected:
        for _ in reply.add(event):
            pass
    if told := joined(map(extra, collected)):
        reply.body["openm3"] = told
    return JSONResponse(reply.body)


async def _packets(reply: Grows, started: Started, events: AsyncGenerator[Event]) -> AsyncGenerator[str]:
    try:
        async with aclosing(events):
            for data in reply.add(started):
                yield packet(data, data["type"])
            looked: list[dict[str, Any]] = []
            async for event in events:
                if isinstance(event, Looked):
                    looked.append(extra(event))
                    continue
                for data in reply.add(event):
                    yield packet(data | {"openm3": joined(looked)} if looked else data, data["type"])
                    looked.clear()
    except Exception as error:
        refused = refusal(error)
        if refused is not error and refused.status >= 500:
            _LOG.error("a stream failed: %s", refused.message, exc_info=error)
        data = reply.fail(refused)
        yield packet(data, data["type"])


def check_end(finished: Finished) -> None:
    """Raises RequestError for a reply that ended neither by itself nor by a limit."""
    if finished.reason == "abort":
        raise RequestError("the reply was broken off: the server is stopping", status=503, code="aborted")
    if finished.reason == "error":
        raise RequestError("the reply was broken off: the model computed values that are no numbers", status=500)
