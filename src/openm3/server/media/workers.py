"""Processes that turn files into `Media`, so that a bad one harms nobody and decoding never holds up the engine.

They start with the first job. One that dies, hangs or takes too much memory fails its job alone and is replaced.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from openm3.errors import PromptError
from openm3.server.errors import RequestError
from openm3.server.media.process import Done, Failed, Job, Refused, nameless_file, receive, send
from openm3.tokens.media import Media

_LOG = logging.getLogger(__name__)


class Workers:
    """At most `num_workers` processes, each with `memory` bytes of address space. `close` ends them."""

    def __init__(self, num_workers: int = 1, *, memory: int = 4 << 30) -> None:
        self._memory = memory
        self._threads = ThreadPoolExecutor(num_workers, thread_name_prefix="openm3 media")
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._all: set[_Worker] = set()
        self._closed = False

    async def read(self, job: Job, source: bytes | Path) -> Media:
        """What a job makes of these bytes or this file; jobs wait in order. Cancelled, it ends its process.

        Raises PromptError for a bad file and one that takes too long, RequestError if the process died.
        """
        turn = _Turn()
        try:
            return await asyncio.wrap_future(self._threads.submit(self._run, job, source, turn))
        except asyncio.CancelledError:
            turn.stop()
            raise

    @property
    def pids(self) -> list[int]:
        """The processes that live."""
        with self._lock:
            return [worker.process.pid for worker in self._all]

    def close(self) -> None:
        """End all processes, with what they do."""
        with self._lock:
            self._closed = True
            living = list(self._all)
        for worker in living:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in living:
            worker.end()

    def _run(self, job: Job, source: bytes | Path, turn: _Turn) -> Media:
        if isinstance(source, bytes):
            file = nameless_file(source)
        else:
            try:
                file = os.open(source, os.O_RDONLY)
            except OSError:
                raise PromptError("the file is not there any more") from None
        try:
            return self._done(job, file, turn)
        finally:
            os.close(file)

    def _done(self, job: Job, file: int, turn: _Turn) -> Media:
        worker = self._borrowed()
        try:
            if not turn.begin(worker):
                raise RequestError("the request was given up", status=503)
            media = worker.read(job, file)
        except PromptError:
            self._give_back(worker, turn)
            raise
        except BaseException as error:
            with self._lock:
                self._all.discard(worker)
            worker.kill()
            code = worker.end()
            if isinstance(error, TimeoutError):
                raise PromptError(
                    f"it takes longer than {job.seconds:g} s to decode: give a shorter or smaller one"
                ) from None
            if isinstance(error, EOFError | OSError):
                _LOG.error("a process that decodes media ended with code %s; it is replaced", code)
                message = "the process that decodes this ended unexpectedly: try again, or send another file"
                raise RequestError(message, status=503, code="media_worker_died") from None
            raise
        self._give_back(worker, turn)
        return media

    def _borrowed(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise RequestError("the server is shutting down: try again later", status=503, code="shutting_down")
            if self._idle:
                return self._idle.pop()
            worker = _Worker(self._memory)
            self._all.add(worker)
            return worker

    def _give_back(self, worker: _Worker, turn: _Turn) -> None:
        turn.finish()
        with self._lock:
            self._idle.append(worker)


class _Turn:
    """A job's time with a worker: whoever waits may end it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._stopped = False

    def begin(self, worker: _Worker) -> bool:
        with self._lock:
            self._worker = worker
            return not self._stopped

    def finish(self) -> None:
        with self._lock:
            self._worker = None

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            if self._worker is not None:
                self._worker.kill()


class _Worker:
    """One process and the socket to it."""

    def __init__(self, memory: int) -> None:
        self._link, theirs = socket.socketpair()
        package = str(Path(__file__).parents[3])
        # As the server found it; one thread, whatever the libraries would like.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH")))),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "openm3.server.media.process", str(theirs.fileno()), str(memory)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=environment,
            )

    def read(self, job: Job, file: int) -> Media:
        """Raises PromptError, TimeoutError, or EOFError or OSError if the process is gone."""
        self._link.settimeout(job.seconds)
        send(self._link, job, file)
        told, patches = receive(self._link)
        if isinstance(told, Done):
            assert patches is not None
            return _joined(told, patches)
        if isinstance(told, Failed):
            _LOG.error("a media file could not be decoded:\n%s", told.trace)
            raise PromptError("it cannot be decoded: it is damaged, or of an unusual kind")
        assert isinstance(told, Refused)
        raise PromptError(told.message)

    def kill(self) -> None:
        """End the process, from any thread."""
        self.process.kill()

    def end(self) -> int:
        """Wait for its end; its code."""
        code = self.process.wait()
        self._link.close()
        return code


def _joined(done: Done, patches: int) -> Media:
    """Media whose patches are the file's own pages, nowhere copied."""
    try:
        # Private, since torch warns of arrays that may not be written to.
        pages = mmap.mmap(patches, 0, flags=mmap.MAP_PRIVATE)
    finally:
        os.close(patches)
    patch_IC = np.frombuffer(pages, np.uint8).reshape(done.shape)
    return Media(done.kind, patch_IC, done.grids, done.seconds, done.size, done.digest)
