"""Drafts come from the text, and no reply depends on them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from openm3.config import BLOCK, EngineConfig
from openm3.engine.engine import Engine
from openm3.engine.lookup import LAST, PATIENCE, Lookup
from openm3.engine.request import Request, SamplingParams
from openm3.model.model import Model, load


def request(ids: list[int]) -> Request:
    return Request(1, ids, SamplingParams(), seed=0, arrived=0.0)


@pytest.mark.parametrize(
    ("ids", "draft"),
    [
        ([1, 2, 3, 4, 5, 9, 1, 2, 3], [4, 5, 9, 1]),
        ([1, 2, 3, 4, 7, 1, 2, 3, 5, 7, 1, 2, 3], [5, 7, 1, 2]),
        ([1, 2, 3, 1, 2, 3], [1, 2, 3]),
        ([5, 5, 5, 5], [5]),
        ([1, 2, 3, 4, 2, 3], []),
        ([1, 2, 3], []),
        ([1], []),
    ],
)
def test_the_last_place_that_ends_alike(ids: list[int], draft: list[int]) -> None:
    assert LAST == 3 and Lookup(4)(request(ids)) == draft


def test_wrong_drafts_are_paused_and_right_ones_grow() -> None:
    lookup, r = Lookup(8), request([1, 2, 3, *range(10, 30), 1, 2, 3])
    assert len(lookup(r)) == 8
    r.drafted += 8
    assert [len(lookup(r)) for _ in range(PATIENCE + 1)] == [0] * PATIENCE + [4]
    r.drafted, r.accepted = r.drafted + 4, r.accepted + 4
    assert len(lookup(r)) == 8
    r.drafted, r.accepted = r.drafted + 8, r.accepted + 2
    assert len(lookup(r)) == 3
    lookup.forget(1)
    assert len(lookup(r)) == 8


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load("m3-tiny")


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_drafts_change_no_reply(temperature: float, tiny: Model) -> None:
    """Text that repeats itself, several requests side by side, stop strings and lengths in the middle of a draft."""
    text = Path(__file__).read_text(encoding="utf-8")
    ids = tiny.tokenizer.encode(text + text[:1500])
    params = SamplingParams(max_tokens=40, temperature=temperature, seed=3, ignore_eos=True)
    asked = [replace(params, max_tokens=length) for length in (1, 2, 7, 40)] + [replace(params, stop="replac")]
    replies = []
    for draft_tokens in (0, 6):
        config = EngineConfig(cache_tokens=200 * BLOCK, draft_tokens=draft_tokens, check=True)
        engine = Engine(tiny, config)
        replies.append(engine.generate([ids[: len(ids) - 50 * i] for i in range(5)], asked))
    for plain, drafted in zip(*replies, strict=True):
        assert (plain.ids, plain.text, plain.finish_reason) == (drafted.ids, drafted.text, drafted.finish_reason)
        assert plain.usage.drafted == 0
    if temperature == 0:
        usage = replies[1][3].usage
        assert usage.drafted > 0 and usage.completion_tokens == 40
        assert sum(reply.usage.accepted for reply in replies[1]) > 5


def test_drafts_survive_too_few_pages(tiny: Model) -> None:
    generator = random.Random(0)
    engine = Engine(tiny, EngineConfig(cache_tokens=10 * BLOCK, max_requests=4, draft_tokens=8, check=True))
    loop = tiny.tokenizer.encode("for x in range(10):\n    print(x)\n" * 12)
    prompts = [loop[: generator.randrange(100, len(loop))] for _ in range(6)]
    params = SamplingParams(max_tokens=150, ignore_eos=True)
    for prompt, reply in zip(prompts, engine.generate(prompts, params), strict=True):
        assert reply.ids == list(tiny.generate(prompt, max_new_tokens=150))
    assert engine.scheduler.preemptions > 0
