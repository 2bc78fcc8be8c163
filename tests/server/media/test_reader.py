"""Where bytes come from, what is kept, and how many may wait."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from openm3 import Media, read_image
from openm3.errors import BusyError, PromptError
from openm3.server.errors import RequestError
from openm3.server.files import FileStore
from openm3.server.media.process import Job
from openm3.server.media.reader import MOST_SENT, MediaReader, data_of
from openm3.server.settings import ServerSettings
from tests.server.media.samples import picture, shown, uri


class Web:
    """Stands in for the web."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.asked: list[str] = []

    async def get(self, url: str, most: int) -> bytes:
        self.asked.append(url)
        return self.data


class Counted:
    """Stands in for the workers: reads here, and counts."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def read(self, job: Job, source: bytes | Path) -> Media:
        self.jobs.append(job)
        await self.gate.wait()
        return read_image(source, job.image, limits=job.limits)

    def close(self) -> None:
        pass


Test = Callable[[MediaReader, FileStore, Counted], Coroutine[Any, Any, None]]


def play(test: Test, fetcher: Any = None, **settings: Any) -> None:
    async def whole() -> None:
        chosen = ServerSettings(**settings)
        store = FileStore(chosen)
        reader = MediaReader(store, chosen, fetcher)
        reader.close()
        workers = Counted()
        reader._workers = workers  # type: ignore[assignment]
        try:
            await asyncio.wait_for(test(reader, store, workers), 30)
        finally:
            store.close()

    asyncio.run(whole())


def test_a_data_uri_is_read_and_kept() -> None:
    async def test(reader: MediaReader, store: FileStore, workers: Counted) -> None:
        wanted = shown(uri(picture()))
        (media,) = await reader.read([wanted])
        assert media.digest == read_image(picture()).digest
        # Another spelling of the same bytes.
        other = shown(uri(picture(), "IMAGE/X-PNG").replace("data:", "DATA:").rstrip("="))
        assert await reader.read([other, wanted]) == [media, media]
        assert len(workers.jobs) == 1
        await reader.read([shown(uri(picture()), detail="low"), shown(uri(picture("blue")))])
        assert len(workers.jobs) == 3
        assert await reader.read([]) == []

    play(test)


def test_no_more_is_kept_than_allowed() -> None:
    async def test(reader: MediaReader, store: FileStore, workers: Counted) -> None:
        red, green, blue = (shown(uri(picture(colour))) for colour in ("red", "green", "blue"))
        await reader.read([red, green, red, blue, red])
        assert len(workers.jobs) == 3
        await reader.read([green])
        assert len(workers.jobs) == 4

    # Two pictures of 64 patches.
    play(test, media_cache_bytes=2 * 64 * 1176)


def test_choices_of_one_request_share_a_job() -> None:
    async def test(reader: MediaReader, store: FileStore, workers: Counted) -> None:
        found = await asyncio.gather(*(reader.read([shown(uri(picture()))]) for _ in range(8)))
        assert len(workers.jobs) == 1
        assert all(media is found[0][0] for (media,) in found)

    play(test)


def test_uploaded_files() -> None:
    async def test(reader: MediaReader, store: FileStore, workers: Counted) -> None:
        file = store.add(io.BytesIO(picture()), "a.png", "vision")
        (media,) = await reader.read([shown(f"mm_file://{file.id}")])
        assert media.digest == read_image(picture()).digest
        await reader.read([shown(f"mm_file://{file.id}")])
        assert len(workers.jobs) == 1
        for name in ("file-0", f"file-{'0' * 32}", "../../etc/passwd", ""):
            with pytest.raises(RequestError, match=r"messages\[0\].content\[0\]: there is no file") as caught:
                await reader.read([shown(f"mm_file://{name}")])
            assert caught.value.status == 400

    play(test)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.org/a.png", "fetches nothing from the web: .* --allow-media-urls"),
        ("HTTP://example.org/a.png", "fetches nothing from the web"),
        ("file:///etc/passwd", "must begin with data:, mm_file:// or https://, not 'file:///etc/passwd'"),
        ("/etc/passwd", "must begin with"),
        ("data", "no comma"),
        ("data:image/png;base64", "no comma"),
        ("data:image/png;base64,AAAA*AAA", "base64 data is corrupted"),
        ("data:image/png;base64,AAAAA", "base64 data is corrupted"),
        ("data:image/png;base64,", "the file is empty"),
        ("data:image/png,hello", "the file is text, not a picture"),
        (uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "the file is SVG, not a picture"),
    ],
)
def test_refusals_name_the_part(url: str, words: str) -> None:
    async def test(reader: MediaReader, store: FileStore, workers: Counted) -> None:
        with pytest.raises(RequestError, match=words) as caught:
            await reader.read([shown(url)])
        assert caught.value.status == 400
        assert caught.value.param == "messages[0].content[0]"
        assert caught.value.message.startswith("messages[0].content[0]: ")

    play(test)


def test_addresses_where_they_are_allowed() -> None:
    web = Web(picture())

    async def test(reader: MediaReader, store: FileStore, workers: Counted) -> None:
        for _ in range(2):
            (media,) = await reader.read([shown("https://example.org/a.png")])
            assert media.digest == read_image(picture()).digest
        # What stands there may change; that it has not is seen in its bytes.
        assert web.asked == ["https://example.org/a.png"] * 2
        assert len(workers.jobs) == 1

    play(test, web)


def test_what_is_sent_has_a_limit() -> None:
    async def test(reader: MediaReader, store: FileStore, workers: Counted) -> None:
        with pytest.raises(RequestError, match="longer than 52,428,800 bytes: upload it"):
            await reader.read([shown("https://example.org/a.mp4", "video_url")])
        assert not workers.jobs

    play(test, Web(bytes(MOST_SENT + 1)))


def test_only_so_many_requests_wait() -> None:
    async def test(reader: MediaReader, store: FileStore, workers: Counted) -> None:
        workers.gate.clear()
        running = [asyncio.ensure_future(reader.read([shown(uri(picture(colour)))])) for colour in ("red", "blue")]
        while len(workers.jobs) < 2:
            await asyncio.sleep(0.001)
        with pytest.raises(BusyError, match="2 requests with pictures or videos wait already"):
            await reader.read([shown(uri(picture()))])
        assert await reader.read([]) == []
        workers.gate.set()
        await asyncio.gather(*running)
        assert len(await reader.read([shown(uri(picture()))])) == 1

    play(test, max_media_waiting=2)


@pytest.mark.parametrize("size", range(6))
def test_base64_however_it_is_written(size: int) -> None:
    data = bytes(255 - i for i in range(size))
    text = base64.b64encode(data).decode()
    spellings = [
        text,
        text.rstrip("="),
        "\r\n".join(text),
        f" {text}\n",
        text.replace("=", "%3D").replace("+", "%2B").replace("/", "%2f"),
    ]
    for body in spellings:
        for head in ("data:image/png;base64", "DATA:IMAGE/PNG;BASE64", "data:;base64", "data:a/b;x=y; base64"):
            assert data_of(f"{head},{body}") == data
    assert data_of("data:image/svg+xml," + "".join(f"%{byte:02X}" for byte in data)) == data
    with pytest.raises(PromptError):
        data_of(f"data:;base64,{text}é")
