"""A server for the page alone: the real page and X-ray routes, and a chat route that says what a script says."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response

from openm3.config import BLOCK
from openm3.errors import OpenM3Error
from openm3.model.checkpoint import BUNDLED
from openm3.server import page, xray
from openm3.server.app import told
from openm3.server.calls import Call, Prompt
from openm3.server.errors import RequestError
from openm3.server.stream import event_stream, packet
from openm3.tokens import StreamDecoder, Tokenizer

NUM_LAYERS, NUM_GROUPS, NUM_SELECTED = 6, 2, 6


@cache
def tokenizer() -> Tokenizer:
    """The bundled model's."""
    return Tokenizer.from_folder(BUNDLED["m3-tiny"])


def selection(token: int, layer: int, group: int, num_blocks: int) -> list[int]:
    """The blocks of a scripted token: none in the dense layer 0, else the last, two fixed, and three that wander."""
    if layer == 0:
        return []
    fixed = [(17 * layer + 5 * group) % num_blocks, (29 * layer + 3 * group + 1) % num_blocks]
    wander = [(layer * 7 + group * 11 + 31 * k + token // 2) % num_blocks for k in range(3)]
    return sorted({num_blocks - 1, *fixed, *wander})


@dataclass
class Script:
    """What the next reply is: texts, the seconds between them, evidence, and a refusal in their place."""

    thinking: Sequence[str] = ()
    content: Sequence[str] = ("Hello",)
    pause: float = 0.0
    evidence: Sequence[dict[str, Any]] = ()
    refusal: RequestError | None = None
    broken: str | None = None


@dataclass
class FakeService:
    """What the X-ray needs of a service, and what was asked of the chat route."""

    script: Script = field(default_factory=Script)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    async def prompt(self, call: Call) -> Prompt:
        self.calls.append(call)
        return Prompt(tokenizer().chat(call.messages or [], tools=call.tools, thinking=call.thinking))

    def decoder(self) -> StreamDecoder:
        return tokenizer().decoder()


def make_app(service: FakeService) -> FastAPI:
    """The page, its X-ray, and stand-ins for the other routes that it calls."""
    app = FastAPI()
    app.include_router(page.routes(service))  # type: ignore[arg-type]
    app.include_router(xray.routes(service))  # type: ignore[arg-type]

    for kind in (OpenM3Error, RequestValidationError):
        app.add_exception_handler(kind, told)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "m3-tiny", "object": "model"}]}

    @app.post("/tokenize")
    async def tokenize(body: dict[str, Any]) -> dict[str, Any]:
        return {"count": len(tokenizer().chat(body["messages"])), "max_model_len": 524288}

    @app.post("/v1/chat/completions")
    async def chat(body: dict[str, Any]) -> Response:
        service.bodies.append(body)
        if service.script.refusal is not None:
            raise service.script.refusal
        service.ended.clear()
        return event_stream(_packets(service, service.script, body))

    return app


async def _packets(service: FakeService, script: Script, body: dict[str, Any]) -> AsyncIterator[str]:
    try:
        prompt = len(tokenizer().chat(body["messages"], thinking=body["thinking"]["type"]))
        written = 0
        yield _chunk({"role": "assistant", "content": ""})
        for name, texts in (("reasoning_content", script.thinking), ("content", script.content)):
            for text in texts:
                await asyncio.sleep(script.pause)
                ids = tokenizer().encode(text)
                delta: dict[str, Any] = {name: text}
                if body.get("xray"):
                    looked = [_looked(prompt, written + i) for i in range(len(ids))]
                    delta["openm3"] = {"ids": ids, "blocks": looked}
                written += len(ids)
                yield _chunk(delta)
        if script.broken:
            yield packet({"error": {"message": script.broken}})
            return
        yield _chunk({"openm3": {"evidence": script.evidence}} if script.evidence else {}, finish_reason="stop")
        usage = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
        yield packet({"object": "chat.completion.chunk", "choices": [], "usage": usage})
        yield packet("[DONE]")
    finally:
        service.ended.set()


def _looked(prompt: int, token: int) -> list[list[list[int]]]:
    num_blocks = -(-(prompt + token) // BLOCK)
    layers = range(NUM_LAYERS)
    return [[selection(token, n, g, num_blocks) for g in range(NUM_GROUPS)] if n else [] for n in layers]


def _chunk(delta: dict[str, Any], finish_reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return packet({"object": "chat.completion.chunk", "choices": [choice]})


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The app on a free port of the loopback, for the time of a with block; its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="error", lifespan="off", ws="none", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=5)
