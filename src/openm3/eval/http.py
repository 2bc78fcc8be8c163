"""A client of the server's streams that takes next to no time: what it used, the server beside it would not have."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from http import HTTPStatus
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from openm3.errors import OpenM3Error


class ReplyError(OpenM3Error):
    """A server that refused a request, or broke a reply off. `status` is HTTP's, 200 for a reply that had begun."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"the server answered {status}: {message}")
        self.status = status


@dataclass(frozen=True)
class Address:
    """Where a server is, `http://host:port`, and the key that it wants, if any."""

    url: str
    key: str | None = field(default=None, repr=False)

    async def opened(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection. Raises OSError."""
        parts = urlsplit(self.url)
        is_secure = parts.scheme == "https"
        return await asyncio.open_connection(
            parts.hostname, parts.port or (443 if is_secure else 80), ssl=True if is_secure else None, limit=1 << 20
        )

    def request(self, method: str, path: str, body: object = None) -> bytes:
        """A whole request, after which the server closes the connection. A body of bytes is sent as it is."""
        parts = urlsplit(self.url)
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {parts.path.rstrip('/')}{path} HTTP/1.1", f"Host: {parts.netloc}", "Connection: close"]
        lines += [f"Authorization: Bearer {self.key}"] if self.key else []
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
        return "\r\n".join([*lines, "", ""]).encode() + data


@dataclass
class Heard:
    """A streamed reply: its packets' data and when each came, in seconds after the request was sent."""

    times: list[float] = field(default_factory=list)
    packets: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


async def fetch(address: Address, method: str, path: str, body: object = None) -> tuple[int, bytes]:
    """A whole answer: its status and body. Raises OSError where there is none."""
    async with contextlib.aclosing(_parts(address, address.request(method, path, body))) as parts:
        status = int(await anext(parts))
        return status, b"".join([part async for part in parts])


async def listen(address: Address, path: str, body: object) -> Heard:
    """Send a request, and hear its stream to the end. Raises ReplyError and OSError."""
    begin = perf_counter()
    raw: list[bytes] = []
    heard = Heard()
    async with contextlib.aclosing(_parts(address, address.request("POST", path, body))) as parts:
        status = int(await anext(parts))
        async for part in parts:
            heard.times.append(perf_counter() - begin)
            raw.append(part)
    heard.seconds = perf_counter() - begin
    if status != HTTPStatus.OK:
        raise ReplyError(status, b"".join(raw).decode("utf-8", "replace")[:300])
    # Read when all is over: nobody else's packets wait for it.
    kept = [(time, data) for time, part in zip(heard.times, raw, strict=True) for data in packets(part)]
    heard.times, heard.packets = [time for time, _ in kept], [data for _, data in kept]
    for data in heard.packets:
        if data.get("error"):
            raise ReplyError(status, str(data["error"])[:300])
    return heard


def packets(part: bytes) -> list[dict[str, Any]]:
    """The data of the whole server-sent events in some bytes, but not that of `[DONE]`."""
    lines = (line.removeprefix(b"data: ") for line in part.split(b"\n") if line.startswith(b"data: {"))
    return [json.loads(line) for line in lines]


async def _parts(address: Address, request: bytes) -> AsyncGenerator[bytes]:
    """The status, then the body in the parts that it was sent in."""
    reader, writer = await address.opened()
    try:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        status, _, fields = head.partition(b"\r\n")
        yield status.split(b" ", 2)[1]
        async for part in _body(reader, fields.lower()):
            yield part
    except asyncio.IncompleteReadError:
        raise ConnectionResetError("the server hung up in the middle of an answer") from None
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _body(reader: asyncio.StreamReader, fields: bytes) -> AsyncIterator[bytes]:
    if b"transfer-encoding: chunked" not in fields:
        while part := await reader.read(1 << 16):
            yield part
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        part = await reader.readexactly(size + 2)
        yield part[:-2]
