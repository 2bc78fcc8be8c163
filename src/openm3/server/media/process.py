"""A process that decodes: started with the number of a socket, ends with it. Knows no torch, so it starts quickly.

Each job comes as a pickled `Job` with an open file that holds the bytes, and is answered with a pickled `Done` and an
open file that holds the patches, or with a `Refused` or `Failed`.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import socket
import struct
import sys
import tempfile
import traceback
from dataclasses import dataclass
from typing import Any

from openm3.errors import PromptError
from openm3.tokens.media import Kind, Media
from openm3.tokens.pictures import ImageOptions, read_image
from openm3.tokens.sources import VIDEOS, MediaLimits, format_of
from openm3.tokens.video import VideoOptions, read_video

NICENESS = 10
"""How far decoding stands behind what writes replies."""

_LENGTH = struct.Struct("!I")
_HEAD = 4096


@dataclass(frozen=True)
class Job:
    """What to make of a file: a picture, a video, or, with kind None, what it is."""

    kind: Kind | None
    image: ImageOptions
    video: VideoOptions
    limits: MediaLimits
    seconds: float


@dataclass(frozen=True)
class Done:
    """Media but for its patches: [rows, columns] of bytes in a file of their own."""

    kind: Kind
    shape: tuple[int, int]
    grids: tuple[tuple[int, int, int], ...]
    seconds: tuple[float, ...] | None
    size: tuple[int, int]
    digest: bytes


@dataclass(frozen=True)
class Refused:
    """The file is bad; what its sender may be told."""

    message: str


@dataclass(frozen=True)
class Failed:
    """Something went wrong that should not; for the log."""

    trace: str


def send(link: socket.socket, message: object, file: int | None = None) -> None:
    """Send an object and, with it, an open file."""
    data = pickle.dumps(message)
    whole = _LENGTH.pack(len(data)) + data
    sent = socket.send_fds(link, [whole], [] if file is None else [file])
    link.sendall(whole[sent:])


def receive(link: socket.socket) -> tuple[Any, int | None]:
    """What was sent, and the file that came with it. Raises EOFError where the other end is closed."""
    data, files, _, _ = socket.recv_fds(link, _HEAD, 1)
    while data and (len(data) < _LENGTH.size or len(data) < _LENGTH.size + _LENGTH.unpack_from(data)[0]):
        more = link.recv(_HEAD)
        if not more:
            break
        data += more
    else:
        if data:
            return pickle.loads(data[_LENGTH.size :]), files[0] if files else None
    for file in files:
        os.close(file)
    raise EOFError


def nameless_file(data: Any) -> int:
    """A file without a name, in memory where the system can, that holds these bytes; its number, to be closed."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("openm3-media")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(file, view) :]
    os.lseek(file, 0, os.SEEK_SET)
    return file


def main(link: socket.socket, memory: int) -> None:
    """Do jobs until the other end is closed, with `memory` bytes of address space at most."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    # Ctrl-C is the server's business, which then closes the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICENESS)
    while True:
        try:
            job, file = receive(link)
        except EOFError:
            return
        assert file is not None
        # The end of a job that nobody waits for any more.
        signal.setitimer(signal.ITIMER_REAL, 2 * job.seconds)
        _do(link, job, file)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _do(link: socket.socket, job: Job, file: int) -> None:
    try:
        try:
            media = _read(job, file)
        finally:
            os.close(file)
        patches = nameless_file(media.patch_IC)
    except PromptError as error:
        send(link, Refused(str(error)))
    except MemoryError:
        send(link, Refused("it takes more memory to decode than is allowed: give a smaller one"))
    except Exception:
        send(link, Failed(traceback.format_exc()))
    else:
        rows, columns = media.patch_IC.shape
        done = Done(media.kind, (rows, columns), media.grids, media.seconds, media.size, media.digest)
        send(link, done, patches)
        os.close(patches)


def _read(job: Job, file: int) -> Media:
    kind = job.kind or ("video" if format_of(os.pread(file, _HEAD, 0)) in VIDEOS else "image")
    source = f"/dev/fd/{file}"
    if kind == "image":
        return read_image(source, job.image, limits=job.limits)
    return read_video(source, job.video, limits=job.limits)


if __name__ == "__main__":
    # The classes that travel must be those of the importable module, not of this `__main__`.
    from openm3.server.media import process

    process.main(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]))
