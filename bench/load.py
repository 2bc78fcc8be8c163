"""A server under load for some time: many streams, clients that vanish, read slowly or send garbage, then SIGTERM.

- errors by kind: those that a client brought upon itself are counted, all others make the exit code 1
- the server's memory every second: growth after a warm-up of a quarter of the time
- /health every 100 ms, from a process of its own
- when all is over: no page held, and every page accounted for
- told to stop under the same load: how every stream ended

    python bench/load.py --seconds 600 --streams 64

The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing as mp
import os
import re
import signal
import socket
import statistics
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from openm3.config import EngineConfig
from openm3.engine.asynchronous import AsyncEngine
from openm3.engine.engine import Engine
from openm3.eval.http import Address, fetch
from openm3.eval.load import Load
from openm3.eval.report import table
from openm3.model.model import load
from openm3.server.app import create_app
from openm3.server.command import Server, listening
from openm3.server.logs import log_to_stderr
from openm3.server.service import Service
from openm3.server.settings import ServerSettings
from openm3.train.corpus import standard_library

GRACE = 3.0
"""Seconds that replies get to end when the server is told to stop."""

GENTLE = {"no answer, [Errno 111]": "refused: not listening any more", "503": "refused: 503"}


def serve(model: str, cache_tokens: int, told: Connection) -> None:
    """What `openm3 serve` runs. Tells its port, and at the end what the engine still holds."""
    log_to_stderr("warning")
    settings = ServerSettings(port=0, grace=GRACE)
    with listening(settings) as listener:
        loaded = load(model)
        engine = Engine(loaded, EngineConfig(cache_tokens=cache_tokens))
        service = Service(AsyncEngine(engine), loaded, settings)
        told.send(listener.getsockname()[1])
        Server(create_app(service), service).run(sockets=[listener])
    engine.scheduler.check()
    told.send({"pages_held": engine.pages.num_held, "has_work": engine.has_work})


def probe(url: str, stop: Event, told: Connection) -> None:
    """Ask /health every 100 ms; the seconds that each answer took."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    request = f"GET /health HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode()
    took: list[float] = []
    while not stop.wait(max(0.0, 0.1 - (took[-1] if took else 0.0))):
        begin = time.perf_counter()
        with socket.create_connection((parts.hostname, parts.port or 80), timeout=30) as connection:
            connection.sendall(request)
            answer = b"".join(iter(lambda c=connection: c.recv(4096), b""))  # type: ignore[misc]
        assert answer.startswith(b"HTTP/1.1 200"), answer
        took.append(time.perf_counter() - begin)
    told.send(took)


def memory(pid: int) -> int:
    """Bytes of a process that are in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(sizes: list[int], warm_up: float = 0.25) -> float:
    """Growth after the warm-up: the median of the last tenth against that of the tenth after it."""
    tenth = max(len(sizes) // 10, 1)
    first = int(len(sizes) * warm_up)
    return statistics.median(sizes[-tenth:]) / statistics.median(sizes[first : first + tenth]) - 1


async def metric(address: Address, name: str) -> float:
    text = (await fetch(address, "GET", "/metrics")).decode()
    found = re.search(rf"^openm3_{name} (\S+)$", text, re.MULTILINE)
    assert found is not None, name
    return float(found[1])


async def loaded(clients: Load, pid: int, streams: int, seconds: float) -> dict[str, Any]:
    """The load itself, then peace: what the server's memory and numbers were."""
    sizes: list[int] = []

    async def watch() -> None:
        while True:
            sizes.append(memory(pid))
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    begin = time.perf_counter()
    await clients.run(streams, seconds)
    took = time.perf_counter() - begin
    watching.cancel()
    tokens = await metric(clients.address, "generation_tokens_total")
    for _ in range(100):
        held = await metric(clients.address, "kv_cache_usage_perc")
        running = await metric(clients.address, "num_requests_running")
        if not held and not running:
            break
        await asyncio.sleep(0.1)
    return {
        "seconds": took,
        "tokens_per_second": tokens / took,
        "prompt_tokens_per_second": await metric(clients.address, "prompt_tokens_total") / took,
        "rss_mib": [size >> 20 for size in sizes[:: max(len(sizes) // 60, 1)]],
        "rss_growth": growth(sizes),
        "idle": {"held": held, "running": running},
    }


async def stopped(clients: Load, pid: int, streams: int) -> dict[str, int]:
    """SIGTERM under load: outcomes by kind."""

    async def stop() -> None:
        await asyncio.sleep(3)
        os.kill(pid, signal.SIGTERM)

    stopping = asyncio.create_task(stop())
    await clients.run(streams, 3.5)
    await stopping
    told: Counter[str] = Counter()
    for (_, outcome), count in clients.outcomes.items():
        told[next((what for sign, what in GENTLE.items() if outcome.startswith(sign)), outcome)] += count
    return dict(told)


def percentile(values: list[float], percent: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, int], dict[str, int]]:
    """All of it: numbers, what came of the requests, and what came of those that a stop met."""
    context = mp.get_context("spawn")
    told, tells = context.Pipe()
    server = context.Process(target=serve, args=(args.model, args.cache_tokens, tells))
    server.start()
    assert server.pid is not None
    address = Address(f"http://127.0.0.1:{told.recv()}")
    heard, hears = context.Pipe()
    stop = context.Event()
    prober = context.Process(target=probe, args=(address.url, stop, hears))
    sources = [source.text for source in standard_library(held_out=True, tests=False) if len(source.text) > 40_000]
    clients = Load(address, "m3-tiny", [text[:24_000] for text in sources[:4]], args.seed)
    prober.start()
    values = asyncio.run(loaded(clients, server.pid, args.streams, args.seconds))
    stop.set()
    took = heard.recv()
    prober.join()
    values["health_ms"] = {f"p{p}": 1e3 * percentile(took, p) for p in (50, 99, 100)} | {"count": len(took)}
    last = Load(address, "m3-tiny", clients.documents, args.seed + 1)
    outcomes_of_stop = asyncio.run(stopped(last, server.pid, args.streams))
    values["at_the_end"] = told.recv()
    server.join(30)
    values["exit_code"] = server.exitcode
    outcomes = {f"{kind}: {what}": count for (kind, what), count in sorted(clients.outcomes.items())}
    values["request_seconds"] = {
        kind: {f"p{p}": round(percentile(seconds, p), 2) for p in (50, 99, 100)}
        for kind, seconds in sorted(clients.took.items())
    }
    return values | {"errors": clients.errors}, outcomes, outcomes_of_stop


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="m3-tiny", metavar="PATH", help="checkpoint folder, or m3-tiny (default)")
    parser.add_argument("--seconds", type=float, default=600, help="how long (default: 600)")
    parser.add_argument("--streams", type=int, default=64, help="clients at a time (default: 64)")
    parser.add_argument("--cache-tokens", type=int, default=65_536, help="tokens in memory (default: 65,536)")
    parser.add_argument("--seed", type=int, default=0, help="of what clients do (default: 0)")
    args = parser.parse_args()
    values, outcomes, at_stop = measure(args)
    print(table(("requests", "number"), [(name, str(count)) for name, count in outcomes.items()], "<>"), end="\n\n")
    print(table(("when told to stop", "number"), [(name, str(count)) for name, count in at_stop.items()], "<>"))
    rough = [name for name in at_stop if name not in {"ended", "answered", "vanished", "refused", "failed"}]
    bad_stop = [name for name in rough if name not in GENTLE.values()]
    print(json.dumps({"streams": args.streams, **values, "outcomes": outcomes, "at_stop": at_stop}))
    clean = not values["errors"] and not bad_stop and not any(values["idle"].values()) and values["exit_code"] == 0
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
