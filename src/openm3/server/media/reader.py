"""From what a request names to what the model sees: bytes fetched, decoded by the workers, kept for the next turn."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote_to_bytes
from weakref import WeakValueDictionary

from openm3.errors import BusyError, PromptError
from openm3.server.errors import RequestError
from openm3.server.files import FileStore
from openm3.server.media.fetch import Fetcher
from openm3.server.media.parts import Wanted
from openm3.server.media.process import Job
from openm3.server.media.workers import Workers
from openm3.server.settings import ServerSettings
from openm3.tokens.media import Media
from openm3.tokens.sources import MediaLimits

MOST_SENT = 52_428_800
"""Bytes of a video that comes with its request or from the web; uploaded ones may have more."""

_SPACE = b" \t\r\n\f"


class MediaReader:
    """Reads what requests show. `close` it.

    What was read last is kept, up to `media_cache_bytes`, by the content of its file and the options: the same picture
    in the next turn is neither decoded nor resized again.
    """

    def __init__(self, files: FileStore, settings: ServerSettings, fetcher: Fetcher | None = None) -> None:
        self._files = files
        self._settings = settings
        self._fetcher = fetcher or (Fetcher() if settings.allow_media_urls else None)
        self._workers = Workers(settings.media_workers, memory=settings.media_memory_bytes)
        self._limits = MediaLimits()
        self._kept = _Kept(settings.media_cache_bytes)
        self._locks: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()
        self._num_waiting = 0

    async def read(self, wanted: Sequence[Wanted]) -> list[Media]:
        """All of them, in order.

        Raises RequestError, which names the part, for one that is bad, BusyError if too many requests wait already.
        """
        if not wanted:
            return []
        with self._place():
            return [await self._read(one) for one in wanted]

    def close(self) -> None:
        """End the workers."""
        self._workers.close()

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self._num_waiting >= self._settings.max_media_waiting:
            raise BusyError(f"{self._num_waiting} requests with pictures or videos wait already: try again later")
        self._num_waiting += 1
        try:
            yield
        finally:
            self._num_waiting -= 1

    async def _read(self, one: Wanted) -> Media:
        try:
            return await self._found(one)
        except PromptError as error:
            raise RequestError(f"{one.where}: {error}", param=one.where) from None
        except RequestError as error:
            status = error.status if error.status >= 500 else 400
            raise RequestError(
                f"{one.where}: {error.message}", status=status, param=one.where, code=error.code
            ) from None

    async def _found(self, one: Wanted) -> Media:
        name, source = await self._located(one)
        key = hashlib.blake2b(name + repr((one.kind, one.image, one.video)).encode()).digest()
        # Choices of one request ask for the same: the first has it read, the others find it.
        async with self._locks.setdefault(key, asyncio.Lock()):
            if (kept := self._kept.get(key)) is not None:
                return kept
            job = Job(one.kind, one.image, one.video, self._limits, self._settings.media_seconds)
            media = await self._workers.read(job, source)
            self._kept.add(key, media)
            return media

    async def _located(self, one: Wanted) -> tuple[bytes, bytes | Path]:
        """What tells a file's content from all others', and the content or where it is."""
        scheme = one.url[:10].partition(":")[0].lower()
        if scheme == "mm_file":
            # Files never change.
            file = await asyncio.to_thread(self._files.get, one.url.partition("://")[2])
            return file.id.encode(), self._files.path(file.id)
        if scheme == "data":
            data = await asyncio.to_thread(data_of, one.url)
        elif scheme not in ("http", "https"):
            raise PromptError(f"the address must begin with data:, mm_file:// or https://, not {one.url[:20]!r}")
        elif self._fetcher is None:
            raise PromptError(
                "this server fetches nothing from the web: send a data: URI, upload a file and name it as "
                "mm_file://FILE_ID, or start the server with --allow-media-urls"
            )
        else:
            data = await self._fetcher.get(one.url, MOST_SENT)
        if len(data) > MOST_SENT:
            raise PromptError(f"it is longer than {MOST_SENT:,} bytes: upload it, and name it as mm_file://FILE_ID")
        return await asyncio.to_thread(lambda: hashlib.blake2b(data).digest()), data


class _Kept:
    """The media used last, together no more than so many bytes."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._size = 0
        self._media: OrderedDict[bytes, Media] = OrderedDict()

    def get(self, key: bytes) -> Media | None:
        if key in self._media:
            self._media.move_to_end(key)
        return self._media.get(key)

    def add(self, key: bytes, media: Media) -> None:
        self._media[key] = media
        self._size += media.patch_IC.nbytes
        while self._size > self._most:
            _, oldest = self._media.popitem(last=False)
            self._size -= oldest.patch_IC.nbytes


def data_of(uri: str) -> bytes:
    """The bytes in a data URI: base64, with line breaks and without padding if its writer liked, or percent-encoded.

    Raises PromptError for one that is corrupted. What it says of its type does not matter: files are told by their
    bytes.
    """
    head, comma, body = uri.partition(",")
    if not comma:
        raise PromptError("the data: URI has no comma before its data")
    data = unquote_to_bytes(body) if "%" in body else body.encode("utf-8", "replace")
    if not re.search(r";\s*base64\s*$", head, re.IGNORECASE):
        return data
    data = data.translate(None, _SPACE).rstrip(b"=")
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError:
        raise PromptError("the base64 data is corrupted: it has other characters, or was cut off") from None
