"""Uploaded files: kept for some days under random ids, each with what is known of it beside it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from time import time
from typing import Annotated, BinaryIO, Literal
from uuid import uuid4

from fastapi import APIRouter, File, Form, UploadFile
from pydantic import BaseModel
from starlette.responses import FileResponse

from openm3.errors import ConfigError
from openm3.server.errors import RequestError
from openm3.server.openai_bodies import MiniMaxStatus
from openm3.server.settings import ServerSettings
from openm3.server.temporary import TemporaryFolder

_ID = re.compile(r"file-[0-9a-f]{32}")
_MOST_LISTED = 10_000
_CONTENT = {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}

Upload = Annotated[UploadFile, File(description="The file itself.")]
Purpose = Annotated[str, Form(max_length=64, description="What it is for, e.g. `video_understanding`.")]


@dataclass(frozen=True)
class StoredFile:
    """What is known of a file. Times in seconds of the clock."""

    id: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str


class FileStore:
    """Files in a folder; without one in `settings`, in a temporary one that `close` removes.

    Whoever may ask the server may use all of them: ids are random, and listed.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._temporary: TemporaryFolder | None = None
        if settings.files_dir is None:
            self._temporary = TemporaryFolder()
            self._folder = self._temporary.path
            return
        self._folder = settings.files_dir
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"files cannot be kept in {self._folder}: {error.strerror}") from None

    def add(self, content: BinaryIO, filename: str, purpose: str) -> StoredFile:
        """Keep a file. Raises RequestError for one that is empty or too long, and when the store is full."""
        self.expire()
        settings, size = self._settings, content.seek(0, os.SEEK_END)
        content.seek(0)
        if not size:
            raise RequestError("the file is empty", param="file")
        if size > settings.max_file_bytes:
            raise RequestError(f"the file is longer than {settings.max_file_bytes} bytes", status=413, param="file")
        if size + sum(file.bytes for file in self.files()) > settings.max_files_bytes:
            raise RequestError("there is no room for more files: delete some", status=413, param="file")
        if self._temporary is not None:
            self._temporary.make()
        now = int(time())
        file = StoredFile(f"file-{uuid4().hex}", size, now, now + int(settings.file_seconds), filename, purpose)
        with open(self._folder / f"{file.id}.part", "wb") as target:
            shutil.copyfileobj(content, target, 1 << 20)
        (self._folder / f"{file.id}.part").rename(self.path(file.id))
        # Last: a file is there when what is known of it is.
        (self._folder / f"{file.id}.json").write_text(json.dumps(asdict(file)), encoding="utf-8")
        return file

    def get(self, name: str) -> StoredFile:
        """A file by its id. Raises RequestError for one that is not there."""
        self.expire()
        file = self._read(name) if _ID.fullmatch(name) else None
        if file is None:
            raise RequestError(f"there is no file {name[:100]!r}", status=404, param="file_id", code="file_not_found")
        return file

    def path(self, name: str) -> Path:
        """Where a file's content is."""
        return self._folder / f"{name}.bin"

    def files(self) -> list[StoredFile]:
        """All files, the newest first."""
        found = [file for path in self._folder.glob("file-*.json") if (file := self._read(path.stem)) is not None]
        return sorted(found, key=lambda file: (-file.created_at, file.id))

    def delete(self, name: str) -> None:
        """Remove a file. Raises RequestError for one that is not there."""
        self._remove(self.get(name).id)

    def expire(self) -> None:
        """Remove what is too old."""
        for file in self.files():
            if file.expires_at <= time():
                self._remove(file.id)

    def close(self) -> None:
        """Remove a temporary folder with all that is in it."""
        if self._temporary is not None:
            self._temporary.remove()

    def _read(self, name: str) -> StoredFile | None:
        try:
            return StoredFile(**json.loads((self._folder / f"{name}.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def _remove(self, name: str) -> None:
        for path in (self._folder / f"{name}.json", self.path(name)):
            path.unlink(missing_ok=True)


class FileObject(BaseModel):
    """A file as OpenAI's clients know it."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["processed"]


class FileList(BaseModel):
    """Files, the newest first."""

    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """A file that is gone."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class UploadedFile(BaseModel):
    """A file as MiniMax's clients know it."""

    file_id: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str


class Uploaded(BaseModel):
    """A file that has come, as MiniMax says it."""

    file: UploadedFile
    base_resp: MiniMaxStatus


def routes(store: FileStore) -> APIRouter:
    """OpenAI's paths for files, and MiniMax's for uploading one."""
    router = APIRouter(prefix="/v1/files", tags=["files"])

    async def upload(file: UploadFile, purpose: str) -> StoredFile:
        return await asyncio.to_thread(store.add, file.file, file.filename or "file", purpose)

    @router.post("")
    async def create_file(file: Upload, purpose: Purpose = "user_data") -> FileObject:
        """Upload a file."""
        return _as_openai(await upload(file, purpose))

    @router.post("/upload")
    async def upload_file(file: Upload, purpose: Purpose = "video_understanding") -> Uploaded:
        """Upload a file, and be answered as MiniMax does; messages refer to it as `mm_file://FILE_ID`."""
        stored = asdict(await upload(file, purpose))
        named = UploadedFile(file_id=stored.pop("id"), **stored)
        return Uploaded(file=named, base_resp=MiniMaxStatus(status_code=0, status_msg="success"))

    @router.get("")
    async def list_files(purpose: str | None = None) -> FileList:
        """All files that are kept, the newest first."""
        await asyncio.to_thread(store.expire)
        files = [file for file in await asyncio.to_thread(store.files) if purpose in (None, file.purpose)]
        data = [_as_openai(file) for file in files[:_MOST_LISTED]]
        return FileList(
            object="list",
            data=data,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
            has_more=len(files) > len(data),
        )

    @router.get("/{file_id}")
    async def retrieve_file(file_id: str) -> FileObject:
        """What is known of a file."""
        return _as_openai(await asyncio.to_thread(store.get, file_id))

    @router.get("/{file_id}/content", response_class=FileResponse, responses={200: _CONTENT})
    async def file_content(file_id: str) -> FileResponse:
        """A file's content, as it was uploaded."""
        file = await asyncio.to_thread(store.get, file_id)
        # As a download, whatever it is: nothing that was uploaded may run as a page of this server.
        return FileResponse(store.path(file.id), media_type="application/octet-stream", filename=file.filename)

    @router.delete("/{file_id}")
    async def delete_file(file_id: str) -> Deleted:
        """Remove a file."""
        await asyncio.to_thread(store.delete, file_id)
        return Deleted(id=file_id, object="file", deleted=True)

    return router


def _as_openai(file: StoredFile) -> FileObject:
    return FileObject(**asdict(file), object="file", status="processed")
