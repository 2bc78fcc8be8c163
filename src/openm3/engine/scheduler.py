"""Which tokens of which requests the next step computes. Pure Python over plain data: no tensors, no clock, no text.

Every step first gives each request that writes its next token, then divides the rest of its budget evenly among those
that read their prompts, so that a short prompt never waits for a long one. Requests are taken in by the order of their
keys (arrival, moved by priority) as long as all of their prompt has room. A step that runs out of pages sends the last
of the running requests back to wait; it keeps its place, and finds again what is still published of its pages.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from openm3.config import BLOCK
from openm3.engine.pages import Pages, Published, page_hashes
from openm3.engine.request import Request

LEAST_COPIED = 16
"""Tokens of a page's beginning that are worth a copy of the page."""

WRITTEN_AT_ONCE = 16
"""Tokens of those who write, drafts included, in a step: with more, a draft costs what it could save."""

RESTORED_AT_ONCE = 64
"""Pages of a request that one step restores: others wait for them."""

Propose = Callable[[Request], Sequence[int]]
"""Draft tokens that may follow a request's own; they are verified, so any are right."""

Keep = Callable[[bytes, int], None]
"""Told the hash of a page that has just been computed and published."""

Restore = Callable[[bytes, int], bool]
"""Fills a page with what was kept under a hash; False if there is nothing, or nothing whole."""


Ready = Callable[[Request, int, int], int]
"""Told a request, a first token and a count; how many of these tokens can be computed in this step."""


@dataclass(frozen=True)
class Work:
    """One request's part of a step: `count` of its tokens from `first` on, then draft tokens after its last one."""

    request: Request
    first: int
    count: int
    draft: tuple[int, ...] = ()

    @property
    def samples(self) -> bool:
        """Whether its last token is among them, so that the next one can be drawn."""
        return self.first + self.count == len(self.request.ids)

    @property
    def scored(self) -> range:
        """Where its tokens stand whose logits give log-probabilities of the prompt that are asked for and unknown."""
        known, last = len(self.request.prompt_logprobs), len(self.request.prompt) - 1
        return range(max(self.first, known - 1), min(self.first + self.count, last)) if known else range(0)

    @property
    def ids(self) -> list[int]:
        return [*self.request.ids[self.first : self.first + self.count], *self.draft]


@dataclass
class Plan:
    """One step: the work, and pages whose content is copied first, source to target."""

    works: list[Work] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(work.count + len(work.draft) for work in self.works)


class Scheduler:
    """The requests that wait and run, and their pages.

    A step computes at most `step_tokens` tokens, of at most `max_requests` requests. `root` stands for what keys
    depend on beside tokens; with `reuse` false nothing is published or found. `keep` and `restore` reach pages outside
    of the pool; `ready` knows which pictures are there.
    """

    def __init__(
        self,
        pages: Pages,
        *,
        step_tokens: int,
        max_requests: int,
        root: bytes = b"",
        reuse: bool = True,
        keep: Keep | None = None,
        restore: Restore | None = None,
        ready: Ready | None = None,
    ) -> None:
        self.pages = pages
        self.step_tokens = step_tokens
        self.max_requests = max_requests
        self.root = root
        self.reuse = reuse
        self.keep = keep
        self.restore = restore
        self.ready = ready
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = 0
        # Pages that a running request will publish: who needs them waits for it rather than computing them too.
        self._promised: dict[bytes, Request] = {}
        self._borrowed: list[int] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def fits(self, length: int) -> bool:
        """Whether a request of so many keys could ever run."""
        return -(-length // BLOCK) <= self.pages.num_pages

    def add(self, request: Request) -> None:
        """Let a request wait. It must fit."""
        assert self.fits(request.longest)
        if self.reuse:
            request.hashes = list(page_hashes(request.names(0, len(request.ids)), self.root, request.hashes))
        insort(self.waiting, request, key=lambda r: r.key)

    def remove(self, request: Request) -> None:
        """Forget a request, wherever it is; its full pages stay published."""
        if request in self.running:
            self._stop(request)
        else:
            self.waiting.remove(request)

    def schedule(self, propose: Propose | None = None) -> Plan:
        """The next step. Once it is carried out, call `settle`, then `advance` for each of its works."""
        plan = Plan()
        try:
            self._fill(plan, propose)
        except BaseException:
            # Restoring pages takes a while, in which Ctrl-C may come.
            self.undo(plan)
            raise
        return plan

    def settle(self) -> None:
        """Note that the last plan's copies are made: what they were made from may go."""
        self.pages.release(self._borrowed)
        self._borrowed = []

    def undo(self, plan: Plan) -> None:
        """Note that the last plan was not carried out to its end: pages that it copied hold nobody knows what."""
        targets = {target for _, target in plan.copies}
        for request in [r for r in self.running if targets.intersection(r.pages)]:
            self._preempt(request, plan)
        self.settle()

    def advance(self, work: Work, count: int) -> None:
        """Note that the keys of `count` tokens from `work.first` on are computed and right; publish full pages."""
        request = work.request
        request.computed = work.first + count
        full = request.computed // BLOCK
        if not self.reuse:
            return
        if full > len(request.hashes):
            request.hashes += page_hashes(request.names(0, full * BLOCK), self.root, request.hashes)
        for i in range(work.first // BLOCK, full):
            parent = request.hashes[i - 1] if i else self.root
            entry = Published(request.hashes[i], parent, tuple(request.names(i * BLOCK, (i + 1) * BLOCK)))
            if self.pages.publish(request.pages[i], entry) and self.keep is not None:
                self.keep(entry.hash, request.pages[i])
            self._unpromise(request, entry.hash)

    def check(self) -> None:
        """AssertionError if a page is lost, held twice, or a request's pages do not hold its keys."""
        self.pages.check([*(request.pages for request in self.running), *([page] for page in self._borrowed)])
        assert all(len(r.pages) * BLOCK >= r.computed for r in self.running), "a request has fewer pages than keys"
        assert not any(r.pages or r.computed for r in self.waiting), "a waiting request holds pages"

    def _fill(self, plan: Plan, propose: Propose | None) -> None:
        """Choose the work: new requests, then who writes, then who reads."""
        self._admit(plan)
        writers = [r for r in self.running if r.remaining == 1 and not r.sees(r.computed, len(r.ids))]
        budget = self.step_tokens - len(writers)
        for request in writers:
            # One that comes earlier in this loop may have sent this one back to wait.
            if request in self.running and self._grow(request, len(request.ids), plan):
                most = min(budget, WRITTEN_AT_ONCE // len(writers) - 1)
                draft = self._draft(request, propose, most) if propose is not None else ()
                plan.works.append(Work(request, request.computed, 1, draft))
                budget -= len(draft)
        readers = [r for r in self.running if r.remaining > 1 or r.sees(r.computed, len(r.ids))]
        if self.restore is not None:
            readers = [r for r in readers if r in self.running and not self._restored(r, plan)]
        readers.sort(key=lambda r: r.remaining)
        for i, request in enumerate(readers):
            count = min(request.remaining, budget // (len(readers) - i))
            if count < request.remaining:
                # Whole pages, unless that would be nothing.
                count = (request.computed + count) // BLOCK * BLOCK - request.computed if count >= BLOCK else count
            if self.ready is not None and request.sees(request.computed, request.computed + count):
                count = self.ready(request, request.computed, count)
            if count > 0 and request in self.running and self._grow(request, request.computed + count, plan):
                plan.works.append(Work(request, request.computed, count))
                budget -= count

    def _admit(self, plan: Plan) -> None:
        """Take in waiting requests, in order, as long as their prompts have room beside those of the running ones."""
        promised = sum(self._missing(r) for r in self.running)
        for request in list(self.waiting):
            if len(self.running) >= self.max_requests:
                return
            found = self.pages.find(request.hashes[: request.reusable // BLOCK]) if self.reuse else []
            lacks = len(found) < len(request.hashes) and len(found) * BLOCK < request.reusable
            if lacks and request.hashes[len(found)] in self._promised:
                continue
            for page in found:
                self.pages.hold(page)
            missing = -(-(len(request.ids) + 1) // BLOCK) - len(found)
            if self.running and missing > self.pages.num_available - promised:
                self.pages.release(found)
                return
            promised += missing
            self.waiting.remove(request)
            self._start(request, found, plan)

    def _start(self, request: Request, found: list[int], plan: Plan) -> None:
        insort(self.running, request, key=lambda r: r.key)
        request.pages = found
        request.computed = len(found) * BLOCK
        if self.reuse:
            parent = request.hashes[len(found) - 1] if found else self.root
            rest = request.names(request.computed, min(request.reusable, request.computed + BLOCK))
            source, same = self.pages.find_partly(parent, rest)
            if same >= LEAST_COPIED:
                self._copy(source, same, request, plan)
            for key in request.hashes[len(found) :]:
                self._promised.setdefault(key, request)
        if request.preempted == 0:
            request.cached = min(request.computed, len(request.prompt))

    def _copy(self, source: int, count: int, request: Request, plan: Plan) -> None:
        """Begin a request's next page with `count` tokens of another page, which is held until they are copied."""
        self.pages.hold(source)
        if self.pages.num_available < self._missing(request):
            # The page itself would be in the way: the request needs all there are.
            self.pages.release([source])
            return
        self._borrowed.append(source)
        own = self.pages.allocate(1)
        assert own is not None
        plan.copies.append((source, own[0]))
        request.pages += own
        request.computed += count

    def _restored(self, request: Request, plan: Plan) -> bool:
        """Fill a reader's next pages with what was kept of them: then this step computes nothing for it."""
        assert self.restore is not None
        before = request.computed
        for i in range(before // BLOCK, min(request.reusable // BLOCK, before // BLOCK + RESTORED_AT_ONCE)):
            if request.computed != i * BLOCK or not self._grow(request, request.computed + BLOCK, plan):
                break
            if not self.restore(request.hashes[i], request.pages[i]):
                break
            self.advance(Work(request, request.computed, BLOCK), BLOCK)
        if request.preempted == 0:
            request.cached += request.computed - before
        return request.computed > before or request not in self.running

    def _grow(self, request: Request, length: int, plan: Plan) -> bool:
        """Give a running request the pages for so many keys, if need be those of the last ones; False if it is last."""
        while (more := self.pages.allocate(-(-length // BLOCK) - len(request.pages))) is None:
            last = self.running[-1]
            self._preempt(last, plan)
            if last is request:
                return False
        request.pages += more
        return True

    def _preempt(self, request: Request, plan: Plan) -> None:
        plan.works = [work for work in plan.works if work.request is not request]
        plan.copies = [copy for copy in plan.copies if copy[1] not in request.pages]
        self._stop(request)
        request.preempted += 1
        self.preemptions += 1
        insort(self.waiting, request, key=lambda r: r.key)

    def _stop(self, request: Request) -> None:
        for key in request.hashes[request.computed // BLOCK :]:
            self._unpromise(request, key)
        self.running.remove(request)
        self.pages.release(request.pages)
        request.pages, request.computed = [], 0

    def _unpromise(self, request: Request, key: bytes) -> None:
        if self._promised.get(key) is request:
            del self._promised[key]

    def _missing(self, request: Request) -> int:
        """Pages that a running request's prompt has still to get."""
        return max(0, -(-(len(request.ids) + 1) // BLOCK) - len(request.pages))

    def _draft(self, request: Request, propose: Propose, most: int) -> tuple[int, ...]:
        """Draft tokens that fit into the budget, the reply and the pages that are free without preempting anyone.

        A constrained reply gets none: what it allows at a place depends on the tokens before.
        """
        most = min(most, request.params.max_tokens - request.num_output - 1)
        if most <= 0 or request.constraint is not None:
            return ()
        draft = tuple(propose(request)[:most])
        more = self.pages.allocate(max(0, -(-(len(request.ids) + len(draft)) // BLOCK) - len(request.pages)))
        if more is None:
            return draft[: len(request.pages) * BLOCK - len(request.ids)]
        request.pages += more
        return draft
