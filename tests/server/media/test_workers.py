"""Decoding in processes: right, bounded, and a bad job harms no other."""

from __future__ import annotations

import asyncio
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest

from openm3 import ImageOptions, Media, MediaLimits, VideoOptions, read_image, read_video
from openm3.errors import PromptError
from openm3.server.errors import RequestError
from openm3.server.media import process
from openm3.server.media.process import Job
from openm3.server.media.workers import Workers
from tests.server.media.samples import picture
from tests.tokens.clips import make_clip

JOB = Job("image", ImageOptions(), VideoOptions(), MediaLimits(), 30.0)

Play = Callable[..., None]


@pytest.fixture
def play() -> Play:
    def run(test: Callable[[Workers], Coroutine[Any, Any, None]], **options: Any) -> None:
        async def whole() -> None:
            workers = Workers(**options)
            try:
                await asyncio.wait_for(test(workers), 60)
            finally:
                workers.close()
            assert not workers.pids or not any(map(lives, workers.pids))

        asyncio.run(whole())

    return run


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def same(one: Media, other: Media) -> bool:
    fields = ("kind", "grids", "seconds", "size", "digest")
    return bool(
        all(getattr(one, field) == getattr(other, field) for field in fields)
        and np.array_equal(one.patch_IC, other.patch_IC)
    )


def test_what_comes_back_is_what_the_library_reads(play: Play, tmp_path: Path) -> None:
    clip = make_clip([100 * i for i in range(30)])
    (tmp_path / "clip").write_bytes(clip)

    async def test(workers: Workers) -> None:
        assert workers.pids == []
        media = await workers.read(JOB, picture())
        assert same(media, read_image(picture()))
        assert media.patch_IC.flags.writeable
        video = Job("video", ImageOptions(), VideoOptions(fps=2), MediaLimits(), 30.0)
        assert same(await workers.read(video, tmp_path / "clip"), read_video(clip, VideoOptions(fps=2)))
        unsaid = Job(None, ImageOptions(), VideoOptions(fps=2), MediaLimits(), 30.0)
        assert same(await workers.read(unsaid, clip), read_video(clip, VideoOptions(fps=2)))
        assert (await workers.read(unsaid, picture())).kind == "image"
        assert len(workers.pids) == 1
        assert os.getpriority(os.PRIO_PROCESS, workers.pids[0]) >= os.getpriority(os.PRIO_PROCESS, 0)

    play(test)


def test_a_bad_file_is_refused_and_the_worker_goes_on(play: Play) -> None:
    async def test(workers: Workers) -> None:
        await workers.read(JOB, picture())
        before = workers.pids
        for data, words in [
            (b"<html></html>", "the file is HTML, not a picture"),
            (picture()[:60], "damaged or cut off"),
            (b"", "the file is empty"),
            (make_clip([0, 100]), "the file is a video"),
        ]:
            with pytest.raises(PromptError, match=words):
                await workers.read(JOB, data)
        assert workers.pids == before
        assert same(await workers.read(JOB, picture("blue")), read_image(picture("blue")))

    play(test)


def test_a_file_that_is_gone_is_refused(play: Play, tmp_path: Path) -> None:
    async def test(workers: Workers) -> None:
        with pytest.raises(PromptError, match="not there any more"):
            await workers.read(JOB, tmp_path / "gone")

    play(test)


def test_a_killed_worker_fails_one_job_and_is_replaced(play: Play, caplog: pytest.LogCaptureFixture) -> None:
    async def test(workers: Workers) -> None:
        await workers.read(JOB, picture())
        (pid,) = workers.pids
        os.kill(pid, signal.SIGSTOP)
        running = asyncio.ensure_future(workers.read(JOB, picture()))
        waiting = asyncio.ensure_future(workers.read(JOB, picture("blue")))
        await asyncio.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(RequestError, match="ended unexpectedly") as caught:
            await running
        assert caught.value.status == 503
        assert same(await waiting, read_image(picture("blue")))
        assert len(workers.pids) == 1 and workers.pids != [pid]

    play(test)
    assert "ended with code -9; it is replaced" in caplog.text


def test_a_hanging_worker_is_ended_in_time(play: Play) -> None:
    async def test(workers: Workers) -> None:
        await workers.read(JOB, picture())
        (pid,) = workers.pids
        os.kill(pid, signal.SIGSTOP)
        begin = monotonic()
        with pytest.raises(PromptError, match=r"takes longer than 0.2 s to decode"):
            await workers.read(Job("image", ImageOptions(), VideoOptions(), MediaLimits(), 0.2), picture())
        assert monotonic() - begin < 5
        assert not lives(pid)
        assert (await workers.read(JOB, picture())).size == (112, 112)

    play(test)


def test_too_much_memory_is_a_refusal(play: Play) -> None:
    async def test(workers: Workers) -> None:
        with pytest.raises(PromptError):
            await workers.read(JOB, picture(side=8000))
        assert (await workers.read(JOB, picture())).size == (112, 112)

    play(test, memory=256 << 20)


def test_who_goes_away_ends_the_job(play: Play) -> None:
    async def test(workers: Workers) -> None:
        await workers.read(JOB, picture())
        (pid,) = workers.pids
        os.kill(pid, signal.SIGSTOP)
        running = asyncio.ensure_future(workers.read(JOB, picture()))
        waiting = asyncio.ensure_future(workers.read(JOB, picture()))
        await asyncio.sleep(0.05)
        waiting.cancel()
        running.cancel()
        await asyncio.wait([running, waiting])
        assert running.cancelled() and waiting.cancelled()
        assert (await workers.read(JOB, picture())).size == (112, 112)
        assert not lives(pid)

    play(test)


def test_closing_ends_what_runs_and_refuses_what_comes(play: Play) -> None:
    async def test(workers: Workers) -> None:
        await workers.read(JOB, picture())
        os.kill(workers.pids[0], signal.SIGSTOP)
        running = asyncio.ensure_future(workers.read(JOB, picture()))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(workers.close)
        with pytest.raises(RequestError):
            await running

    play(test)


def test_the_process_knows_no_torch_and_ignores_ctrl_c() -> None:
    code = "import sys, openm3.server.media.process; print('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert told.stdout == "False\n"
    workers = Workers()
    try:
        media = asyncio.run(workers.read(JOB, picture()))
        os.kill(workers.pids[0], signal.SIGINT)
        assert same(asyncio.run(workers.read(JOB, picture())), media)
        status = Path(f"/proc/{workers.pids[0]}/status")
        if status.exists():
            peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
            assert int(peak.split()[1]) < 120_000
    finally:
        workers.close()


def test_a_worker_ends_with_its_server(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    code = (
        "import asyncio, os, sys\n"
        "from pathlib import Path\n"
        "from tests.server.media.test_workers import JOB, Workers\n"
        "workers = Workers()\n"
        f"asyncio.run(workers.read(JOB, Path({str(tmp_path / 'a.png')!r})))\n"
        "print(workers.pids[0], flush=True)\n"
        "os._exit(0)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    pid, due = int(told.stdout), monotonic() + 10
    while lives(pid) and not is_zombie(pid):
        assert monotonic() < due, "the process outlived its server"


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_messages_of_any_length_come_whole() -> None:
    here, there = socket.socketpair()
    with here, there:
        process.send(here, process.Refused("x" * 50_000))
        assert process.receive(there) == (process.Refused("x" * 50_000), None)
        file = process.nameless_file(b"abc")
        process.send(here, JOB, file)
        os.close(file)
        job, came = process.receive(there)
        assert job == pickle.loads(pickle.dumps(JOB)) and came is not None
        assert os.read(came, 10) == b"abc"
        os.close(came)
        here.close()
        with pytest.raises(EOFError):
            process.receive(there)


def test_limits_are_set() -> None:
    workers = Workers(memory=1 << 30)
    try:
        asyncio.run(workers.read(JOB, picture()))
        assert resource.prlimit(workers.pids[0], resource.RLIMIT_AS) == (1 << 30, 1 << 30)
    finally:
        workers.close()
