"""A service that plays a script, and an application and a server around it, for tests of protocols."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse

from openm3.engine.request import Usage
from openm3.errors import OpenM3Error
from openm3.server.calls import Call, Event, Finished, Started
from openm3.server.errors import RequestError, error_body, refusal
from openm3.tokens import Content, Thinking, ToolArguments, ToolEnd, ToolStart

PROMPT_TOKENS = 11
USAGE = Usage(PROMPT_TOKENS, 4, 9)


class Fake:
    """Records calls and answers each with the same script: events, errors to raise, and gates to wait at."""

    model_names = ("m3-tiny",)
    max_tokens = 524288

    def __init__(self, *script: Event | Exception | asyncio.Event) -> None:
        self.script = script
        self.calls: list[Call] = []
        self.num_ended = 0

    def check_model(self, name: object) -> str:
        if name not in self.model_names:
            raise RequestError(f"the model {name!r} is not served here: ask for m3-tiny", param="model")
        return "m3-tiny"

    async def stream(self, call: Call) -> AsyncGenerator[Event]:
        self.calls.append(call)
        try:
            for step in self.script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    yield step
        finally:
            self.num_ended += 1

    async def count(self, call: Call) -> int:
        self.calls.append(call)
        return PROMPT_TOKENS


def reply(*events: Event, **finished: Any) -> Fake:
    """A service whose replies hold these events between a first and a last one."""
    called = any(isinstance(event, ToolStart) for event in events)
    fields = {"reason": "tool_calls" if called else "stop", "usage": USAGE, "thinking_tokens": 3} | finished
    return Fake(Started(PROMPT_TOKENS), *events, Finished(**fields))


def tool_events(index: int, name: str, arguments: dict[str, Any], *, complete: bool = True) -> list[Event]:
    """A call whose arguments come in two parts."""
    text = json.dumps(arguments)
    parts = [ToolArguments(index, part) for part in (text[:5], text[5:]) if part]
    return [ToolStart(index, name), *parts, ToolEnd(index, arguments, complete)]


def whole_turn() -> Fake:
    """Thoughts, text and two calls."""
    weather = tool_events(0, "get_weather", {"city": "Paris", "days": 2})
    return reply(
        Thinking("I should "),
        Thinking("look."),
        Content("Looking"),
        Content(" it up."),
        *weather,
        *tool_events(1, "now", {}),
    )


def app_of(router: APIRouter) -> FastAPI:
    """An application that refuses as the server's own does."""
    app = FastAPI()
    app.include_router(router)

    def refused(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, RequestValidationError):
            wrong = "; ".join(f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors())
            error = RequestError(wrong)
        told = refusal(error)
        return JSONResponse(error_body(told, request.url.path, "req_1"), status_code=told.status)

    app.add_exception_handler(OpenM3Error, refused)
    app.add_exception_handler(RequestValidationError, refused)
    return app


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The application behind a real server on loopback; its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def events_of(body: str) -> list[tuple[str, dict[str, Any]]]:
    """The server-sent events of a response: name and data."""
    found = []
    for block in body.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in fields:
            found.append((fields.get("event", ""), json.loads(fields["data"])))
    return found
