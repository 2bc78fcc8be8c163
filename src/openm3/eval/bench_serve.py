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
from functools import partial
from itertools import count
from time import perf_counter
from typing import Any

from openm3.engine.engine import Engine
from openm3.engine.request import Completion, SamplingParams, Timings, Usage
from openm3.errors import EngineError
from openm3.eval.bench_engine import Arrival, Served, Workload, summed
from openm3.eval.http import Address, Heard, fetch, listen
from openm3.eval.report import progress
from openm3.tokens import Tokenizer

PREFIX, OWN = 8192, 60
"""Tokens of the prompts whose replies are written side by side: of all in common, and of each its own."""

PATH = "/v1/completions"

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


def measure(
    address: Address,
    tokenizer: Tokenizer,
    workloads: Sequence[Workload],
    *,
    requests: int | None,
    rate: float | None,
    seed: int,
) -> Iterator[Served]:
    """Have each workload served by the server there, whose model has this tokenizer. Raises ReplyError and OSError."""
    with progress() as bar:
        for workload in workloads:
            name = f"{workload.name} over HTTP"
            arrivals = workload.made(tokenizer.vocab_size, requests=requests, rate=rate, seed=seed)
            task = bar.add_task(name, total=None)
            yield asyncio.run(_play(address, name, arrivals, tokenizer, partial(bar.advance, task)))
            bar.remove_task(task)


async def _play(
    address: Address, name: str, arrivals: Sequence[Arrival], tokenizer: Tokenizer, on_reply: Callable[[], object]
) -> Served:
    model = await model_name(address)
    order = count()
    coming = [(arrival.at, next(order), arrival) for arrival in arrivals]
    heapq.heapify(coming)
    replies: list[Completion] = []
    running: set[asyncio.Task[None]] = set()
    begin = perf_counter()

    async def ask(arrival: Arrival) -> None:
        heard = await listen(address, PATH, _body(model, arrival.prompt, arrival.max_tokens, tells_progress=True))
        replies.append(completion(heard, tokenizer))
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


def compare(engine: Engine, address: Address, *, batch: int, rounds: int, written: int) -> Overhead:
    """The engine alone and over HTTP in turns: `batch` replies of `written` tokens, behind a prefix that is cached.

    A round of each is not counted. `engine` must be of the same model as the server's, and configured like it.
    """
    generator = random.Random(0)
    words = [generator.randrange(engine.model.tokenizer.vocab_size) for _ in range(PREFIX + batch * OWN)]
    prompts = [words[:PREFIX] + words[first : first + OWN] for first in range(PREFIX, len(words), OWN)]
    name = asyncio.run(model_name(address))
    params = SamplingParams(max_tokens=written, ignore_eos=True)
    bodies = [_body(name, prompt, written, tells_progress=False) for prompt in prompts]

    async def over_http() -> None:
        await asyncio.gather(*(listen(address, PATH, body) for body in bodies))

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


def _body(model: str, prompt: Sequence[int], max_tokens: int, *, tells_progress: bool) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": tells_progress},
    }


def completion(heard: Heard, tokenizer: Tokenizer) -> Completion:
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
