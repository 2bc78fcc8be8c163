"""The engine: many requests, one model. Each step schedules, runs, keeps the books and emits."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path
from random import SystemRandom
from time import monotonic
from typing import Self

from openm3.config import BLOCK, EngineConfig
from openm3.engine.archive import Archive
from openm3.engine.constraint import Constraint
from openm3.engine.encoder import Encoder
from openm3.engine.lookup import Lookup
from openm3.engine.pages import Pages
from openm3.engine.probe import Probe
from openm3.engine.request import Completion, Delta, FinishReason, Request, SamplingParams, Timings, Usage, placed
from openm3.engine.runner import Drawn, Runner
from openm3.engine.scheduler import Scheduler, Work
from openm3.engine.text import ReplyText
from openm3.errors import BusyError, ConfigError, PromptError
from openm3.model.memory import free_bytes, gib, page_bytes
from openm3.model.model import Model, load
from openm3.tokens.media import Media

_log = logging.getLogger(__name__)

Prompt = str | Sequence[int]

TOTALS = (
    "steps",
    "tokens_computed",
    "requests_finished",
    "tokens_cached",
    "tokens_generated",
    "tokens_drafted",
    "tokens_accepted",
    "seconds",
    "seconds_running",
)
"""What an engine counts: most of it when a request ends. Of the `seconds` in steps, those of the model's own work."""


class Engine:
    """Requests in, tokens out. Not for several threads at a time: `AsyncEngine` is."""

    def __init__(
        self,
        model: str | Path | Model = "m3-tiny",
        config: EngineConfig | None = None,
        *,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.model = model if isinstance(model, Model) else load(model)
        self.config = config or EngineConfig()
        self._clock = clock
        self._ids = count(1)
        self._random = SystemRandom()
        ends = {self.model.tokenizer.eos_id, self.model.config.eos_id}
        self.end_ids = frozenset(i for i in ends if i is not None)
        self.pages = Pages(num_pages(self.model, self.config))
        network, encoder = self.model.network, None
        if self.model.config.vision is not None:
            c = self.config
            encoder = Encoder(network, step_patches=c.step_tokens, cache_bytes=c.image_cache_bytes)
        self.runner = Runner(network, self.pages.num_pages, self.end_ids, encoder)
        pools, folder, size = self.runner.pools, self.config.cache_dir, self.config.cache_dir_bytes
        archive = None if folder is None else Archive(self.model.network, pools, folder, most_bytes=size)
        self.archive = archive
        self.scheduler = Scheduler(
            self.pages,
            step_tokens=self.config.step_tokens,
            max_requests=self.config.max_requests,
            root=b"" if archive is None else archive.root,
            reuse=self.config.prefix_cache,
            keep=None if archive is None else lambda key, page: archive.keep(key, pools, page),
            restore=None if archive is None else lambda key, page: archive.restore(key, pools, page),
            ready=None if encoder is None else encoder.ready,
        )
        self._probe = Probe()
        self._lookup = Lookup(self.config.draft_tokens) if self.config.draft_tokens else None
        self.totals = dict.fromkeys(TOTALS, 0.0)
        self._texts: dict[int, ReplyText] = {}
        self._requests: dict[int, Request] = {}
        self._heard: dict[int, deque[Delta]] = {}

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        constraint: Constraint | None = None,
        media: Sequence[Media] = (),
    ) -> int:
        """Let a request in; its number. Raises PromptError for one that can never run, BusyError for one too many.

        `constraint` says which tokens the reply may be made of; it follows this reply alone. `media` fill the
        placeholders of a prompt of ids, in their order, as `Tokenizer.chat` writes them.
        """
        params = params or SamplingParams()
        ids = self.model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        ids = self.model.check_ids(ids, params.max_tokens)
        bad = next((i for i in params.stop_ids if not 0 <= i < self.model.config.vocab_size), None)
        if bad is not None:
            raise PromptError(f"stop_ids holds {bad}, outside the vocabulary of {self.model.config.vocab_size}")
        if len(self.scheduler.waiting) >= self.config.max_waiting:
            raise BusyError(f"{len(self.scheduler.waiting)} requests are waiting already: try again later")
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        request = Request(next(self._ids), ids, params, seed, self._clock(), constraint)
        request.media = placed(media, self.model.check_media(ids, media))
        if not self.scheduler.fits(request.longest):
            room = self.pages.num_pages * BLOCK
            raise PromptError(
                f"{len(ids)} tokens and {params.max_tokens} to generate need room for {request.longest}, but the cache "
                f"holds {room}: shorten the prompt, or give the engine more cache_tokens"
            )
        self.scheduler.add(request)
        self._requests[request.id] = request
        self._texts[request.id] = ReplyText(self.model.tokenizer.decoder(), params.stop)
        return request.id

    def abort(self, number: int) -> Delta | None:
        """End a request at once; its last delta, None if it had ended already."""
        request = self._requests.get(number)
        if request is None:
            return None
        delta = self._finish(request, "abort", Delta([], ""))
        self._tell(number, delta)
        return delta

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work

    def step(self) -> dict[int, Delta]:
        """One step of all requests that have a part in it; what it added to whose reply."""
        entered = self._clock()
        deltas = self._expire()
        plan = self.scheduler.schedule(self._lookup)
        begun = self._clock()
        for work in plan.works:
            if work.request.begun is None:
                work.request.begun = begun
        try:
            with self._probe.looking(plan) as observer:
                drawn = self.runner.run(plan, observer)
        except BaseException:
            # Ctrl-C, say: what was to be computed is computed by the next step, but nobody knows what was copied.
            self.scheduler.undo(plan)
            raise
        now = self._clock()
        self.totals["seconds_running"] += now - begun
        self.scheduler.settle()
        self.totals["steps"] += 1
        self.totals["tokens_computed"] += plan.num_tokens
        for work, result in zip(plan.works, drawn, strict=True):
            work.request.prompt_logprobs += result.scores
            if result.ids:
                deltas[work.request.id] = self._take(work, result, now)
            else:
                self.scheduler.advance(work, work.count)
        if self.config.check:
            self.scheduler.check()
        for number, delta in deltas.items():
            self._tell(number, delta)
        self.totals["seconds"] += self._clock() - entered
        return deltas

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        constraint: Constraint | None = None,
        media: Sequence[Media] = (),
    ) -> Iterator[Delta]:
        """One reply, as it is written. Whoever stops listening ends it. Several may be listened to in turns."""
        number = self.add(prompt, params, constraint=constraint, media=media)
        yield from self._listen(number)

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """The replies to some prompts, written side by side; `params` are for all of them, or one for each."""
        if not isinstance(params, Sequence):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise PromptError(f"{len(prompts)} prompts need as many params, not {len(params)}")
        numbers: list[int] = []
        try:
            for prompt, own in zip(prompts, params, strict=True):
                numbers.append(self.add(prompt, own))
                self._heard[numbers[-1]] = deque()
            return [last.completion for number in numbers for last in self._listen(number) if last.completion]
        finally:
            for number in numbers:
                self.abort(number)

    def stats(self) -> dict[str, float]:
        """What the engine holds and has done, as numbers by name; of its sparsity what `Probe.report` says."""
        pages, scheduler = self.pages, self.scheduler
        return {
            "requests_running": len(scheduler.running),
            "requests_waiting": len(scheduler.waiting),
            "pages": pages.num_pages,
            "pages_held": pages.num_held,
            "pages_published": pages.num_published,
            "pages_evicted": pages.evicted,
            "preemptions": scheduler.preemptions,
            "images_encoded": 0 if self.runner.encoder is None else self.runner.encoder.encoded,
            **self.totals,
            **self._probe.report(),
        }

    def close(self) -> None:
        """Write what is still to be kept on disk. The engine can go on afterwards."""
        if self.archive is not None:
            self.archive.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _listen(self, number: int) -> Iterator[Delta]:
        heard = self._heard.setdefault(number, deque())
        try:
            while heard or number in self._requests:
                if heard:
                    yield heard.popleft()
                else:
                    self.step()
        finally:
            self.abort(number)
            self._heard.pop(number, None)

    def _tell(self, number: int, delta: Delta) -> None:
        if number in self._heard:
            self._heard[number].append(delta)

    def _take(self, work: Work, drawn: Drawn, now: float) -> Delta:
        """Append what was drawn, as far as it follows from right draft tokens, and see whether the reply ends."""
        request, text = work.request, self._texts[work.request.id]
        scores = None
        if request.num_output == 0 and request.params.prompt_logprobs is not None:
            scores = request.prompt_logprobs
        if request.params.max_tokens == 0:
            self.scheduler.advance(work, work.count)
            return self._finish(request, "length", Delta([], "", prompt_logprobs=scores))
        ids: list[int] = []
        reason: FinishReason | None = None
        shown, kept, ended = "", 0, False
        for place, token in enumerate(drawn.ids):
            kept = place
            ended = token in request.params.stop_ids or (token in self.end_ids and not request.params.ignore_eos)
            reason = "error" if token < 0 else "stop" if ended else _constrained(request, token)
            if reason == "error":
                break
            request.token_times.append(now)
            request.ids.append(token)
            if drawn.attention is not None:
                request.attend(drawn.attention[place], token)
            if ended:
                break
            ids.append(token)
            shown += text.push(token)
            if text.stopped:
                reason = "stop"
            elif reason is None and request.num_output == request.params.max_tokens:
                reason = "length"
            if reason is not None or place == len(work.draft) or work.draft[place] != token:
                break
        request.drafted += len(work.draft)
        request.accepted += kept
        own = None if drawn.logprobs is None else drawn.logprobs[: len(ids)]
        request.logprobs += own or ()
        if reason != "error":
            self.scheduler.advance(work, work.count + kept)
        blocks = None if drawn.blocks is None else drawn.blocks[: len(ids)]
        delta = Delta(ids, shown, logprobs=own, blocks=blocks, prompt_logprobs=scores)
        return delta if reason is None else self._finish(request, reason, delta, ended)

    def _finish(self, request: Request, reason: FinishReason, delta: Delta, ended: bool = False) -> Delta:
        """Forget a request and say all of its reply; `ended` says that its last token is no part of it."""
        self.scheduler.remove(request)
        del self._requests[request.id]
        if request.media and self.runner.encoder is not None:
            self.runner.encoder.forget(self._requests.values())
        if self._lookup is not None:
            self._lookup.forget(request.id)
        text = self._texts.pop(request.id)
        rest = text.finish()
        request.finish_reason = reason
        self.totals["requests_finished"] += 1
        self.totals["tokens_cached"] += request.cached
        self.totals["tokens_generated"] += request.num_output
        self.totals["tokens_drafted"] += request.drafted
        self.totals["tokens_accepted"] += request.accepted
        completion = Completion(
            request.output[:-1] if ended else request.output,
            text.text,
            reason,
            Usage(len(request.prompt), request.cached, request.num_output, request.drafted, request.accepted),
            _timings(request, self._clock()),
            request.logprobs if request.params.logprobs is not None else None,
            request.prompt_logprobs if request.params.prompt_logprobs is not None else None,
            request.attention,
        )
        return replace(delta, text=delta.text + rest, finish_reason=reason, completion=completion)

    def _expire(self) -> dict[int, Delta]:
        now = self._clock()
        late = [request for request in self._requests.values() if now > request.deadline]
        return {request.id: self._finish(request, "timeout", Delta([], "")) for request in late}


def _constrained(request: Request, token: int) -> FinishReason | None:
    """Tell a request's constraint which token was taken; why its reply ends, if it does."""
    if request.constraint is None:
        return None
    try:
        request.constraint.accept(token)
        return "stop" if request.constraint.finished else None
    except Exception:
        _log.exception("request %d: its constraint has failed", request.id)
        return "error"


def num_pages(model: Model, config: EngineConfig) -> int:
    """How many pages the pool gets. Raises ConfigError where they do not fit into the memory that is free."""
    size = page_bytes(model.config, model.network.embed.weight.element_size())
    free = free_bytes()
    if config.cache_tokens is not None:
        count = -(-config.cache_tokens // BLOCK)
    elif config.cache_bytes is not None:
        count = config.cache_bytes // size
    else:
        count = int((free or 4 << 30) * config.memory_share) // size
        # No request can use more than this, and a pool of them all is enough for anybody.
        count = min(count, config.max_requests * -(-model.config.max_positions // BLOCK))
    if count < 1:
        raise ConfigError(f"a page of {BLOCK} tokens takes {size:,} bytes: give the engine at least as much memory")
    if free is not None and count * size > free:
        raise ConfigError(f"a cache of {count * BLOCK:,} tokens needs {gib(count * size)}, but {gib(free)} is free")
    return count


def _timings(request: Request, now: float) -> Timings:
    times, begun = request.token_times, request.begun
    queue = (now if begun is None else begun) - request.arrived
    prefill = 0.0 if begun is None else (times[0] if times else now) - begun
    between = tuple(b - a for a, b in pairwise(times))
    return Timings(queue, prefill, now - request.arrived, between)
