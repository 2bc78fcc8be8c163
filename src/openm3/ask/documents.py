"""What to read: files, folders, globs and standard input become named documents of plain text.

A path that the caller named must be readable, or it is an error; what lies in a folder or matches a glob and is no text
is left out, by name and with the reason. Knows no tokens and no model.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from openm3.ask.encoding import NotText, decode
from openm3.errors import DocumentError

MAX_BYTES = 64 << 20
"""Most bytes to read, of one file and of all: far more text than any model takes."""

_SKIPPED_FOLDERS = {"__pycache__", "node_modules", "CVS"}
_FOLDER_MARKS = ("CACHEDIR.TAG", "pyvenv.cfg")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
STANDARD_INPUT = "standard input"


@dataclass(frozen=True)
class Document:
    """One text: its name as shown, its lines ended by `\\n` alone, and the encoding it was read in."""

    name: str
    text: str
    encoding: str


@dataclass(frozen=True)
class Skipped:
    """A file of a folder or glob that is not read, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Collection:
    """All that some paths gave, in order."""

    documents: tuple[Document, ...]
    skipped: tuple[Skipped, ...]


def collect(paths: Sequence[str], *, stdin: BinaryIO | None = None, max_bytes: int = MAX_BYTES) -> Collection:
    """Read files, folders (recursively, by name), globs and "-" (`stdin`, default the process's own).

    In folders, hidden entries, caches, virtual environments and version control are not looked at, and binary, empty,
    unreadable or larger files are listed as skipped. Each file is read once. Raises DocumentError when a file named
    by itself cannot be read as text, a glob matches nothing, all files exceed `max_bytes`, or nothing is left to read.
    """
    collector = _Collector(max_bytes)
    for path in paths:
        if path == "-":
            collector.add_stream(stdin)
        elif os.path.lexists(path):
            collector.add_named(path)
        elif glob.has_magic(path):
            collector.add_glob(path)
        else:
            raise DocumentError(
                f"{shown_name(path)} does not exist: give a file, a folder, a glob, or - for {STANDARD_INPUT}"
            )
    if not collector.documents:
        names = ", ".join(map(shown_name, paths)) or "no path"
        reasons = "; ".join(f"{s.name}: {s.reason}" for s in collector.skipped[:5]) or "no files"
        raise DocumentError(f"nothing to read in {names} ({reasons})")
    return Collection(tuple(collector.documents), tuple(collector.skipped))


def shown_name(path: str) -> str:
    """The path as people read it: relative if it lies in the working folder, with forward slashes, printable."""
    name = os.path.normpath(path) if path else "''"
    if os.path.isabs(name):
        with suppress(ValueError, OSError):
            name = str(Path(name).relative_to(Path.cwd()))
    text = os.fsencode(Path(name).as_posix()).decode("utf-8", "replace")
    return _UNPRINTABLE.sub("\ufffd", text)


class _Collector:
    def __init__(self, max_bytes: int) -> None:
        self.documents: list[Document] = []
        self.skipped: list[Skipped] = []
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._seen: set[str] = set()

    def add_stream(self, stream: BinaryIO | None) -> None:
        if STANDARD_INPUT in self._seen:
            return
        self._seen.add(STANDARD_INPUT)
        if stream is None and sys.stdin is None:
            raise DocumentError(f"{STANDARD_INPUT} is closed")
        try:
            self._add(STANDARD_INPUT, (stream or sys.stdin.buffer).read(self._max_bytes + 1))
        except (NotText, OSError) as error:
            raise DocumentError(f"{STANDARD_INPUT} {_why(error)}") from None

    def add_named(self, path: str) -> None:
        """A path that the caller wrote: anything but a folder must be text."""
        try:
            if os.path.isdir(path):
                self._add_folder(path)
            else:
                self._add_file(path)
        except (NotText, OSError) as error:
            raise DocumentError(f"{shown_name(path)} {_why(error)}") from None

    def add_glob(self, pattern: str) -> None:
        matches = sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise DocumentError(f"no file matches {pattern!r}")
        caches = _SKIPPED_FOLDERS - set(Path(pattern).parts)
        for path in matches:
            if not caches & set(Path(path).parts):
                self._add_found(path)

    def _add_folder(self, path: str) -> None:
        if not self._is_new(path):
            return
        with os.scandir(path) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            if not entry.name.startswith("."):
                self._add_found(entry.path)

    def _add_found(self, path: str) -> None:
        """A path that was only found: what is no text is skipped."""
        try:
            mode = os.stat(path).st_mode
            if stat.S_ISDIR(mode):
                if not _is_cache(path):
                    self._add_folder(path)
            elif stat.S_ISREG(mode):
                self._add_file(path)
            else:
                self.skipped.append(Skipped(shown_name(path), "is not a regular file"))
        except (NotText, OSError) as error:
            self.skipped.append(Skipped(shown_name(path), _why(error)))

    def _add_file(self, path: str) -> None:
        if self._is_new(path):
            with open(path, "rb") as file:
                self._add(shown_name(path), file.read(self._max_bytes + 1))

    def _add(self, name: str, data: bytes) -> None:
        """Raises NotText, and DocumentError when it all becomes too much."""
        if len(data) > self._max_bytes:
            raise NotText(f"larger than {self._max_bytes:,} bytes, the most that is read")
        text, encoding = decode(data)
        self._num_bytes += len(data)
        if self._num_bytes > self._max_bytes:
            raise DocumentError(f"the files up to {name} exceed {self._max_bytes:,} bytes, the most that is read")
        self.documents.append(Document(name, text, encoding))

    def _is_new(self, path: str) -> bool:
        real = os.path.realpath(path)
        is_new = real not in self._seen
        self._seen.add(real)
        return is_new


def _is_cache(path: str) -> bool:
    marked = any(os.path.exists(os.path.join(path, mark)) for mark in _FOLDER_MARKS)
    return marked or os.path.basename(path) in _SKIPPED_FOLDERS


def _why(error: NotText | OSError) -> str:
    if isinstance(error, NotText):
        return f"is {error}"
    reasons = {errno.ENOENT: "is a link to nothing", errno.ELOOP: "is a link to itself"}
    return reasons.get(error.errno or 0, f"cannot be read: {(error.strerror or str(error)).lower()}")
