"""A service that plays scripts, and an application and a server around it, for tests of OpenAI's protocol."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse

from openm3.engine.request import Usage
from openm3.errors import OpenM3Error
from openm3.server import completions, openai_chat
from openm3.server.calls import Call, Event, Finished, Started
from openm3.server.errors import RequestError, error_body, refusal
from openm3.tokens import Content, Thinking, ToolArguments, ToolEnd, ToolStart

PROMPT_TOKENS = 11

Step = Event | Exception | asyncio.Event | float
"""What to tell, to raise, to wait for, or how many seconds to sleep."""


def finished(reason: Any = "stop", completion_tokens: int = 9, **more: Any) -> Finished:
    return Finished(reason, Usage(PROMPT_TOKENS, 4, completion_tokens), **more)


def reply(*steps: Step, last: Finished | None = None) -> list[Step]:
    return [Started(PROMPT_TOKENS), *steps, last or finished()]


def called(index: int, name: str, arguments: dict[str, Any]) -> list[Event]:
    """A call whose arguments come in two parts."""
    text = json.dumps(arguments)
    return [
        ToolStart(index, name),
        ToolArguments(index, text[:4]),
        ToolArguments(index, text[4:]),
        ToolEnd(index, arguments),
    ]


ANSWER = reply(
    Thinking("Let me"), Thinking(" think."), Content("Hello"), Content(" there."), last=finished(thinking_tokens=4)
)


class FakeService:
    """Records calls and answers each by the script, or by what the script makes of the call. Tokens are bytes."""

    model_names = ("m3-tiny", "MiniMax-M3")
    max_tokens = 1000

    def __init__(self, script: Sequence[Step] | Callable[[Call], Sequence[Step]] = ANSWER) -> None:
        self.script = script
        self.calls: list[Call] = []
        self.num_running = self.most_running = 0

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

    async def count(self, call: Call) -> int:
        return PROMPT_TOKENS


def app_of(service: FakeService) -> FastAPI:
    """An application that refuses as the server's own does."""
    app = FastAPI()
    app.include_router(openai_chat.routes(service))
    app.include_router(completions.routes(service))

    def refused(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, RequestValidationError):
            first = error.errors()[0]
            steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"][1:])
            name = "".join(steps).removeprefix(".")
            error = RequestError(f"{name}: {first['msg']}", param=name)
        told = refusal(error)
        return JSONResponse(error_body(told, request.url.path, "req_1"), status_code=told.status)

    app.add_exception_handler(OpenM3Error, refused)
    app.add_exception_handler(RequestValidationError, refused)
    return app


@contextmanager
def serving(service: FakeService) -> Iterator[str]:
    """The service behind a real server on loopback; its address."""
    server = uvicorn.Server(
        uvicorn.Config(app_of(service), host="127.0.0.1", port=0, log_level="error", lifespan="off")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        thread.join()


def chunks_of(body: str) -> list[dict[str, Any]]:
    """The data of a stream's chunks. It must end with [DONE]."""
    packets = [packet for packet in body.split("\n\n") if packet]
    assert packets.pop() == "data: [DONE]"
    assert all(packet.startswith("data: ") for packet in packets)
    return [json.loads(packet.removeprefix("data: ")) for packet in packets]
