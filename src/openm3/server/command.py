"""`openm3 serve`: one model behind HTTP, from the command line to the last reply."""

from __future__ import annotations

import argparse
import asyncio
import errno
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import uvicorn
from fastapi import FastAPI

from openm3.config import EngineConfig
from openm3.engine.asynchronous import AsyncEngine
from openm3.engine.engine import Engine
from openm3.errors import ConfigError
from openm3.model.model import load
from openm3.server.app import create_app
from openm3.server.logs import log_to_stderr
from openm3.server.service import Service
from openm3.server.settings import ServerSettings, read_keys

LAST_SECONDS = 5
"""After its grace, how long a server waits for errors and last packets to leave."""

SILENT_SECONDS = 30.0
"""How long a connection may say nothing, or not end a request's headers."""


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes. Returns 0, or 1 if it could not start. Raises OpenM3Error."""
    settings = _settings(args)
    with listening(settings) as listener:
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        log_to_stderr(args.log_level)
        print(f"loading {args.path}", file=sys.stderr, flush=True)
        model = load(args.path, device=args.device, dtype=getattr(torch, args.dtype), weights=args.weights)
        engine = AsyncEngine(Engine(model, _engine_config(args)))
        service = Service(engine, model, settings)
        server = Server(create_app(service), service)
        server.run(sockets=[listener])
    return 0 if server.started else 1


class Server(uvicorn.Server):
    """uvicorn that ends replies properly: the first signal gives them their grace, the second one ends everything."""

    def __init__(self, app: FastAPI, service: Service) -> None:
        settings = service.settings
        config = uvicorn.Config(
            app,
            # The one with a limit for headers.
            http="h11",
            ws="none",
            h11_max_incomplete_event_size=2 * settings.max_header_bytes,
            timeout_graceful_shutdown=int(settings.grace) + LAST_SECONDS,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
        )
        super().__init__(config)
        self._service = service
        self._silent: dict[object, tuple[object, float]] = {}

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say where."""
        await super().startup(sockets)
        for listener in sockets or []:
            print(greeting(listener, self._service), file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, let replies end, and close the service."""
        closing = asyncio.create_task(self._service.close(self._service.settings.grace))
        await super().shutdown(sockets)
        if not self.force_exit:
            await closing

    async def on_tick(self, counter: int) -> bool:
        """Also hang up on who connects and does not ask."""
        if counter % 10 == 0:
            now = asyncio.get_running_loop().time()
            silent: dict[object, tuple[object, float]] = {}
            for connection in list(self.server_state.connections):
                last = getattr(connection, "cycle", None)
                if last is not None and not last.response_complete:
                    continue
                before, since = self._silent.get(connection, (last, now))
                silent[connection] = (last, since) if before is last else (last, now)
                if now - silent[connection][1] > SILENT_SECONDS:
                    connection.transport.close()
            self._silent = silent
        return await super().on_tick(counter)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM, and do not raise them again at the end: stopping when told to is success."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; at once if told so before."""
        self.force_exit = self.should_exit
        self.should_exit = True


def listening(settings: ServerSettings) -> socket.socket:
    """A socket at the server's address, before anything long begins. Raises ConfigError for one that cannot be had."""
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        hint = "; give another --port, or 0 for any that is free" if error.errno == errno.EADDRINUSE else ""
        where = _address(settings.host, settings.port)
        raise ConfigError(f"cannot listen at {where}: {error.strerror}{hint}") from None
    return listener


def greeting(listener: socket.socket, service: Service) -> str:
    """Where the server is, and a first thing to ask it."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    address = f"http://{_address(host, port)}"
    # Shells take brackets for patterns.
    url = f"'{address}/v1/chat/completions'" if "[" in address else f"{address}/v1/chat/completions"
    key = ' -H "Authorization: Bearer $KEY"' if service.settings.api_keys else ""
    return (
        f"openm3 serves {service.model_names[0]} at {address}\n"
        f"  curl {url}{key} -H 'Content-Type: application/json' \\\n"
        f"""    -d '{{"model": "{service.model_names[0]}", "messages": [{{"role": "user", "content": "Hello"}}]}}'"""
    )


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _settings(args: argparse.Namespace) -> ServerSettings:
    return ServerSettings(
        host=args.host,
        port=args.port,
        names=tuple(args.name or ()),
        api_keys=read_keys(args.api_key_file, os.environ),
        allow_unauthenticated=args.allow_unauthenticated,
        cors_origins=tuple(args.cors_origin or ()),
        max_body_bytes=args.max_body_mib << 20,
        max_file_bytes=args.max_file_mib << 20,
        max_concurrent=args.max_concurrent,
        max_tokens=args.max_tokens,
        reply_seconds=args.timeout,
        grace=args.grace,
        allow_media_urls=args.allow_media_urls,
        media_workers=args.media_workers,
        files_dir=None if args.files_dir is None else Path(args.files_dir),
    )


def _engine_config(args: argparse.Namespace) -> EngineConfig:
    return EngineConfig(cache_tokens=args.cache_tokens, cache_dir=args.cache_dir, max_requests=args.max_requests)
