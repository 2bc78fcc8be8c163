"""A service that plays a script, and an application of all protocols over it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError

from openm3.engine.request import Usage
from openm3.errors import OpenM3Error
from openm3.server import anthropic, completions, openai_chat, responses
from openm3.server.app import told
from openm3.server.calls import Call, Event, Finished, Started
from openm3.server.errors import RequestError
from openm3.tokens import Content, Thinking, ToolArguments, ToolEnd, ToolStart

PROMPT_TOKENS = 11
USAGE = Usage(PROMPT_TOKENS, 4, 9)

Step = Event | Exception | asyncio.Event | float
"""What to tell, to raise, to wait for, or how many seconds to sleep."""


def finished(reason: Any = "stop", completion_tokens: int = 9, **more: Any) -> Finished:
    return Finished(reason, Usage(PROMPT_TOKENS, 4, completion_tokens), **more)


def reply(*steps: Step, last: Finished | None = None) -> list[Step]:
    """Steps between a first and a last event."""
    return [Started(PROMPT_TOKENS), *steps, last or finished()]


def called(index: int, name: str, arguments: dict[str, Any], *, complete: bool = True) -> list[Event]:
    """A call whose arguments come in two parts."""
    text = json.dumps(arguments)
    parts = [ToolArguments(index, part) for part in (text[:4], text[4:]) if part]
    return [ToolStart(index, name), *parts, ToolEnd(index, arguments, complete)]


ANSWER = reply(
    Thinking("Let me"), Thinking(" think."), Content("Hello"), Content(" there."), last=finished(thinking_tokens=4)
)


class FakeService:
    """Records calls and answers each by the script, or by what the script makes of the call. Tokens are bytes."""

    model_names = ("m3-tiny", "MiniMax-M3")
    max_tokens = 524_288

    def __init__(self, script: Sequence[Step] | Callable[[Call], Sequence[Step]] = ANSWER) -> None:
        self.script = script
        self.calls: list[Call] = []
        self.num_running = self.most_running = self.num_ended = 0

    @property
    def call(self) -> Call:
        """The only call."""
        (call,) = self.calls
        return call

    def check_model(self, name: object) -> str:
        if name is not None and name not in self.model_names:
            raise RequestError(f"the model {name!r} is not served here", param="model")
        return "m3-tiny"

    def token_bytes(self, id: int) -> bytes:
        return bytes([id]) if id < 256 else b""

    async def stream(self, call: Call) -> AsyncGenerator[Event]:
        self.calls.append(call)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            for step in self.script(call) if callable(self.script) else self.script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, float):
                    await asyncio.sleep(step)
                else:
                    yield step
        finally:
            self.num_running -= 1
            self.num_ended += 1

    async def count(self, call: Call) -> int:
        self.calls.append(call)
        return PROMPT_TOKENS


def saying(*events: Event, **ending: Any) -> FakeService:
    """A service whose replies hold these events and end as they must, but for what `ending` says."""
    has_called = any(isinstance(event, ToolStart) for event in events)
    fields = {"reason": "tool_calls" if has_called else "stop", "usage": USAGE, "thinking_tokens": 3} | ending
    return FakeService(reply(*events, last=Finished(**fields)))


def whole_turn() -> FakeService:
    """Thoughts, text and two calls."""
    weather = called(0, "get_weather", {"city": "Paris", "days": 2})
    return saying(
        Thinking("I should "),
        Thinking("look."),
        Content("Looking"),
        Content(" it up."),
        *weather,
        *called(1, "now", {}),
    )


def app_of(service: Any) -> FastAPI:
    """All protocols over a service, with the server's own refusals."""
    app = FastAPI()
    for protocol in (openai_chat, completions, responses, anthropic):
        app.include_router(protocol.routes(service))
    for kind in (OpenM3Error, RequestValidationError):
        app.add_exception_handler(kind, told)
    return app


def chunks_of(body: str) -> list[dict[str, Any]]:
    """The data of a stream's chunks. It must end with [DONE]."""
    packets = [packet for packet in body.split("\n\n") if packet]
    assert packets.pop() == "data: [DONE]"
    assert all(packet.startswith("data: ") for packet in packets)
    return [json.loads(packet.removeprefix("data: ")) for packet in packets]


def events_of(body: str) -> list[tuple[str, dict[str, Any]]]:
    """The server-sent events of a response: name and data."""
    found = []
    for block in body.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in fields:
            found.append((fields.get("event", ""), json.loads(fields["data"])))
    return found
