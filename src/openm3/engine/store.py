"""Pages on disk: a folder of files, one a page, named by the page's hash, shared by engines and processes.

A file is written under another name and then renamed, so that a killed process leaves whole files only; its header
holds a checksum, so that what a disk or a power cut has torn is found out, deleted and computed again. Files are
touched when they are read, and beyond the size limit the longest untouched go first. Knows bytes, not tensors.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import sys
import tempfile
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from queue import Queue

from openm3.errors import ConfigError

if sys.platform == "linux":
    import fcntl

_HEADER = struct.Struct("<8s32sQI")
_MAGIC = b"openm3p1"
_SUFFIX = ".page"
_AHEAD = 32
"""Pages that wait to be written; then whoever computes more has to wait."""


class PageStore:
    """The pages of one model and format: `name` tells them from those of others in the same folder.

    Raises ConfigError for a folder that cannot be written to.
    """

    def __init__(self, folder: str | Path, name: str, *, most_bytes: int) -> None:
        self.folder = Path(folder) / name
        self.most_bytes = most_bytes
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ConfigError(f"cannot write to the cache folder {folder}: {error.strerror}") from None
        self._sizes = sum(size for _, size, _ in self._files())
        self._waiting: Queue[tuple[bytes, bytes] | None] = Queue(_AHEAD)
        self._writer: threading.Thread | None = None
        self._counting = threading.Lock()
        self._rooms = threading.local()
        self.written = 0
        self.restored = 0
        self.damaged = 0

    def has(self, key: bytes) -> bool:
        """Whether there is a page of this hash; reading it may still find it damaged."""
        return self._path(key).exists()

    def save(self, key: bytes, parts: Sequence[bytes]) -> None:
        """Have a page written, soon and by another thread; nothing happens if there is one already."""
        if self.most_bytes <= 0 or self.has(key):
            return
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_all, name="openm3 page store", daemon=True)
            self._writer.start()
        self._waiting.put((key, b"".join(parts)))

    def load(self, key: bytes, size: int) -> memoryview | None:
        """The `size` bytes of a page; None if there is none, or none that is whole.

        Several threads may load; the bytes are valid until the thread's next load.
        """
        path = self._path(key)
        try:
            whole = self._contents(path, _HEADER.size + size)
        except OSError:
            return None
        body = whole[_HEADER.size :]
        right = len(body) == size and whole[: _HEADER.size] == _HEADER.pack(_MAGIC, key, size, zlib.crc32(body))
        with self._counting:
            self.restored += right
            self.damaged += not right
        if not right:
            self._delete(path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return body

    def _contents(self, path: Path, size: int) -> memoryview:
        """What is in a file, if that is of this size; otherwise less."""
        room = getattr(self._rooms, "room", None)
        if room is None or len(room) < size:
            self._rooms.room = room = memoryview(mmap.mmap(-1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE))
        with path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != size:
                return room[:0]
            count = _read_past_cache(file.fileno(), room) if sys.platform == "linux" else 0
            if count != size:
                file.seek(0)
                count = 0
                while count < size and (more := file.readinto(room[count:size])):
                    count += more
        return room[:count]

    def flush(self) -> None:
        """Wait until everything saved so far is written."""
        self._waiting.join()

    def close(self) -> None:
        """Write what waits, and stop."""
        if self._writer is not None:
            self._waiting.put(None)
            self._writer.join()
            self._writer = None

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self.folder / name[:2] / (name + _SUFFIX)

    def _write_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            try:
                self._write(*item)
            except OSError:
                # A full or vanished disk costs the next engine time, not this one its requests.
                pass
            finally:
                self._waiting.task_done()
        self._waiting.task_done()

    def _write(self, key: bytes, body: bytes) -> None:
        path, size = self._path(key), _HEADER.size + len(body)
        if size > self.most_bytes:
            return
        if self._sizes + size > self.most_bytes:
            self._make_room(size)
        path.parent.mkdir(exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_HEADER.pack(_MAGIC, key, len(body), zlib.crc32(body)))
                file.write(body)
            os.replace(temporary, path)
        except OSError:
            self._delete(Path(temporary))
            raise
        self._sizes += size
        self.written += 1

    def _make_room(self, size: int) -> None:
        """Delete the longest untouched files, down to nine tenths of the limit: a scan of the folder is not cheap."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, length, path in files:
            if total + size <= self.most_bytes * 9 // 10:
                break
            self._delete(path)
            total -= length
        self._sizes = total

    def _files(self) -> list[tuple[float, int, Path]]:
        """When each file was last touched, its size and its path: also those that a killed process did not finish."""
        found = []
        for folder in self.folder.iterdir():
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):
                        state = entry.stat()
                        found.append((state.st_mtime, state.st_size, Path(entry.path)))
        return found

    @staticmethod
    def _delete(path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()


def _read_past_cache(file: int, room: memoryview) -> int:
    """Fill aligned memory from a file; how much of it. What is not in the system's cache does not go through it.

    Making room there for gigabytes that will not be read again takes longer than reading: 2,500 pages of 1 MB come at
    1,500 MB/s on one thread without, against 390.
    """
    with contextlib.suppress(OSError):
        count = os.preadv(file, [room], 0, os.RWF_NOWAIT)
        if count == os.fstat(file).st_size:
            return count
    flags = fcntl.fcntl(file, fcntl.F_GETFL)
    with contextlib.suppress(OSError):
        # Not every file system can.
        fcntl.fcntl(file, fcntl.F_SETFL, flags | os.O_DIRECT)
        return os.preadv(file, [room], 0)
    fcntl.fcntl(file, fcntl.F_SETFL, flags)
    return 0
