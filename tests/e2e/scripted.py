"""A model that writes what a test tells it to: m3-tiny on the real engine behind the real server, each token forced.

m3-tiny cannot code. What clients do with a model that can is shown on a stage: it reads each call as the model gets it,
and says what the model writes, in the model's own grammar. All else is the server as it is: what a grammar would keep a
model from writing fails here, too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openm3.config import EngineConfig
from openm3.engine.asynchronous import AsyncEngine
from openm3.engine.constraint import Constraint
from openm3.engine.engine import Engine
from openm3.model.model import Model
from openm3.server.app import create_app
from openm3.server.calls import Call
from openm3.server.command import Server, listening
from openm3.server.service import Service
from openm3.server.settings import ServerSettings
from openm3.tokens.media import Media

CACHE_TOKENS = 120_000
"""Room for two coding agents' conversations."""

Author = Callable[[Call], str]
"""What the model writes to a call: text with control tokens (`<mm:think>`, calls by `render_tool_call`)."""


class Stage(logging.Handler):
    """Who writes, the calls so far, and the server's line for each request."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.author: Author = lambda call: "Hello."
        self.calls: list[Call] = []
        self.requests: list[dict[str, Any]] = []

    def play(self, *texts: str | Author) -> None:
        """Write these, one to each call, and fail at a call too many."""
        coming = iter(texts)

        def author(call: Call) -> str:
            text = next(coming)
            return text if isinstance(text, str) else text(call)

        self.author = author

    def emit(self, record: logging.LogRecord) -> None:
        """Take what the server logs."""
        self.requests.append(getattr(record, "fields", {"message": record.getMessage(), "status": 500}))

    @property
    def refused(self) -> list[dict[str, Any]]:
        """Requests that failed."""
        return [line for line in self.requests if line["status"] >= 400]

    def written(self, call: Call, grammar: Constraint | None) -> Written:
        """The constraint to write a reply by."""
        self.calls.append(call)
        text = self.author(call)
        return Written([*self.model.tokenizer.encode(text, special=True), self.model.tokenizer.eos_id], self, grammar)

    def forbid(self, token: int) -> None:
        """Note that a grammar does not allow what is to be written."""
        self.requests.append(
            {"message": f"the grammar forbids {self.model.tokenizer.decode([token])!r}", "status": 500}
        )


class Written:
    """A constraint that leaves one token to choose at each place, a text's next one, if the grammar allows it."""

    def __init__(self, ids: Sequence[int], stage: Stage, grammar: Constraint | None) -> None:
        self._ids = ids
        self._place = 0
        self._stage = stage
        self._grammar = grammar

    def mask(self) -> NDArray[np.bool_]:
        allowed = np.zeros(self._stage.model.config.vocab_size, dtype=np.bool_)
        token = self._ids[self._place]
        grammar = None if self._grammar is None else self._grammar.mask()
        if grammar is None or grammar[token]:
            allowed[token] = True
        else:
            self._stage.forbid(token)
        return allowed

    def accept(self, token: int) -> None:
        self._place += 1
        if self._grammar is not None:
            self._grammar.accept(token)

    @property
    def finished(self) -> bool:
        return self._grammar is not None and self._grammar.finished


class _Service(Service):
    """A service whose model is a stage."""

    def __init__(self, stage: Stage, engine: AsyncEngine, settings: ServerSettings) -> None:
        super().__init__(engine, stage.model, settings)
        self._stage = stage

    def _prepared(self, call: Call, media: Sequence[Media]) -> tuple[list[int], Constraint | None]:
        ids, grammar = super()._prepared(call, media)
        return ids, self._stage.written(call, grammar)


@contextmanager
def serving(stage: Stage) -> Iterator[str]:
    """The server on loopback, in a thread; its address."""
    settings = ServerSettings(port=0, grace=1.0)
    engine = AsyncEngine(Engine(stage.model, EngineConfig(cache_tokens=CACHE_TOKENS, check=True)))
    service = _Service(stage, engine, settings)
    listener = listening(settings)
    server = Server(create_app(service), service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    log = logging.getLogger("openm3.server")
    log.addHandler(stage)
    log.setLevel(logging.INFO)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        log.removeHandler(stage)
        log.setLevel(logging.NOTSET)
