"""`openm3 bench engine`: what requests wait for, under loads that look like people's.

Requests arrive at random (Poisson), in real time, whatever the engine is doing. Prompts are random tokens: what they
say changes selections, not what a step has to do.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from time import perf_counter, sleep

from openm3.engine.engine import Engine
from openm3.engine.request import Completion, SamplingParams
from openm3.errors import ConfigError
from openm3.eval.report import progress


@dataclass(frozen=True)
class Arrival:
    """A request `at` so many seconds, and what comes of its reply: more requests."""

    at: float
    prompt: list[int]
    max_tokens: int
    then: Callable[[Completion, float], Sequence[Arrival]] = field(default=lambda _reply, _now: ())


@dataclass(frozen=True)
class Workload:
    """Some load: `arrivals` makes it, of so many requests at so many a second, from a generator and a vocabulary."""

    name: str
    summary: str
    requests: int
    rate: float
    arrivals: Callable[[Load], Iterator[Arrival]]

    def made(self, vocabulary: int, *, requests: int | None, rate: float | None, seed: int) -> list[Arrival]:
        """The load of a model with so many tokens; the workload's own number and rate where none is given."""
        # No prompt of another workload begins like these: a server may serve one after the other.
        generator = random.Random(f"{seed} {self.name}")
        return list(self.arrivals(Load(requests or self.requests, rate or self.rate, vocabulary, generator)))


@dataclass(frozen=True)
class Load:
    """What a workload is made from."""

    requests: int
    rate: float
    vocabulary: int
    generator: random.Random

    def times(self) -> Iterator[float]:
        """When requests arrive: exponential gaps."""
        now = 0.0
        for _ in range(self.requests):
            yield now
            now += self.generator.expovariate(self.rate)

    def words(self, length: int) -> list[int]:
        return [self.generator.randrange(self.vocabulary) for _ in range(length)]


@dataclass(frozen=True)
class Served:
    """What a workload's requests met: seconds, and the engine's own numbers over the run where they are known."""

    workload: str
    seconds: float
    first: list[float]
    between: list[float]
    prompt_tokens: int
    cached_tokens: int
    written_tokens: int
    host_share: float | None = None
    preemptions: float | None = None

    def percentiles(self) -> dict[str, float]:
        """Seconds to the first token and between tokens, for half, 95% and 99% of them."""
        values = {"first": sorted(self.first), "between": sorted(self.between)}
        return {
            f"{name}_p{percent}": row[min(len(row) - 1, len(row) * percent // 100)] if row else 0.0
            for name, row in values.items()
            for percent in (50, 95, 99)
        }

    def values(self) -> dict[str, float | str | None]:
        """All of it by name, as --json prints it."""
        return {
            "workload": self.workload,
            "requests": len(self.first),
            "seconds": self.seconds,
            **self.percentiles(),
            "written_per_second": self.written_tokens / self.seconds,
            "read_per_second": (self.prompt_tokens - self.cached_tokens) / self.seconds,
            "cache_hit_rate": self.cached_tokens / self.prompt_tokens,
            "host_share": self.host_share,
            "preemptions": self.preemptions,
        }


def _chat(load: Load) -> Iterator[Arrival]:
    for at in load.times():
        yield Arrival(at, load.words(load.generator.randrange(100, 1000)), 64)


def _shared(length: int) -> Callable[[Load], Iterator[Arrival]]:
    def arrivals(load: Load) -> Iterator[Arrival]:
        prefix = load.words(length)
        for at in load.times():
            yield Arrival(at, prefix + load.words(load.generator.randrange(20, 200)), 32)

    return arrivals


def _agents(load: Load) -> Iterator[Arrival]:
    """Four turns each: what a tool gave, 500 tokens, behind all that was said before."""

    def turn(at: float, prompt: list[int], left: int) -> Arrival:
        def then(reply: Completion, now: float) -> Sequence[Arrival]:
            return [turn(now, prompt + reply.ids + load.words(500), left - 1)] if left > 1 else []

        return Arrival(at, prompt, 48, then)

    for at in load.times():
        yield turn(at, load.words(4000), 4)


def _documents(load: Load) -> Iterator[Arrival]:
    for at in load.times():
        yield Arrival(at, load.words(load.generator.randrange(16_000, 48_000)), 32)


WORKLOADS = (
    Workload("chat", "prompts of 100 to 1,000 tokens", 40, 2.0, _chat),
    Workload("shared-8k", "short questions behind one prefix of 8K", 32, 4.0, _shared(8192)),
    Workload("shared-32k", "short questions behind one prefix of 32K", 32, 4.0, _shared(32_768)),
    Workload("agents", "four turns of 500 tokens each behind 4,000 and more", 8, 0.5, _agents),
    Workload("documents", "documents of 16K to 48K tokens", 6, 0.2, _documents),
)


def choose(names: Sequence[str] | None) -> list[Workload]:
    """The workloads of these names, all by default. Raises ConfigError for an unknown one."""
    known = {workload.name: workload for workload in WORKLOADS}
    for name in names or ():
        if name not in known:
            raise ConfigError(f"no workload is named {name!r}; give one of {', '.join(known)}")
    return [known[name] for name in names or known]


def measure(
    engine: Callable[[], Engine], workloads: Sequence[Workload], *, requests: int | None, rate: float | None, seed: int
) -> Iterator[Served]:
    """Serve each workload by a fresh engine."""
    with progress() as bar:
        for workload in workloads:
            served = engine()
            arrivals = workload.made(served.model.tokenizer.vocab_size, requests=requests, rate=rate, seed=seed)
            task = bar.add_task(workload.name, total=None)
            yield play(served, workload.name, arrivals, partial(bar.advance, task))
            bar.remove_task(task)


def play(
    engine: Engine, name: str, arrivals: Sequence[Arrival], on_reply: Callable[[], object] = lambda: None
) -> Served:
    """Serve these requests and those that follow from their replies, in real time."""
    order = count()
    coming = [(arrival.at, next(order), arrival) for arrival in arrivals]
    heapq.heapify(coming)
    running: dict[int, Arrival] = {}
    replies: list[Completion] = []
    begin = perf_counter()
    while coming or running:
        now = perf_counter() - begin
        while coming and coming[0][0] <= now:
            _, _, arrival = heapq.heappop(coming)
            number = engine.add(arrival.prompt, SamplingParams(max_tokens=arrival.max_tokens, ignore_eos=True))
            running[number] = arrival
        if not running:
            sleep(coming[0][0] - now)
            continue
        for number, delta in engine.step().items():
            if delta.completion is not None:
                arrival = running.pop(number)
                replies.append(delta.completion)
                on_reply()
                for more in arrival.then(delta.completion, perf_counter() - begin):
                    heapq.heappush(coming, (more.at, next(order), more))
    seconds, stats = perf_counter() - begin, engine.stats()
    host_share = 1 - stats["seconds_running"] / stats["seconds"]
    return replace(summed(name, seconds, replies), host_share=host_share, preemptions=stats["preemptions"])


def summed(name: str, seconds: float, replies: Sequence[Completion]) -> Served:
    """What some replies met, of whatever wrote them."""
    return Served(
        name,
        seconds,
        [reply.timings.first_token for reply in replies],
        [seconds for reply in replies for seconds in reply.timings.between],
        sum(reply.usage.prompt_tokens for reply in replies),
        sum(reply.usage.cached_tokens for reply in replies),
        sum(reply.usage.completion_tokens for reply in replies),
    )
