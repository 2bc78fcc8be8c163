"""Uploaded files: kept, listed, given back, removed, and no more of them than there is room for."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import time
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from openm3.errors import ConfigError
from openm3.model.model import Model
from openm3.server.app import create_app
from openm3.server.errors import RequestError
from openm3.server.files import FileStore
from openm3.server.settings import ServerSettings
from tests.server.serving import serving


@pytest.fixture
def ask(model: Model, tmp_path: Path) -> Callable[[Callable[[httpx.AsyncClient], Awaitable[None]]], None]:
    def run(test: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
        async def whole() -> None:
            async with serving(model, ServerSettings(files_dir=tmp_path, max_file_bytes=1000)) as service:
                transport = httpx.ASGITransport(create_app(service))
                async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                    await test(client)

        asyncio.run(whole())

    return run


def sent(content: bytes, name: str = "a.mp4") -> dict[str, Any]:
    return {"file": (name, content, "video/mp4")}


def test_a_files_way(ask: Any) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        file = (await client.post("/v1/files", files=sent(b"\x00abc"), data={"purpose": "x"})).json()
        assert (
            file["object"] == "file" and file["bytes"] == 4 and file["filename"] == "a.mp4" and file["purpose"] == "x"
        )
        assert file["status"] == "processed" and file["expires_at"] - file["created_at"] == 7 * 24 * 3600
        assert (await client.get(f"/v1/files/{file['id']}")).json() == file
        content = await client.get(f"/v1/files/{file['id']}/content")
        assert content.content == b"\x00abc" and content.headers["content-type"] == "application/octet-stream"
        assert content.headers["content-disposition"] == 'attachment; filename="a.mp4"'
        uploaded = (await client.post("/v1/files/upload", files=sent(b"def", "ä b.txt"))).json()
        assert uploaded["base_resp"] == {"status_code": 0, "status_msg": "success"}
        other = uploaded["file"]
        assert other["file_id"] != file["id"] and other["purpose"] == "video_understanding" and other["bytes"] == 3
        listed = (await client.get("/v1/files")).json()
        assert {entry["id"] for entry in listed["data"]} == {file["id"], other["file_id"]}
        assert listed["has_more"] is False and listed["first_id"] == listed["data"][0]["id"]
        only = (await client.get("/v1/files", params={"purpose": "x"})).json()["data"]
        assert [entry["id"] for entry in only] == [file["id"]]
        gone = await client.delete(f"/v1/files/{file['id']}")
        assert gone.json() == {"id": file["id"], "object": "file", "deleted": True}
        assert (await client.get(f"/v1/files/{file['id']}")).status_code == 404
        assert (await client.delete(f"/v1/files/{file['id']}")).status_code == 404

    ask(test)


@pytest.mark.parametrize("name", ["file-0", "file-" + "0" * 32, "..%2f..%2fetc%2fpasswd", "%00", "x" * 3000])
def test_what_is_not_there_is_told(ask: Any, name: str) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        for path in (f"/v1/files/{name}", f"/v1/files/{name}/content"):
            answer = await client.get(path)
            assert answer.status_code == 404 and answer.json()["type"] == "error"

    ask(test)


def test_uploads_that_are_wrong_are_refused(ask: Any) -> None:
    async def test(client: httpx.AsyncClient) -> None:
        empty = await client.post("/v1/files", files=sent(b""))
        assert (empty.status_code, empty.json()["error"]["message"]) == (400, "the file is empty (2013)")
        assert (await client.post("/v1/files", files=sent(b"x" * 1001))).status_code == 413
        assert (await client.post("/v1/files", files=sent(b"x" * 20_000))).status_code == 413
        missing = await client.post("/v1/files", data={"purpose": "x"})
        assert (missing.status_code, missing.json()["error"]["param"]) == (400, "file")
        assert (await client.post("/v1/files", json={"file": "x"})).status_code == 400
        torn = {"content-type": "multipart/form-data; boundary=b"}
        assert (await client.post("/v1/files", content=b"--c\r\nx", headers=torn)).status_code == 400
        assert (await client.post("/v1/files", files=sent(b"x"), data={"purpose": "x" * 65})).status_code == 400
        assert (await client.get("/v1/files")).json()["data"] == []

    ask(test)


def test_files_outlive_a_server_but_not_their_time(tmp_path: Path) -> None:
    settings = ServerSettings(files_dir=tmp_path / "new" / "files")
    kept = FileStore(settings).add(io.BytesIO(b"abc"), "a", "x")
    store = FileStore(settings)
    assert store.get(kept.id) == kept and store.path(kept.id).read_bytes() == b"abc"
    short = FileStore(ServerSettings(files_dir=settings.files_dir, file_seconds=-5.0))
    old = short.add(io.BytesIO(b"abc"), "a", "x")
    assert old.expires_at < time()
    with pytest.raises(RequestError, match="there is no file"):
        store.get(old.id)
    assert not store.path(old.id).exists() and store.files() == [kept]


def test_there_is_room_for_so_much(tmp_path: Path) -> None:
    store = FileStore(ServerSettings(files_dir=tmp_path, max_files_bytes=10))
    first = store.add(io.BytesIO(b"x" * 6), "a", "x")
    with pytest.raises(RequestError, match="no room for more files") as caught:
        store.add(io.BytesIO(b"x" * 5), "a", "x")
    assert caught.value.status == 413
    store.delete(first.id)
    assert store.add(io.BytesIO(b"x" * 5), "a", "x").bytes == 5


def test_a_temporary_folder_goes_with_the_server(model: Model) -> None:
    async def whole() -> None:
        async with serving(model) as service:
            app: FastAPI = create_app(service)
            async with app.router.lifespan_context(app):
                transport = httpx.ASGITransport(app)
                async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                    file = (await client.post("/v1/files", files=sent(b"abc"))).json()
                    assert (await client.get(f"/v1/files/{file['id']}")).status_code == 200
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                assert (await client.get("/v1/files")).json()["data"] == []

    asyncio.run(whole())


def test_a_temporary_folder_is_made_for_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = FileStore(ServerSettings())
    with pytest.raises(RequestError, match="there is no file"):
        store.get("file-" + "0" * 32)
    assert store.files() == [] and list(tmp_path.iterdir()) == []
    for _ in range(2):
        kept = store.add(io.BytesIO(b"abc"), "a", "x")
        assert store.files() == [kept] and len(list(tmp_path.iterdir())) == 1
        store.close()
        assert store.files() == [] and list(tmp_path.iterdir()) == []
    store.add(io.BytesIO(b"abc"), "a", "x")
    del store
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_servers_folder_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
import io, os, signal
from openm3.server.files import FileStore
from openm3.server.settings import ServerSettings
store = FileStore(ServerSettings())
store.add(io.BytesIO(b"abc"), "a", "x")
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert len(list(left.iterdir())) == 3
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = FileStore(ServerSettings())
    assert list(tmp_path.iterdir()) == []
    kept = mine.add(io.BytesIO(b"abc"), "a", "x")
    other = FileStore(ServerSettings())
    assert mine.get(kept.id) == kept and mine.path(kept.id).read_bytes() == b"abc"
    for store in (mine, other):
        store.close()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="files cannot be kept in"):
        FileStore(ServerSettings(files_dir=tmp_path / "file" / "below"))
