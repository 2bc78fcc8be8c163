"""Pages are neither lost nor given twice; prefixes are found; the longest unused, deepest page goes first."""

from __future__ import annotations

import random

import pytest

from openm3.config import BLOCK
from openm3.engine.pages import Pages, Published, page_hashes

ROOT = b"a model"


def text(seed: int, pages: int, tail: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1000) for _ in range(pages * BLOCK + tail)]


def publish(pages: Pages, held: list[int], ids: list[int]) -> list[bytes]:
    hashes = list(page_hashes(ids, ROOT))
    for i, (page, key) in enumerate(zip(held, hashes, strict=False)):
        parent = hashes[i - 1] if i else ROOT
        pages.publish(page, Published(key, parent, tuple(ids[i * BLOCK : (i + 1) * BLOCK])))
    return hashes


def test_hashes_stand_for_everything_before_them() -> None:
    ids = text(0, 3, 50)
    hashes = list(page_hashes(ids, ROOT))
    assert len(hashes) == 3 and len(set(hashes)) == 3
    assert list(page_hashes(ids[: 2 * BLOCK], ROOT)) == hashes[:2]
    assert list(page_hashes(ids, ROOT, hashes[:2])) == hashes[2:]
    assert set(page_hashes(ids, b"another model")).isdisjoint(hashes)
    changed = list(page_hashes([ids[0] + 1, *ids[1:]], ROOT))
    assert set(changed).isdisjoint(hashes)


def test_allocation_is_all_or_nothing() -> None:
    pages = Pages(4)
    first = pages.allocate(3)
    assert first is not None and len(set(first)) == 3
    assert pages.allocate(2) is None
    assert (pages.num_available, pages.num_held) == (1, 3)
    pages.release(first)
    assert sorted(pages.allocate(4) or []) == [0, 1, 2, 3]
    assert pages.allocate(0) == []


def test_published_pages_stay_until_the_room_is_needed() -> None:
    pages, ids = Pages(4), text(1, 3)
    held = pages.allocate(3)
    assert held is not None
    hashes = publish(pages, held, ids)
    pages.release(held)
    pages.check([])
    assert pages.find(hashes) == held and pages.num_available == 4
    # The free page goes first, then the deepest page of the prefix.
    assert pages.allocate(2) == [next(iter({0, 1, 2, 3} - set(held))), held[2]]
    assert pages.find(hashes) == held[:2] and pages.evicted == 1


def test_the_longest_unused_prefix_goes_first() -> None:
    pages = Pages(4)
    sequences = [text(seed, 2) for seed in (2, 3)]
    found = []
    for ids in sequences:
        held = pages.allocate(2)
        assert held is not None
        found.append((held, publish(pages, held, ids)))
        pages.release(held)
    for page in found[0][0]:
        pages.hold(page)
    pages.release(found[0][0])
    assert pages.allocate(2) == found[1][0][::-1]
    assert pages.find(found[0][1]) == found[0][0] and pages.find(found[1][1]) == []


def test_a_held_prefix_is_never_evicted() -> None:
    pages, ids = Pages(3), text(4, 2)
    held = pages.allocate(2)
    assert held is not None
    publish(pages, held, ids)
    pages.hold(held[0])
    pages.release(held)
    assert pages.is_shared(held[0])
    assert pages.allocate(3) is None and pages.allocate(2) is not None
    pages.check([[held[0]], [p for p in range(3) if p != held[0]]])


def test_what_is_published_twice_is_kept_once() -> None:
    pages, ids = Pages(2), text(5, 1)
    first, second = (pages.allocate(1) for _ in range(2))
    assert first is not None and second is not None
    (key,) = page_hashes(ids, ROOT)
    assert pages.publish(first[0], Published(key, ROOT, tuple(ids)))
    assert not pages.publish(second[0], Published(key, ROOT, tuple(ids)))
    pages.release(second)
    pages.release(first)
    assert pages.find([key]) == first
    pages.check([])


def test_pages_are_found_up_to_their_middle() -> None:
    pages, ids = Pages(3), text(6, 1)
    branches = [ids + text(seed, 1) for seed in (7, 8)]
    held = pages.allocate(3)
    assert held is not None
    hashes = publish(pages, held[:2], branches[0])
    second = list(page_hashes(branches[1], ROOT))
    pages.publish(held[2], Published(second[1], hashes[0], tuple(branches[1][BLOCK:])))
    wanted = branches[1][BLOCK : BLOCK + 100] + [-1] * 28
    assert pages.find_partly(hashes[0], wanted) == (held[2], 100)
    assert pages.find_partly(hashes[0], branches[0][BLOCK : BLOCK + 7]) == (held[1], 7)
    assert pages.find_partly(hashes[0], [-1]) == (0, 0)
    assert pages.find_partly(hashes[1], wanted) == (0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_ten_thousand_random_operations_lose_nothing(seed: int) -> None:
    """Against a model of it: sequences that grow, share prefixes, are released, and are found again."""
    generator = random.Random(seed)
    pages = Pages(40)
    texts = [text(100 + i % 9, 2) + text(200 + i, 4) for i in range(30)]
    content: dict[int, tuple[int, ...]] = {}
    live: list[tuple[list[int], list[int]]] = []
    for step in range(10_000):
        action = generator.random()
        if action < 0.4 or not live:
            ids = generator.choice(texts)[: generator.randrange(1, 7) * BLOCK]
            hashes = list(page_hashes(ids, ROOT))
            found = pages.find(hashes)
            for i, page in enumerate(found):
                assert content[page] == tuple(ids[: (i + 1) * BLOCK]), "a page was found that holds something else"
                pages.hold(page)
            more = pages.allocate(len(hashes) - len(found))
            if more is None:
                pages.release(found)
                assert len(hashes) - len(found) > pages.num_available - len(found)
                continue
            held = found + more
            for i in range(len(found), len(held)):
                content[held[i]] = tuple(ids[: (i + 1) * BLOCK])
                parent = hashes[i - 1] if i else ROOT
                pages.publish(held[i], Published(hashes[i], parent, tuple(ids[i * BLOCK : (i + 1) * BLOCK])))
            live.append((held, ids))
        elif action < 0.5:
            more = pages.allocate(generator.randrange(3))
            if more is not None:
                for page in more:
                    content[page] = ()
                live.append((more, []))
        else:
            held, _ = live.pop(generator.randrange(len(live)))
            pages.release(held)
        if step % 50 == 0:
            pages.check([held for held, _ in live])
    for held, _ in live:
        pages.release(held)
    pages.check([])
    assert pages.num_available == 40 and pages.evicted > 100
