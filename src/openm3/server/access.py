"""Who may ask: keys, and on an open loopback address nothing that a web page elsewhere has a browser send."""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterator
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from openm3.server.errors import RequestError
from openm3.server.logs import respond
from openm3.server.settings import ServerSettings, is_loopback

OPEN = ("/health", "/ready", "/")
"""Paths that need no key: probes, and the page, which asks its user for one. /metrics needs one, it tells of use."""

OPEN_BELOW = ("/page/",)
"""Where the page's own files are: they hold nothing of anybody's."""


_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]+))(?::\d+)?")


class Access:
    """Refuses requests without a right key: 401. Where no keys are set, those of foreign web pages: 403."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._digests = [sha256(key.encode()).digest() for key in settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self._refused(scope) if scope["type"] == "http" else None
        if refused is None:
            await self._app(scope, receive, send)
            return
        await respond(refused, scope)(scope, receive, send)

    def _refused(self, scope: Scope) -> RequestError | None:
        path, headers = scope["path"], Headers(scope=scope)
        if self._digests:
            if path in OPEN or path.startswith(OPEN_BELOW) or any(map(self._knows, _keys(headers))):
                return None
            wanted = "send one as `Authorization: Bearer KEY` or `x-api-key: KEY`"
            given = next(_keys(headers), None)
            message = f"no API key: {wanted}" if given is None else f"this API key is not known here: {wanted}"
            return RequestError(message, status=401, code="invalid_api_key")
        return self._foreign(headers) if is_loopback(self._settings.host) else None

    def _knows(self, key: str) -> bool:
        digest = sha256(key.encode()).digest()
        # All of them, so that the time says nothing of which one it was.
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0

    def _foreign(self, headers: Headers) -> RequestError | None:
        """A page elsewhere can have a browser call this machine: by a name of its own, or telling its origin."""
        host = headers.get("host", "localhost")
        named = _HOST.fullmatch(host.lower())
        name = "" if named is None else named[1] or named[2]
        if not (is_loopback(name) or name == self._settings.host):
            message = f"the Host {host[:100]!r} is not this machine: give the server keys to be called by other names"
            return RequestError(message, status=403, code="foreign_host")
        origin = headers.get("origin")
        if origin is None or origin in self._settings.cors_origins or "*" in self._settings.cors_origins:
            return None
        if origin.partition("://")[2] != host:
            message = f"pages of {origin[:100]!r} may not call this server: see --cors-origin"
            return RequestError(message, status=403, code="foreign_origin")
        return None


def _keys(headers: Headers) -> Iterator[str]:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        yield key.strip()
    if key := headers.get("x-api-key", "").strip():
        yield key
