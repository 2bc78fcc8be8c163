"""One line of JSON for each request, and the number it goes by: never headers, keys or text."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping
from contextvars import ContextVar
from time import perf_counter
from uuid import uuid4

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openm3.server.errors import RequestError, error_body, refusal

_log = logging.getLogger("openm3.server")

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

# A wrong key stays wrong, but Claude Code would try it ten times. Who sends a body byte by byte would go on doing so.
_HEADERS = {
    401: {"WWW-Authenticate": "Bearer", "x-should-retry": "false"},
    408: {"Connection": "close"},
    429: {"Retry-After": "1"},
}

_tokens: ContextVar[dict[str, int] | None] = ContextVar("tokens", default=None)
"""What the request that is being answered has cost so far: it reaches into all of the request's tasks."""


def count_tokens(*, prompt: int = 0, completion: int = 0) -> None:
    """Add to what the line of the request at hand will say; outside of one nothing happens."""
    tokens = _tokens.get()
    if tokens is not None:
        tokens["prompt_tokens"] = tokens.get("prompt_tokens", 0) + prompt
        tokens["completion_tokens"] = tokens.get("completion_tokens", 0) + completion


def request_id(scope: Scope) -> str:
    """The number of a request that `RequestLog` let through."""
    name: str = scope.get("state", {}).get("request_id", "")
    return name


def respond(error: RequestError, scope: Scope, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """What a refused request is answered with."""
    own = _HEADERS.get(error.status, {})
    return JSONResponse(error_body(error, scope["path"], request_id(scope)), error.status, {**own, **(headers or {})})


class RequestLog:
    """Gives every request a number, the client's `x-request-id` if that is sane, and returns it; logs its end.

    What nobody foresaw is logged with its trace, and told to the client as an internal error.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        name = given if _ID.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = name
        begin = perf_counter()
        tokens: dict[str, int] = {}
        status = 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # Anthropic's clients look for the second one.
                ids = [(b"x-request-id", name.encode()), (b"request-id", name.encode())]
                message = {**message, "headers": [*message.get("headers", ()), *ids]}
            await send(message)

        context = _tokens.set(tokens)
        try:
            await self._app(scope, receive, tagged)
        except Exception as error:
            _log.exception("request %s failed", name)
            if not status:
                await respond(refusal(error), scope)(scope, receive, tagged)
        finally:
            _tokens.reset(context)
            line = {"id": name, "method": scope["method"], "path": scope["path"][:256], "status": status}
            line |= {"seconds": round(perf_counter() - begin, 4), **tokens}
            _log.info("request", extra={"fields": line})


class JsonLines(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, object] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to_stderr(level: str = "info") -> None:
    """Have the server, the engine and uvicorn log JSON lines to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, least in (("openm3", level.upper()), ("uvicorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(least)
