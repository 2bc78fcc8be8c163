"""A client of the server's streams that takes next to no time: what it used, the server beside it would not have."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from openm3.errors import OpenM3Error


class ReplyError(OpenM3Error):
    """A server that refused a request, or broke a reply off: with an error, or by hanging up."""


@dataclass(frozen=True)
class Address:
    """Where a server is, `http://host:port`, and the key that it wants, if any."""

    url: str
    key: str | None = field(default=None, repr=False)

    async def connect(self, limit: int = 1 << 20) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection that reads about `limit` bytes ahead. Raises OSError."""
        parts = urlsplit(self.url)
        is_secure = parts.scheme == "https"
        port = parts.port or (443 if is_secure else 80)
        return await asyncio.open_connection(parts.hostname, port, ssl=True if is_secure else None, limit=limit)

    def request(self, method: str, path: str, body: object = None) -> bytes:
        """A whole request, after which the server closes the connection. A body of bytes is sent as it is."""
        parts = urlsplit(self.url)
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {parts.path.rstrip('/')}{path} HTTP/1.1", f"Host: {parts.netloc}", "Connection: close"]
        lines += [f"Authorization: Bearer {self.key}"] if self.key else []
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        return "\r\n".join([*lines, "", ""]).encode() + data


@asynccontextmanager
async def opened(
    address: Address, method: str, path: str, body: object = None, *, limit: int = 1 << 20, abort: bool = False
) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
    """Send a request: the answer's status, and its body in the parts that it was sent in.

    With `abort` the connection is reset at the end, whatever may still come. Raises OSError, and ReplyError where the
    server hangs up before the answer is whole.
    """
    reader, writer = await address.connect(limit)
    try:
        writer.write(address.request(method, path, body))
        head = await reader.readuntil(b"\r\n\r\n")
        yield int(head.split(b" ", 2)[1]), _parts(reader, head.lower())
    except asyncio.IncompleteReadError:
        raise ReplyError("the server hung up in the middle of an answer") from None
    finally:
        if abort:
            writer.transport.abort()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _parts(reader: asyncio.StreamReader, head: bytes) -> AsyncIterator[bytes]:
    if b"\r\ntransfer-encoding: chunked" not in head:
        while part := await reader.read(1 << 16):
            yield part
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def fetch(address: Address, method: str, path: str, body: object = None) -> bytes:
    """The body of a whole answer. Raises ReplyError for an error, and OSError where there is no server."""
    async with opened(address, method, path, body) as (status, parts):
        data = b"".join([part async for part in parts])
    if status != HTTPStatus.OK:
        raise ReplyError(f"the server answered {status}: {_shown(data)}")
    return data


@dataclass(frozen=True)
class Heard:
    """A streamed reply: its packets' data and when each came. Times are seconds after the request was sent."""

    packets: list[dict[str, Any]]
    times: list[float]
    seconds: float


async def listen(address: Address, path: str, body: object) -> Heard:
    """Send a request, and hear its stream to the end. Raises ReplyError and OSError."""
    begin = perf_counter()
    raw: list[tuple[float, bytes]] = []
    async with opened(address, "POST", path, body) as (status, parts):
        async for part in parts:
            raw.append((perf_counter() - begin, part))
    seconds = perf_counter() - begin
    # Read when all is over: nobody else's packets wait for it.
    told = [(data, time) for time, part in raw for data in packets(part)]
    failed = status != HTTPStatus.OK or any(data.get("error") for data, _ in told)
    if failed or not told:
        raise ReplyError(f"the server answered {status}: {_shown(b''.join(part for _, part in raw))}")
    return Heard([data for data, _ in told], [time for _, time in told], seconds)


def packets(part: bytes) -> list[dict[str, Any]]:
    """The data of the whole server-sent events in some bytes; `[DONE]` is none."""
    return [json.loads(line[6:]) for line in part.split(b"\n") if line.startswith(b"data: {")]


def _shown(data: bytes) -> str:
    return data[-300:].decode("utf-8", "replace")
