"""The scheduler alone, with a model that only counts: nobody starves, nothing is lost, prefixes are computed once."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import pytest

from openm3.config import BLOCK
from openm3.engine.pages import Pages
from openm3.engine.request import Placed, Request, SamplingParams
from openm3.engine.scheduler import Plan, Scheduler
from openm3.tokens.media import Media


def make(num_pages: int = 64, step_tokens: int = 512, max_requests: int = 4, reuse: bool = True) -> Scheduler:
    return Scheduler(Pages(num_pages), step_tokens=step_tokens, max_requests=max_requests, root=b"root", reuse=reuse)


def request(
    number: int, prompt: Iterable[int], max_tokens: int = 4, arrived: float = 0.0, priority: int = 0
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, priority=priority)
    return Request(number, list(prompt), params, seed=0, arrived=arrived)


def words(seed: int, count: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1000) for _ in range(count)]


def next_token(ids: list[int]) -> int:
    """What the counting model says: any function of everything before."""
    return sum(ids[-7:]) * 31 % 1000


class Counting:
    """Carries out plans on pages that hold token ids, and checks that every key it would read is right."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.content: dict[int, list[int]] = {}
        self.computed = 0
        self.steps = 0

    def step(self) -> list[Request]:
        plan: Plan = self.scheduler.schedule()
        self.steps += 1
        self.computed += plan.num_tokens
        assert plan.num_tokens <= self.scheduler.step_tokens
        assert len({work.request.id for work in plan.works}) == len(plan.works) <= self.scheduler.max_requests
        for source, target in plan.copies:
            self.content[target] = list(self.content[source])
        self.scheduler.check()
        self.scheduler.settle()
        finished = []
        for work in plan.works:
            r = work.request
            for position in range(work.first, work.first + work.count):
                page = r.pages[position // BLOCK]
                assert not (position % BLOCK == 0 and self.scheduler.pages.is_shared(page)), "a shared page is written"
                row = self.content.setdefault(page, [])
                if position % BLOCK == 0:
                    row = self.content[page] = []
                row[position % BLOCK :] = r.names(position, position + 1)
            end = work.first + work.count
            kept = [i for page in r.pages for i in self.content[page][:BLOCK]][:end]
            assert kept == r.names(0, end), "the pages of a request do not hold its tokens"
            if work.samples:
                r.ids.append(next_token(r.ids))
            self.scheduler.advance(work, work.count)
            if r.num_output == r.params.max_tokens:
                finished.append(r)
        self.scheduler.check()
        for r in finished:
            self.scheduler.remove(r)
        self.scheduler.check()
        return finished

    def run(self, limit: int = 10_000) -> list[Request]:
        done = []
        while self.scheduler.has_work:
            done += self.step()
            assert self.steps < limit
        return done


def expected(r: Request) -> list[int]:
    ids = list(r.prompt)
    for _ in range(r.params.max_tokens):
        ids.append(next_token(ids))
    return ids


def test_one_request_reads_in_chunks_and_writes() -> None:
    counting = Counting(make())
    r = request(1, words(0, 1300), max_tokens=5)
    counting.scheduler.add(r)
    assert counting.run() == [r] and r.ids == expected(r)
    # 1,300 tokens in chunks of 512, of which the last gives the first token.
    assert counting.steps == 3 + 4 and counting.computed == 1300 + 4


def test_the_same_prompt_again_computes_less_than_a_page() -> None:
    for length in (1, 15, 128, 129, 1000, 1024, 1025):
        counting = Counting(make())
        for number in (1, 2):
            counting.scheduler.add(request(number, words(1, length), max_tokens=1))
            before = counting.computed
            (r,) = counting.run()
        assert r.ids == expected(r)
        assert counting.computed - before == length - r.cached < BLOCK
    assert (length, r.cached) == (1025, 1024)


def test_a_prefix_is_found_up_to_the_middle_of_a_page() -> None:
    counting = Counting(make())
    shared = words(2, 700)
    for number, tail in ((1, words(3, 300)), (2, words(4, 300))):
        counting.scheduler.add(request(number, shared + tail))
        (r,) = counting.run()
        assert r.ids == expected(r)
    assert r.cached == 700


def named(digest: bytes, count: int) -> Media:
    """A picture of so many tokens that nobody looks at."""
    return Media("image", np.zeros((0, 1176), np.uint8), ((1, 2, 2 * count),), None, (28, 28), digest)


def test_equal_placeholders_of_different_pictures_share_nothing() -> None:
    """The page that holds the placeholders, up to the first of them, and none after it."""
    counting = Counting(make(num_pages=200))
    before, after = words(6, 300), words(7, 500)
    prompt = before + [9] * 200 + after
    cached = []
    for number, picture in enumerate((b"a cat", b"a dog", b"a cat", None)):
        r = request(number, prompt)
        r.media = [Placed(named(picture, 200), 0, 300, 0, 200)] if picture is not None else []
        counting.scheduler.add(r)
        assert counting.run() == [r] and r.ids == expected(r)
        cached.append(r.cached)
    assert cached == [0, 300, len(prompt) // BLOCK * BLOCK, 300]


def test_a_part_of_a_picture_has_a_name_of_its_own() -> None:
    r = request(1, [5, 9, 9, 9, 6])
    r.media = [Placed(named(b"a cat", 5), 0, 1, 2, 3)]
    names = r.names(0, 5)
    assert names[0] == 5 and names[4] == 6 and len({*names[1:4]}) == 3 and max(names[1:4]) < 0
    assert r.names(2, 4) == names[2:4] and r.names(4, 5) == [6]
    assert request(2, [5, 9]).names(0, 2) == [5, 9]
    # The same part elsewhere has the same name; another row of the same video has not.
    r.media = [Placed(named(b"a cat", 5), 0, 2, 3, 2), Placed(named(b"a cat", 5), 1, 4, 3, 1)]
    assert r.names(2, 4) == names[2:4] and r.names(4, 5)[0] not in names


def test_a_prefix_that_others_are_reading_is_waited_for() -> None:
    counting = Counting(make(num_pages=200, max_requests=16))
    shared = words(5, 2000)
    for number in range(16):
        counting.scheduler.add(request(number, shared + words(100 + number, 50)))
    done = counting.run()
    assert len(done) == 16 and all(r.ids == expected(r) for r in done)
    assert counting.computed < 2000 + 16 * (2000 % BLOCK + 50 + 4)


def test_short_prompts_do_not_wait_for_long_ones() -> None:
    counting = Counting(make(num_pages=400))
    long = request(1, words(6, 40_000), max_tokens=1)
    counting.scheduler.add(long)
    counting.step()
    short = request(2, words(7, 200), max_tokens=1, arrived=1.0)
    counting.scheduler.add(short)
    assert counting.step() == [short]
    assert long.computed > 700


def test_whoever_writes_gets_a_token_every_step() -> None:
    counting = Counting(make(num_pages=200))
    writer = request(1, words(8, 10), max_tokens=60)
    counting.scheduler.add(writer)
    counting.step()
    counting.scheduler.add(request(2, words(9, 20_000), arrived=1.0))
    for written in range(2, 30):
        counting.step()
        assert writer.num_output == written


def test_without_room_the_last_one_waits_and_all_end_right() -> None:
    counting = Counting(make(num_pages=12, max_requests=4))
    requests = [request(n, words(10 + n, 300), max_tokens=500, arrived=n) for n in range(4)]
    for r in requests:
        counting.scheduler.add(r)
    done = counting.run()
    assert counting.scheduler.preemptions > 0
    assert done[0] is requests[0] and requests[0].preempted == 0
    assert all(r.ids == expected(r) for r in requests)


def test_priority_is_a_head_start() -> None:
    counting = Counting(make(max_requests=1))
    first, urgent, late = (
        request(1, words(20, 30), max_tokens=2, arrived=0.0),
        request(2, words(21, 30), max_tokens=2, arrived=5.0, priority=1),
        request(3, words(22, 30), max_tokens=2, arrived=11.0, priority=1),
    )
    for r in (first, late, urgent):
        counting.scheduler.add(r)
    assert counting.run() == [urgent, first, late]


def test_a_request_as_large_as_the_pool_runs() -> None:
    counting = Counting(make(num_pages=8))
    assert counting.scheduler.fits(8 * BLOCK) and not counting.scheduler.fits(8 * BLOCK + 1)
    for number, length in ((1, 8 * BLOCK - 20), (2, 8 * BLOCK - 60)):
        ids = words(30, 8 * BLOCK)[:length]
        # The second one shares all but its end, and needs every page there is.
        r = request(number, [*ids[:-40], *words(31, 40)], max_tokens=8 * BLOCK + 1 - length)
        counting.scheduler.add(r)
        assert counting.run() == [r] and r.ids == expected(r)


def test_draft_tokens_fit_into_budget_reply_and_free_pages() -> None:
    scheduler = make(num_pages=2, step_tokens=140, max_requests=2)
    r = request(1, words(40, 250), max_tokens=7)
    scheduler.add(r)
    while r.num_output == 0:
        plan = scheduler.schedule(lambda _: range(100))
        scheduler.settle()
        for work in plan.works:
            if work.samples:
                r.ids.append(1)
            scheduler.advance(work, work.count)
    (work,) = scheduler.schedule(lambda _: range(100)).works
    # 251 tokens are there, two pages hold 256, and the reply may still come to 7.
    assert work.draft == (0, 1, 2, 3, 4)
    assert work.ids == [1, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(("writers", "drafts"), [(1, 15), (2, 7), (5, 2), (8, 1), (9, 0), (16, 0)])
def test_the_more_requests_write_the_fewer_drafts_they_get(writers: int, drafts: int) -> None:
    scheduler = make(max_requests=16)
    requests = [request(number, words(number, 20), 60) for number in range(writers)]
    for r in requests:
        scheduler.add(r)
    for work in scheduler.schedule().works:
        work.request.ids.append(1)
        scheduler.advance(work, work.count)
    works = scheduler.schedule(lambda _: range(100)).works
    assert [len(work.draft) for work in works] == [drafts] * writers


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_random_walks(seed: int, reuse: bool) -> None:
    """Arrivals, priorities, shared prefixes, aborts and too little room: every reply is right, and nobody starves."""
    generator = random.Random(seed)
    counting = Counting(make(num_pages=generator.choice((10, 20, 60)), step_tokens=400, max_requests=6, reuse=reuse))
    scheduler = counting.scheduler
    roots = [words(50 + i, generator.randrange(1, 700)) for i in range(4)]
    live: dict[int, Request] = {}
    aborted = 0
    for number in range(150):
        prompt = generator.choice(roots) + words(1000 + number, generator.randrange(1, 300))
        r = request(number, prompt, generator.randrange(1, 60), arrived=counting.steps, priority=generator.randrange(3))
        if not scheduler.fits(r.longest):
            continue
        live[number] = r
        scheduler.add(r)
        for _ in range(generator.randrange(12)):
            for done in counting.step() if scheduler.has_work else ():
                assert done.ids == expected(live.pop(done.id))
        if live and generator.random() < 0.1:
            scheduler.remove(live.pop(generator.choice(list(live))))
            scheduler.check()
            aborted += 1
    # The oldest is never sent back, so each in turn ends after at most its own tokens and pages.
    bound = counting.steps + sum(r.longest for r in live.values())
    while scheduler.has_work:
        for done in counting.step():
            assert done.ids == expected(live.pop(done.id))
        assert counting.steps <= bound
    assert not live and aborted > 3
    assert scheduler.pages.num_available == scheduler.pages.num_pages
