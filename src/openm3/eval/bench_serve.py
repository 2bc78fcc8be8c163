"""`openm3 bench serve`: the engine's loads over HTTP, and what HTTP takes of the engine's throughput.

The server is a process of its own, as `openm3 serve` starts it; the engine alone works in this one, in turns with it.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from time import perf_counter
from typing import Any

from openm3.engine.engine import Engine
from openm3.engine.request import Completion, SamplingParams, Timings, Usage
from openm3.errors import EngineError
from openm3.eval.bench_engine import Arrival, Served, summed
from openm3.eval.http import Address, Heard, fetch, listen
from openm3.tokens import Tokenizer

PREFIX, OWN, WRITTEN = 8192, 60, 256
"""Tokens of the requests that are written side by side: of all in common, of each its own, and of its reply."""

_GREETING = re.compile(r" at (http://\S+)\n")


@dataclass(frozen=True)
class Overhead:
    """What `batch` replies at a time come to, in tokens a second, round by round, of the engine alone and over HTTP."""

    batch: int
    engine: list[float]
    http: list[float]

    @property
    def share(self) -> float:
        """What HTTP takes of the engine's throughput, 0 for nothing: the rounds' median."""
        pairs = zip(self.engine, self.http, strict=True)
        return statistics.median(1 - http / engine for engine, http in pairs)

    def values(self) -> dict[str, Any]:
        """All of it by name, as --json prints it."""
        return {"batch": self.batch, "engine": self.engine, "http": self.http, "overhead": self.share}


@dataclass(frozen=True)
class Serving:
    """A server in a process of its own."""

    address: Address
    process: subprocess.Popen[str]


@contextmanager
def serving(arguments: Sequence[str]) -> Iterator[Serving]:
    """`openm3 serve` with these arguments, on a free port, until the end. Raises EngineError if it does not start."""
    command = [sys.executable, "-m", "openm3", "serve", *arguments, "--port", "0", "--log-level", "warning"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield Serving(Address(_greeted(process)), process)
        finally:
            process.terminate()
            process.communicate()


def _greeted(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if found := _GREETING.search(line):
            return found[1]
    raise EngineError(f"the server did not start: {said.strip()}")


async def model_name(address: Address) -> str:
    """What a server calls its model. Raises ReplyError, and OSError where there is no server."""
    return str(json.loads(await fetch(address, "GET", "/v1/models"))["data"][0]["id"])


async def play(
    address: Address,
    name: str,
    arrivals: Sequence[Arrival],
    tokenizer: Tokenizer,
    on_reply: Callable[[], object] = lambda: None,
) -> Served:
    """Have these requests served, and those that follow from their replies, in real time. Raises ReplyError."""
    model = await model_name(address)
    order = count()
    coming = [(arrival.at, next(order), arrival) for arrival in arrivals]
    heapq.heapify(coming)
    replies: list[Completion] = []
    running: set[asyncio.Task[None]] = set()
    begin = perf_counter()

    async def ask(arrival: Arrival) -> None:
        heard = await listen(address, "/v1/completions", _body(model, arrival.prompt, arrival.max_tokens, True))
        replies.append(_completion(heard, tokenizer))
        on_reply()
        for more in arrival.then(replies[-1], perf_counter() - begin):
            heapq.heappush(coming, (more.at, next(order), more))

    while coming or running:
        wait = coming[0][0] - (perf_counter() - begin) if coming else None
        if wait is not None and wait <= 0:
            running.add(asyncio.create_task(ask(heapq.heappop(coming)[2])))
        elif running:
            done, running = await asyncio.wait(running, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        else:
            await asyncio.sleep(wait or 0)
    return summed(name, perf_counter() - begin, replies)


def overhead(
    engine: Engine, address: Address, *, batch: int, rounds: int, written: int = WRITTEN, prefix: int = PREFIX
) -> Overhead:
    """The engine alone and over HTTP in turns, on the same prompts, after a round of each that is not counted."""
    generator = random.Random(0)
    words = [generator.randrange(engine.model.tokenizer.vocab_size) for _ in range(prefix + batch * OWN)]
    prompts = [words[:prefix] + words[first : first + OWN] for first in range(prefix, len(words), OWN)]
    name = asyncio.run(model_name(address))
    params = SamplingParams(max_tokens=written, ignore_eos=True)
    bodies = [_body(name, prompt, written, False) for prompt in prompts]

    async def over_http() -> None:
        await asyncio.gather(*(listen(address, "/v1/completions", body) for body in bodies))

    seconds: dict[str, list[float]] = {"engine": [], "http": []}
    for _ in range(1 + rounds):
        begin = perf_counter()
        engine.generate(prompts, params)
        seconds["engine"].append(perf_counter() - begin)
        begin = perf_counter()
        asyncio.run(over_http())
        seconds["http"].append(perf_counter() - begin)
    rates = {key: [batch * written / value for value in values[1:]] for key, values in seconds.items()}
    return Overhead(batch, rates["engine"], rates["http"])


def _body(model: str, prompt: Sequence[int], max_tokens: int, tells_progress: bool) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": tells_progress},
    }


def _completion(heard: Heard, tokenizer: Tokenizer) -> Completion:
    """A reply as the engine would tell of it. Tokens of one packet share the time since the packet before evenly."""
    text = "".join(choice["text"] for packet in heard.packets for choice in packet["choices"])
    counts = [packet["usage"]["completion_tokens"] for packet in heard.packets]
    usage = heard.packets[-1]["usage"]
    between: list[float] = []
    first: float | None = None
    before, told = 0.0, 0
    for time, number in zip(heard.times, counts, strict=True):
        if number <= told:
            continue
        if first is None:
            # Whatever the first packet brings came at once.
            first = time
        else:
            between += [(time - before) / (number - told)] * (number - told)
        before, told = time, number
    return Completion(
        tokenizer.encode(text),
        text,
        "length",
        Usage(usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], usage["completion_tokens"]),
        Timings(0.0, heard.seconds if first is None else first, heard.seconds, tuple(between)),
    )
