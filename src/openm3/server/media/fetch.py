"""Media from the web, where a server allows it: from public addresses alone, within limits of size and time.

A host's name is looked up once, what it says is checked, and the connection goes to exactly that address: a name that
changes its mind between check and use gains nothing. Redirects begin anew with all of this.
"""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import h11

from openm3.errors import PromptError

MOST_REDIRECTS = 3

_REDIRECTS = (301, 302, 303, 307, 308)
_PIECE = 1 << 16

Resolve = Callable[[str, int], Awaitable[list[str]]]


def is_public(address: str) -> bool:
    """Whether an address is one of the public internet, not of this machine, its networks or a way around to them."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip not in ipaddress.ip_network("2000::/3") or ip.sixtofour is not None or ip.teredo is not None:
            return False
    return ip.is_global and not ip.is_multicast


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=1)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Fetcher:
    """Gets what stands at an address of http or https. Certificates are verified, and nothing is sent but the request.

    `resolve`, `allows` (which addresses) and `context` (of TLS) are for tests.
    """

    def __init__(
        self,
        seconds: float = 30.0,
        *,
        resolve: Resolve = resolve,
        allows: Callable[[str], bool] = is_public,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._seconds = seconds
        self._resolve = resolve
        self._allows = allows
        self._context = context

    async def get(self, url: str, most: int) -> bytes:
        """At most `most` bytes. Raises PromptError for whatever goes wrong."""
        try:
            async with asyncio.timeout(self._seconds):
                for _ in range(MOST_REDIRECTS + 1):
                    found = await self._answer(url, most)
                    if isinstance(found, bytes):
                        return found
                    url = urljoin(url, found)
        except TimeoutError:
            raise PromptError(f"the address did not give it within {self._seconds:g} s") from None
        raise PromptError(f"the address redirects more than {MOST_REDIRECTS} times")

    async def _answer(self, url: str, most: int) -> bytes | str:
        """The body, or where it is instead."""
        parts = _checked(url)
        host, is_tls = parts.hostname or "", parts.scheme == "https"
        port = parts.port or (443 if is_tls else 80)
        address = await self._address(host, port)
        # Made here: reading the system's certificates takes a while.
        context = (self._context or ssl.create_default_context()) if is_tls else None
        try:
            reader, writer = await asyncio.open_connection(
                address, port, ssl=context, server_hostname=host if is_tls else None
            )
        except ssl.SSLCertVerificationError as error:
            raise PromptError(f"the certificate of {host} is not valid: {error.verify_message}") from None
        except OSError:
            raise PromptError(f"{host} cannot be reached") from None
        try:
            return await _exchange(reader, writer, parts, most)
        except (OSError, h11.RemoteProtocolError):
            raise PromptError(f"{host} broke the connection off, or does not speak HTTP") from None
        finally:
            writer.close()
            with suppress(OSError):
                writer.transport.abort()

    async def _address(self, host: str, port: int) -> str:
        """The address to connect to. Raises PromptError unless all that the host has are allowed."""
        try:
            found = await self._resolve(host, port)
        except (OSError, UnicodeError):
            found = []
        if not found:
            raise PromptError(f"the host {host[:100]!r} is not known")
        if not all(map(self._allows, found)):
            raise PromptError(f"the host {host[:100]!r} is not at a public address")
        return found[0]


def _checked(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise PromptError("it must come from an address of http:// or https://")
    if parts.username is not None or parts.password is not None:
        raise PromptError("an address may not hold a name or password")
    return parts


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, parts: SplitResult, most: int
) -> bytes | str:
    client = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 16)
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + (
        "?" + quote(parts.query, safe="/?%:@!$&'()*+,;=~") if parts.query else ""
    )
    host = parts.netloc.encode("idna").decode() if not parts.netloc.isascii() else parts.netloc
    headers = [("Host", host), ("User-Agent", "openm3"), ("Accept", "image/*, video/*"), ("Connection", "close")]
    writer.write(client.send(h11.Request(method="GET", target=target, headers=headers)) or b"")
    await writer.drain()
    body = bytearray()
    while True:
        event: Any = client.next_event()
        if event is h11.NEED_DATA:
            client.receive_data(await reader.read(_PIECE))
        elif isinstance(event, h11.Response):
            given = {name.lower(): value for name, value in event.headers}
            if event.status_code in _REDIRECTS and b"location" in given:
                return str(given[b"location"].decode("latin-1"))
            if event.status_code != 200:
                raise PromptError(f"the address answers with status {event.status_code}")
            if given.get(b"content-encoding", b"identity") != b"identity":
                raise PromptError("the address gives it compressed, which was not asked for")
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > most:
                raise PromptError(f"the file is larger than {most:,} bytes")
        elif isinstance(event, h11.EndOfMessage):
            return bytes(body)
        elif isinstance(event, h11.ConnectionClosed):
            raise h11.RemoteProtocolError("closed")
