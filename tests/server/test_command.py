"""`openm3 serve` as a process: addresses, signals, the end of streams."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import httpx
import pytest

from openm3 import cli
from openm3.errors import ConfigError
from openm3.server.command import listening
from openm3.server.settings import ServerSettings

SCRIPT = """
import sys
from fastapi.responses import StreamingResponse
import openm3.server.command as command
from openm3 import cli
from openm3.engine.request import SamplingParams
from openm3.server.calls import Call, Content, Finished
from openm3.server.errors import refusal
from openm3.server.stream import event_stream, opened, packet

made = command.create_app

def with_stream(service):
    app = made(service)

    @app.get("/stream/{count}")
    async def stream(count: int):
        params = SamplingParams(max_tokens=count, ignore_eos=True)
        started, events = await opened(service.stream(Call(prompt="def main():", params=params)))

        async def packets():
            try:
                async for event in events:
                    if isinstance(event, Content):
                        yield packet({"text": event.text})
                    if isinstance(event, Finished):
                        yield packet({"end": event.reason})
            except Exception as error:
                told = refusal(error)
                yield packet({"error": told.status, "message": told.message})

        return event_stream(packets())

    return app

command.create_app = with_stream
sys.exit(cli.main(sys.argv[1:]))
"""
"""The command with one route more: a stream of tokens."""

SERVE = ("serve", "--port", "0", "--cache-tokens", "20000", "--threads", "1")


class Process:
    """A server in a process of its own."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        path = os.pathsep.join(sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *SERVE, *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **(env or {})},
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.address = self._wait_for_address()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def _wait_for_address(self) -> str:
        end = monotonic() + 60
        while monotonic() < end and self.process.poll() is None:
            for line in list(self.lines):
                if " at http://" in line:
                    return line.split(" at ")[1].strip()
            sleep(0.02)
        raise AssertionError("".join(self.lines))

    def stop(self, *signals: signal.Signals, pause: float = 0.0) -> int:
        """Send signals; the exit code."""
        for number in signals:
            self.process.send_signal(number)
            sleep(pause)
        code = self.process.wait(30)
        self._reader.join(5)
        return code

    def events(self, count: int) -> Iterator[dict[str, object]]:
        """A stream of so many tokens."""
        with httpx.stream("GET", f"{self.address}/stream/{count}", timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line[6:])


@contextmanager
def process(*arguments: str, env: dict[str, str] | None = None) -> Iterator[Process]:
    running = Process(*arguments, env=env)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()
        assert running.process.stderr is not None
        running._reader.join(5)
        running.process.stderr.close()


def test_streams_end_or_fail_when_the_server_is_told_to_stop(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("file-key\n")
    with process("--grace", "1.5", "--cache-dir", str(tmp_path / "cache")) as server:
        assert any("curl http://127.0.0.1:" in line for line in server.lines)
        ended: dict[int, list[dict[str, object]]] = {}

        def listen(count: int) -> None:
            ended[count] = list(server.events(count))

        threads = [threading.Thread(target=listen, args=(count,)) for count in (150, 19_000)]
        for thread in threads:
            thread.start()
        with httpx.Client(base_url=server.address) as client:
            while "num_requests_running 2.0" not in client.get("/metrics").text:
                sleep(0.02)
        begin = monotonic()
        assert server.stop(signal.SIGTERM) == 0
        assert monotonic() - begin < 10
        for thread in threads:
            thread.join(10)
        assert ended[150][-1] == {"end": "length"}
        assert ended[19_000][-1]["error"] == 503 and "shutting down" in str(ended[19_000][-1]["message"])
        assert len(ended[19_000]) > 10
        lines = [json.loads(line) for line in server.lines if line.startswith("{")]
        streams = {line["completion_tokens"] for line in lines if line.get("path", "").startswith("/stream")}
        assert 150 in streams and len(streams) == 2


def test_a_second_signal_ends_everything_at_once() -> None:
    with process("--grace", "60", env={"OPENM3_API_KEYS": "env-key"}) as server:
        headers = {"x-api-key": "env-key"}
        assert httpx.get(f"{server.address}/v1/models").status_code == 401
        assert httpx.get(f"{server.address}/v1/models", headers=headers).status_code == 200
        with httpx.stream("GET", f"{server.address}/stream/19000", headers=headers) as answer:
            lines = answer.iter_lines()
            next(lines)
            begin = monotonic()
            assert server.stop(signal.SIGINT, signal.SIGTERM, pause=0.3) == 0
            assert monotonic() - begin < 8
        assert "env-key" not in "".join(server.lines)


def test_an_address_that_is_taken_is_an_error_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "no-such-model", "--port", str(port)]) == 2
    expected = f"error: cannot listen at 127.0.0.1:{port}: Address already in use; give another --port, or 0"
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--host", "0.0.0.0"], "can be reached from other machines"),
        (["--port", "70000"], "port must be between 0 and 65535"),
        (["--api-key-file", "no-such-file"], "the key file no-such-file cannot be read"),
        (["no-such-model", "--port", "0"], "no checkpoint folder at no-such-model"),
        (["--host", "203.0.113.1", "--allow-unauthenticated"], "cannot listen at 203.0.113.1:8000: Cannot assign"),
    ],
)
def test_what_cannot_be_served_is_an_error(
    arguments: list[str], why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENM3_API_KEYS", raising=False)
    monkeypatch.setattr("openm3.server.command.log_to_stderr", lambda _: None)
    assert cli.main(["serve", *arguments]) == 2
    assert why in capsys.readouterr().err


def test_listening_takes_any_free_port() -> None:
    with listening(ServerSettings(port=0)) as first, listening(ServerSettings(port=0)) as second:
        assert first.getsockname()[1] != second.getsockname()[1] > 0
    with pytest.raises(ConfigError, match="cannot listen"):
        listening(ServerSettings(host="203.0.113.1", api_keys=("k",)))
