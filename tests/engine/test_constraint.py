"""Constraints decide what a reply may be made of, whatever else runs; one that fails ends its own reply alone."""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from openm3.config import BLOCK, EngineConfig
from openm3.engine.asynchronous import AsyncEngine
from openm3.engine.engine import Engine
from openm3.engine.request import SamplingParams
from openm3.model.model import Model, load

GOLDEN = Path(__file__).parents[1] / "golden/m3-random-s0"
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=12, temperature=1.0, top_k=40, top_p=0.95, seed=7, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> Model:
    return load(GOLDEN / "model")


def words(seed: int, count: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(300) for _ in range(count)]


def engine(model: Model, **config: object) -> Engine:
    values: dict[str, object] = {"cache_tokens": 40 * BLOCK, "step_tokens": 300, "max_requests": 8, "check": True}
    return Engine(model, EngineConfig(**{**values, **config}))  # type: ignore[arg-type]


class Stairs:
    """Token n of the reply is one of `width` ids from `width * n` on; free at place `free`; ends after `most`."""

    def __init__(self, width: int = 3, most: int | None = None, free: int | None = None) -> None:
        self.width, self.most, self.free = width, most, free
        self.taken: list[int] = []

    def mask(self) -> NDArray[np.bool_] | None:
        if len(self.taken) == self.free:
            return None
        first = self.width * len(self.taken)
        allowed = np.zeros(first + self.width, dtype=np.bool_)
        allowed[first:] = True
        return allowed

    def accept(self, token: int) -> None:
        self.taken.append(token)

    @property
    def finished(self) -> bool:
        return len(self.taken) == self.most


def expected(model: Model, prompt: list[int], count: int, width: int = 3) -> list[int]:
    """What a greedy reply on stairs is, from the model's own logits."""
    ids: list[int] = []
    for place in range(count):
        logit_V = model.logits(prompt + ids)[-1]
        ids.append(int(logit_V[width * place : width * (place + 1)].argmax()) + width * place)
    return ids


def test_a_reply_is_made_of_what_is_allowed(model: Model) -> None:
    served, prompt = engine(model), words(1, 40)
    for params in (
        GREEDY,
        SAMPLED,
        replace(SAMPLED, repetition_penalty=1.3, presence_penalty=1.0, frequency_penalty=-0.5, min_p=0.01),
        replace(GREEDY, min_tokens=12),
    ):
        steps = Stairs()
        number = served.add(prompt, params, constraint=steps)
        while served.has_work:
            last = served.step()[number]
        assert last.completion is not None and last.completion.finish_reason == "length"
        assert last.completion.ids == steps.taken and [i // 3 for i in steps.taken] == list(range(12))
        if params.plain:
            assert steps.taken == expected(model, prompt, 12)


def test_constrained_and_free_replies_run_side_by_side(model: Model) -> None:
    """Few pages: requests are sent back and computed again, and still each token is accepted once."""
    served = engine(model, cache_tokens=9 * BLOCK, step_tokens=200)
    prompts = [words(i, 100 + 90 * i) for i in range(5)]
    constraints = [Stairs(most=70) if i % 2 == 0 else None for i in range(5)]
    params = replace(GREEDY, max_tokens=80)
    numbers = [served.add(p, params, constraint=c) for p, c in zip(prompts, constraints, strict=True)]
    done = {}
    while served.has_work:
        done |= {number: delta.completion for number, delta in served.step().items() if delta.completion is not None}
    assert served.scheduler.preemptions > 0
    for number, prompt, constraint in zip(numbers, prompts, constraints, strict=True):
        if constraint is None:
            assert done[number].ids == list(model.generate(prompt, max_new_tokens=80))
        else:
            assert done[number].ids == constraint.taken and len(constraint.taken) == 70
            assert done[number].finish_reason == "stop"
            assert constraint.taken[:4] == expected(model, prompt, 4)


def test_no_mask_is_no_restriction_and_no_drafts(model: Model) -> None:
    served = engine(model, draft_tokens=8)
    prompt = words(2, 20) * 3
    free = Stairs(free=0)
    (delta,) = served.stream(prompt, replace(GREEDY, max_tokens=1), constraint=free)
    assert delta.ids == list(model.generate(prompt, max_new_tokens=1)) == free.taken
    *_, last = served.stream(prompt, replace(GREEDY, max_tokens=30), constraint=Stairs())
    assert last.completion is not None and last.completion.usage.drafted == 0


def test_logprobs_are_the_models_own(model: Model) -> None:
    prompt = words(3, 30)
    *_, last = engine(model).stream(prompt, replace(GREEDY, max_tokens=4, logprobs=2), constraint=Stairs())
    assert last.completion is not None and last.completion.logprobs is not None
    logprob_TV = model.logits(prompt + last.completion.ids).log_softmax(-1)[len(prompt) - 1 :]
    for place, logprob_V in zip(last.completion.logprobs, logprob_TV, strict=False):
        assert place.logprob == pytest.approx(float(logprob_V[place.id]), abs=1e-4)
        assert place.top[0][0] == int(logprob_V.argmax()) and math.isfinite(place.top[1][1])


def test_min_tokens_forbid_an_end_unless_nothing_else_is_allowed(model: Model) -> None:
    end = model.tokenizer.eos_id

    class Either(Stairs):
        def mask(self) -> NDArray[np.bool_] | None:
            allowed = np.zeros(end + 1, dtype=np.bool_)
            allowed[[5, end] if len(self.taken) < 3 else [end]] = True
            return allowed

    params = SamplingParams(max_tokens=9, min_tokens=6, temperature=2.0, seed=1)
    *_, last = engine(model).stream(words(4, 10), params, constraint=Either())
    assert last.completion is not None
    assert (last.completion.ids, last.completion.finish_reason) == ([5, 5, 5], "stop")


class Failing(Stairs):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def mask(self) -> NDArray[np.bool_] | None:
        if len(self.taken) == 2 and self.where in ("mask", "nothing", "shape"):
            if self.where == "mask":
                raise RuntimeError("no mask today")
            return np.zeros(3 if self.where == "nothing" else (2, 9**6), dtype=np.bool_)  # type: ignore[arg-type]
        return super().mask()

    def accept(self, token: int) -> None:
        if len(self.taken) == 2 and self.where == "accept":
            raise RuntimeError("not this one")
        super().accept(token)

    @property
    def finished(self) -> bool:
        if len(self.taken) == 3 and self.where == "finished":
            raise RuntimeError("who knows")
        return False


@pytest.mark.parametrize("where", ["mask", "nothing", "shape", "accept", "finished"])
def test_a_constraint_that_fails_ends_its_own_reply_alone(where: str, model: Model) -> None:
    served = engine(model)
    other = served.add(words(6, 50), GREEDY)
    number = served.add(words(5, 30), SAMPLED, constraint=Failing(where))
    done = {}
    while served.has_work:
        done |= {n: delta.completion for n, delta in served.step().items() if delta.completion is not None}
    assert (done[number].finish_reason, len(done[number].ids)) == ("error", 2)
    assert done[other].ids == list(model.generate(words(6, 50), max_new_tokens=12))
    assert served.pages.num_held == 0


def test_async_replies_take_constraints(model: Model) -> None:
    async def scenario() -> list[int]:
        async with AsyncEngine(engine(model)) as served:
            constraint = Stairs(most=5)
            completion = await served.generate(words(7, 30), GREEDY, constraint=constraint)
            assert completion.ids == constraint.taken and completion.finish_reason == "stop"
            streamed = [i async for d in served.stream(words(7, 30), GREEDY, constraint=Stairs(most=5)) for i in d.ids]
            assert streamed == completion.ids
            return streamed

    assert asyncio.run(scenario()) == expected(model, words(7, 30), 5)
