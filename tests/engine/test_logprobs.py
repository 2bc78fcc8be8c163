"""Log-probabilities of prompts: the model's own, in whatever chunks and with whatever in the cache."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openm3.config import BLOCK, EngineConfig
from openm3.engine import logprobs
from openm3.engine.engine import Engine
from openm3.engine.request import Completion, Logprob, SamplingParams
from openm3.errors import PromptError
from openm3.model.model import Model, load

GOLDEN = Path(__file__).parents[1] / "golden/m3-random-s0"
ASKED = SamplingParams(max_tokens=3, ignore_eos=True, prompt_logprobs=2)


@pytest.fixture(scope="module")
def model() -> Model:
    return load(GOLDEN / "model")


def words(seed: int, count: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(300) for _ in range(count)]


def engine(model: Model, **config: object) -> Engine:
    values: dict[str, object] = {"cache_tokens": 40 * BLOCK, "step_tokens": 300, "max_requests": 8, "check": True}
    return Engine(model, EngineConfig(**{**values, **config}))  # type: ignore[arg-type]


def check(model: Model, prompt: list[int], found: list[Logprob] | None, count: int = 2) -> None:
    assert found is not None and [place.id for place in found] == prompt
    assert math.isnan(found[0].logprob) and found[0].top == ()
    logprob_TV = model.logits(prompt).log_softmax(-1)
    for place, logprob_V in zip(found[1:], logprob_TV, strict=False):
        assert place.logprob == pytest.approx(float(logprob_V[place.id]), abs=1e-4)
        assert [value for _, value in place.top] == pytest.approx(logprob_V.topk(count).values.tolist(), abs=1e-4)


@pytest.mark.parametrize("length", [1, 2, 128, 129, 700])
def test_a_prompts_logprobs_are_the_models_own(length: int, model: Model) -> None:
    served, prompt = engine(model), words(length, length)
    for _ in range(2):  # the second time all pages are in the cache
        (completion,) = served.generate([prompt], ASKED)
        check(model, prompt, completion.prompt_logprobs)
        assert completion.ids == list(model.generate(prompt, max_new_tokens=3))
        assert completion.usage.cached_tokens == 0 and completion.logprobs is None
    (cached,) = served.generate([prompt], replace(ASKED, prompt_logprobs=None))
    assert cached.usage.cached_tokens == min(length - 1, length // BLOCK * BLOCK)
    assert cached.prompt_logprobs is None


def test_pages_on_disk_are_not_read_either(tmp_path: Path, model: Model) -> None:
    prompt = words(8, 400)
    for _ in range(2):
        with engine(model, cache_dir=tmp_path) as served:
            (completion,) = served.generate([prompt], ASKED)
            check(model, prompt, completion.prompt_logprobs)
            assert completion.usage.cached_tokens == 0
        with engine(model, cache_dir=tmp_path) as served:
            assert served.generate([prompt], replace(ASKED, prompt_logprobs=None))[0].usage.cached_tokens == 3 * BLOCK


def test_they_come_with_the_first_delta_of_chunked_prompts(model: Model) -> None:
    served, prompt = engine(model, step_tokens=140), words(9, 500)
    deltas = list(served.stream(prompt, replace(ASKED, prompt_logprobs=0)))
    check(model, prompt, deltas[0].prompt_logprobs, 0)
    assert [delta.prompt_logprobs for delta in deltas[1:]] == [None, None]


def test_side_by_side_with_too_few_pages(model: Model) -> None:
    served = engine(model, cache_tokens=12 * BLOCK, step_tokens=140)
    shared = words(10, 300)
    prompts = [shared + words(i, 40 * i + 1) for i in range(6)]
    params = [replace(ASKED, max_tokens=150, prompt_logprobs=1 if i % 3 else None) for i in range(6)]
    numbers = [served.add(prompt, own) for prompt, own in zip(prompts, params, strict=True)]
    done: dict[int, Completion] = {}
    while served.has_work:
        done |= {number: delta.completion for number, delta in served.step().items() if delta.completion is not None}
    assert served.scheduler.preemptions > 0
    for number, prompt, own in zip(numbers, prompts, params, strict=True):
        assert done[number].ids == list(model.generate(prompt, max_new_tokens=150))
        if own.prompt_logprobs is not None:
            check(model, prompt, done[number].prompt_logprobs, 1)


def test_a_prompt_sent_back_halfway_goes_on_where_it_was(model: Model) -> None:
    served, prompt = engine(model, step_tokens=140), words(11, 600)
    number = served.add(prompt, ASKED)
    for _ in range(3):
        served.step()
    request = served.scheduler.running[0]
    known = len(request.prompt_logprobs)
    assert known == 3 * BLOCK + 1
    plan = served.scheduler.schedule()
    served.scheduler._preempt(request, plan)
    served.scheduler.settle()
    while served.has_work:
        delta = served.step().get(number)
    assert delta is not None and delta.completion is not None
    check(model, prompt, delta.completion.prompt_logprobs)


def test_no_new_tokens(model: Model) -> None:
    served, prompt = engine(model), words(12, 300)
    (completion,) = served.generate([prompt], replace(ASKED, max_tokens=0))
    check(model, prompt, completion.prompt_logprobs)
    assert (completion.ids, completion.text, completion.finish_reason) == ([], "", "length")
    assert completion.usage.completion_tokens == 0 and served.pages.num_held == 0
    with pytest.raises(PromptError, match="max_tokens must be at least 1, not 0"):
        SamplingParams(max_tokens=0)


@pytest.mark.parametrize("value", [-1, 21, 1.0, True, "1"])
def test_impossible_numbers_are_refused(value: object) -> None:
    with pytest.raises(PromptError, match="prompt_logprobs must be"):
        SamplingParams(prompt_logprobs=value)  # type: ignore[arg-type]


def test_few_logits_are_in_memory_at_a_time() -> None:
    seen: list[int] = []
    weight_VD = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))

    def head(x_SD: torch.Tensor) -> torch.Tensor:
        seen.append(x_SD.shape[0])
        return x_SD @ weight_VD.T

    hidden_SD = torch.randn(600, 8, generator=torch.Generator().manual_seed(1))
    hidden_SD[3] = torch.nan
    ids = [i % 50 for i in range(600)]
    found = logprobs.prompt_logprobs(head, hidden_SD, ids, 1)
    assert seen == [256, 256, 88]
    assert math.isnan(found[3].logprob) and found[3].top == ()
    expected = (hidden_SD @ weight_VD.T).log_softmax(-1)
    assert found[599].logprob == pytest.approx(float(expected[599, 49]), abs=1e-5)
    assert found[300].top[0][0] == int(expected[300].argmax())
