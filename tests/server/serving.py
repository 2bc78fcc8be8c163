"""A service on a model of a test's own, and an application behind a real server."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from time import sleep
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from openm3.config import EngineConfig
from openm3.engine.asynchronous import AsyncEngine
from openm3.engine.engine import Engine
from openm3.model.model import Model
from openm3.server.service import Service
from openm3.server.settings import ServerSettings


@asynccontextmanager
async def serving(model: Model, settings: ServerSettings | None = None, **config: Any) -> AsyncIterator[Service]:
    """A service over an engine of its own, which must hold no page at the end."""
    engine = Engine(model, EngineConfig(**{"cache_tokens": 8192, "check": True, **config}))
    service = Service(AsyncEngine(engine), model, settings)
    try:
        yield service
    finally:
        await service.close()
        assert engine.pages.num_held == 0 and not engine.has_work


@contextmanager
def served(app: ASGIApp) -> Iterator[str]:
    """The application behind a real uvicorn on this machine; its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            sleep(0.01)
            assert thread.is_alive()
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
