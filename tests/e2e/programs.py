"""Servers and clients as processes of their own, each with a home of its own and no network but loopback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

README = (ROOT / "README.md").read_text()

NOWHERE = "http://127.0.0.1:9"
"""A proxy that is not there: who asks anybody but loopback fails at once."""


def find(variable: str, default: str) -> Path:
    """A file or folder that an environment variable names, or that `make e2e` made; skips the test without it."""
    path = ROOT / os.environ.get(variable, default)
    if not path.exists():
        pytest.skip(f"{path} does not exist: run `make e2e`, or let {variable} name it")
    return path


def readme(language: str, holding: str, address: str) -> str:
    """The README's block in a language that holds some words, for m3-tiny at another address."""
    blocks: list[str] = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if holding in block]
    return block.replace("http://127.0.0.1:8000", address).replace("MiniMax-M3", "m3-tiny")


def environment(home: Path, **variables: str) -> dict[str, str]:
    """What a client may know of this machine: its programs, an empty home and loopback."""
    home.mkdir(exist_ok=True)
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"), NOWHERE)
    own = {"PATH": os.environ["PATH"], "HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return {**own, **proxies, "LANG": "C.UTF-8", **variables}


def run(
    command: Sequence[str | Path], folder: Path, env: Mapping[str, str], *, seconds: float = 120
) -> subprocess.CompletedProcess[str]:
    """A client's whole run; its output is shown where a test fails."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    print(f"{Path(command[0]).name} ended with {done.returncode}", done.stdout[-8000:], done.stderr[-8000:], sep="\n")
    return done


@contextmanager
def openm3_serve(folder: Path, *flags: str, **variables: str) -> Iterator[str]:
    """`openm3 serve` with m3-tiny on a free port; its address. It must log no failure, and end well when told to."""
    folder.mkdir(exist_ok=True)
    log = folder / "server.log"
    command = [sys.executable, "-m", "openm3", "serve", "--port", "0", "--cache-tokens", "40000", *flags]
    with open(log, "w") as stderr:
        server = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **variables}, stderr=stderr)
    try:
        yield _address(server, log)
    finally:
        server.terminate()
        code = server.wait(timeout=60)
    assert code == 0, log.read_text()
    assert [line for line in _lines(log) if line["level"] != "info" or line.get("status", 0) >= 500] == []


def _address(server: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + 60
    while time.monotonic() < end and server.poll() is None:
        for line in log.read_text().splitlines():
            if line.startswith("openm3 serves "):
                return line.split()[-1]
        time.sleep(0.05)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")


def _lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
