"""What one request may take: header and body bytes, time to send them, and a place among those that run."""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openm3.server.errors import RequestError
from openm3.server.logs import respond
from openm3.server.settings import ServerSettings

SLOWEST = 10_000
"""Bytes a second that a body may take after its first `body_seconds`."""

FREE = ("/health", "/ready", "/metrics")
"""Paths that are answered however many requests run."""

UPLOADS = "/v1/files"


class Limits:
    """Refuses what is too much: 431, 413, 408, 429. Bodies are whole before anything reads them; uploads stream."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._num_running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in FREE:
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
            self._num_running += 1
            try:
                limited = await self._limited(scope, receive)
                if limited is not None:
                    await self._app(scope, limited, send)
            finally:
                self._num_running -= 1
        except RequestError as error:
            await respond(error, scope)(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        settings = self._settings
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size + len(scope.get("query_string", b"")) > settings.max_header_bytes:
            raise RequestError(f"the headers are longer than {settings.max_header_bytes} bytes", status=431)
        if self._num_running >= settings.max_concurrent:
            raise RequestError(f"{settings.max_concurrent} requests run already: try again later", status=429)

    async def _limited(self, scope: Scope, receive: Receive) -> Receive | None:
        """What gives the body, within its limits; None if the client went away while sending it."""
        is_upload = scope["path"].startswith(UPLOADS)
        most = self._settings.max_file_bytes + 10_000 if is_upload else self._settings.max_body_bytes
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > most:
            raise _too_long(most)
        body = _Body(receive, most, self._settings.body_seconds)
        if is_upload:
            return body.part
        whole = bytearray()
        while True:
            message = await body.part()
            if message["type"] == "http.disconnect":
                return None
            whole += message.get("body", b"")
            if not message.get("more_body", False):
                break
        first: list[Message] = [{"type": "http.request", "body": bytes(whole), "more_body": False}]
        del whole

        async def replayed() -> Message:
            return first.pop() if first else await receive()

        return replayed


class _Body:
    """A body as it comes, no longer and no slower than is allowed."""

    def __init__(self, receive: Receive, most: int, seconds: float) -> None:
        self._receive = receive
        self._most = most
        self._size = 0
        self._due = asyncio.get_running_loop().time() + seconds
        self._is_whole = False

    async def part(self) -> Message:
        if self._is_whole:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._due + self._size / SLOWEST):
                message = await self._receive()
        except TimeoutError:
            raise _Refused("the body came too slowly", status=408) from None
        self._size += len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)
        if self._size > self._most:
            raise _too_long(self._most)
        return message


class _Refused(RequestError, HTTPException):
    """Passes unchanged through what reads forms."""

    def __init__(self, message: str, *, status: int) -> None:
        RequestError.__init__(self, message, status=status)
        self.status_code, self.detail, self.headers = status, message, None


def _too_long(most: int) -> RequestError:
    return _Refused(f"the body is longer than {most} bytes", status=413)
