"""Whatever files come, each is answered with 200 or a 400 that says why, and server and workers go on as before."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from openm3.model.model import Model, load
from openm3.server.app import create_app
from openm3.server.service import Service
from openm3.server.settings import ServerSettings
from tests.server.media.samples import SEEING, picture, uri
from tests.server.serving import serving
from tests.tokens.test_media_fuzz import SEEDS, mutated

OTHERS = [
    b"<svg xmlns='http://www.w3.org/2000/svg'><text font-family='x'>x</text></svg>",
    b"<!doctype html><html></html>",
    b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    b"%PDF-1.7",
    b"PK\x03\x04",
    b"\0\1\0\0\0",
    b"",
    b"\0" * 1000,
    b"plain text",
]
"""Files that are neither pictures nor videos."""

SETTINGS = ServerSettings(names=("m3",), media_cache_bytes=1 << 20, media_seconds=20.0)


@pytest.fixture(scope="module")
def seeing() -> Model:
    return load(SEEING)


def files(count: int) -> Iterator[tuple[str, bytes]]:
    chance = random.Random(count)
    seeds = [make() for make in SEEDS.values()]
    for i in range(count):
        data = OTHERS[i // 20 % len(OTHERS)] if i % 20 == 0 else mutated(chance.choice(seeds), chance)
        yield chance.choice(("image_url", "video_url", "file")), data


def peak(pid: int) -> int:
    """Resident KiB of a process; 0 where the system does not say."""
    status = Path(f"/proc/{pid}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)


def whole(kind: str, data: bytes) -> dict[str, Any]:
    """A request that shows a file, and has nothing written about it but one token."""
    part = {"type": kind, kind: {"url" if kind != "file" else "file_data": uri(data)}}
    text = {"type": "text", "text": "?"}
    return {"model": "m3", "messages": [{"role": "user", "content": [part, text]}], "max_tokens": 1}


def bombard(seeing: Model, count: int) -> None:
    async def test(client: httpx.AsyncClient, service: Service) -> None:
        sound = whole("image_url", picture())
        assert (await client.post("/v1/chat/completions", json=sound)).status_code == 200
        workers = service._media._workers.pids
        found: dict[int, int] = {}
        early = 0
        for i, (kind, data) in enumerate(files(count)):
            reply = await client.post("/v1/chat/completions", json=whole(kind, data))
            found[reply.status_code] = found.get(reply.status_code, 0) + 1
            if reply.status_code == 400:
                message = reply.json()["error"]["message"]
                # What is whole but larger than the cache is refused by its length.
                assert message.startswith("messages[0].content[0]: ") or "prompt is too long" in message, message
            else:
                assert reply.status_code == 200, reply.text
            if i == count // 2:
                early = sum(map(peak, service._media._workers.pids))
        assert set(found) == {200, 400} and min(found.values()) > count // 10
        assert service._media._workers.pids == workers
        assert sum(map(peak, workers)) < early + 100_000
        assert (await client.post("/v1/chat/completions", json=sound)).status_code == 200

    async def played() -> None:
        async with (
            serving(seeing, SETTINGS) as service,
            httpx.AsyncClient(
                transport=httpx.ASGITransport(create_app(service)), base_url="http://127.0.0.1", timeout=120
            ) as client,
        ):
            await test(client, service)

    asyncio.run(played())


def test_damaged_files(seeing: Model) -> None:
    bombard(seeing, 200)


@pytest.mark.e2e
def test_thousands_of_damaged_files(seeing: Model) -> None:
    bombard(seeing, 5_000)
