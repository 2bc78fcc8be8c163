"""What replies attend to: the same sums as a witness makes of the model alone, whatever the engine does meanwhile."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from openm3.config import BLOCK, EngineConfig
from openm3.engine.engine import Engine
from openm3.engine.lookup import Lookup
from openm3.engine.request import Attention, Completion, Request, SamplingParams
from openm3.errors import PromptError
from openm3.model.model import Model, load
from openm3.model.witness import Witness

GOLDEN = Path(__file__).parents[1] / "golden/m3-random-s0"
ASKED = SamplingParams(max_tokens=6, ignore_eos=True, attention=True)


@pytest.fixture(scope="module")
def model() -> Model:
    return load(GOLDEN / "model")


def words(seed: int, count: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(300) for _ in range(count)]


def engine(model: Model, **config: object) -> Engine:
    values: dict[str, object] = {"cache_tokens": 60 * BLOCK, "step_tokens": 300, "max_requests": 8, "check": True}
    return Engine(model, EngineConfig(**{**values, **config}))  # type: ignore[arg-type]


def seen_alone(model: Model, prompt: list[int], *, count: int = 6, skip: int = 0) -> Attention:
    """Of the model's own reply, its first `skip` tokens not counted."""
    witness = Witness(len(prompt))
    session = model.session(len(prompt) + count)
    session.read(prompt[:-1])
    logit_V = session.read(prompt[-1:], observer=witness)
    for i, _ in enumerate(session.decode(logit_V, count, witness), 1):
        if i == skip:
            witness.forget()
    return Attention(witness.mass_S.numpy(), witness.attended_share)


def assert_same(found: Completion, expected: Attention) -> None:
    assert found.attention is not None
    np.testing.assert_allclose(found.attention.mass_S, expected.mass_S, rtol=1e-4, atol=1e-7)
    assert found.attention.share == pytest.approx(expected.share)
    assert found.attention.mass_S.sum() > 0


def test_the_same_in_a_batch(model: Model) -> None:
    prompts = [words(1, 40) * 50, words(2, 700), words(3, 20), words(1, 40) * 20 + words(4, 5)]
    params = [ASKED, replace(ASKED, attention=False), ASKED, ASKED]
    replies = engine(model).generate(prompts, params)
    assert replies[1].attention is None
    for i in (0, 2, 3):
        assert_same(replies[i], seen_alone(model, prompts[i]))


class Oracle(Lookup):
    """Drafts one token that is right and one that is wrong."""

    def __init__(self, ids: list[int]) -> None:
        super().__init__(2)
        self._reply = ids

    def __call__(self, request: Request) -> list[int]:
        right, *after = [*self._reply[request.num_output :], 0, 0]
        return [right, (after[0] + 1) % 300]


def test_drafts_that_are_wrong_do_not_count(model: Model) -> None:
    prompt = words(9, 300)
    served = engine(model)
    served._lookup = Oracle(list(model.generate(prompt, max_new_tokens=6)))
    (reply,) = served.generate([prompt], ASKED)
    assert 0 < reply.usage.accepted < reply.usage.drafted
    assert_same(reply, seen_alone(model, prompt))


def test_the_same_behind_a_cached_prefix(model: Model) -> None:
    prompt = words(5, 3 * BLOCK + 40)
    served = engine(model)
    served.generate([prompt], replace(ASKED, attention=False))
    for own in (prompt, prompt[: 3 * BLOCK] + words(6, 9), prompt[: 2 * BLOCK]):
        (reply,) = served.generate([own], ASKED)
        assert reply.usage.cached_tokens >= BLOCK
        assert_same(reply, seen_alone(model, own))


def test_the_same_after_being_sent_back(model: Model) -> None:
    params = replace(ASKED, max_tokens=30)
    prompts = [words(seed, BLOCK - 20) for seed in range(2)]
    served = engine(model, cache_tokens=3 * BLOCK, prefix_cache=False)
    replies = served.generate(prompts, params)
    assert served.stats()["preemptions"] > 0
    for prompt, reply in zip(prompts, replies, strict=True):
        assert_same(reply, seen_alone(model, prompt, count=30))


def test_what_came_before_a_token_does_not_count(model: Model) -> None:
    prompt = words(7, 400)
    ids = list(model.generate(prompt, max_new_tokens=6))
    third = ids[2]
    assert third not in ids[:2] + ids[3:]
    (reply,) = engine(model).generate([prompt], replace(ASKED, attention_after=third))
    assert_same(reply, seen_alone(model, prompt, skip=3))
    (nothing,) = engine(model).generate([prompt], replace(ASKED, attention_after=third, max_tokens=3))
    assert nothing.attention is not None
    assert nothing.attention.share is None
    assert not nothing.attention.mass_S.any()


def test_the_end_token_was_drawn_too(model: Model) -> None:
    prompt = words(7, 400)
    ids = list(model.generate(prompt, max_new_tokens=6))
    (reply,) = engine(model).generate([prompt], replace(ASKED, stop_ids=[ids[3]]))
    assert reply.ids == ids[:3]
    assert_same(reply, seen_alone(model, prompt, count=4))


def test_who_does_not_ask_pays_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    served = engine(model)
    seen: list[object] = []
    hidden = served.model.network.hidden

    def watched(batch: object, pools: object = None, observer: object = None) -> object:
        seen.append(observer)
        return hidden(batch, pools, observer)  # type: ignore[arg-type]

    monkeypatch.setattr(served._probe, "every", 10**9)
    monkeypatch.setattr(served._probe, "_step", 10)
    monkeypatch.setattr(served.model.network, "hidden", watched)
    served.generate([words(3, 700)], replace(ASKED, attention=False))
    assert set(seen) == {None}
    steps = len(seen)
    # Of three steps that read the prompt the last one draws.
    served.generate([words(8, 700)], ASKED)
    assert [observer is not None for observer in seen[steps:]] == [False, False, *[True] * 6]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention": 1}, "attention must be true or false, not 1"),
        ({"attention_after": "x"}, "attention_after must be a whole number, not 'x'"),
    ],
)
def test_wrong_values(values: dict[str, object], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        SamplingParams(**values)  # type: ignore[arg-type]
