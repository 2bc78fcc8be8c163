"""Whatever else runs, in whatever order: every reply is the one that the model alone gives."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openm3.config import BLOCK, EngineConfig
from openm3.engine.engine import Engine
from openm3.engine.request import Completion, SamplingParams
from openm3.errors import BusyError, ConfigError, PromptError
from openm3.model.model import Model, load

GOLDEN = Path(__file__).parents[1] / "golden/m3-random-s0"
SAMPLED = SamplingParams(max_tokens=20, temperature=1.0, top_k=40, top_p=0.95, seed=7, ignore_eos=True)
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> Model:
    return load(GOLDEN / "model")


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load("m3-tiny")


def words(seed: int, count: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(300) for _ in range(count)]


def engine(model: Model, **config: object) -> Engine:
    values: dict[str, object] = {"cache_tokens": 40 * BLOCK, "step_tokens": 300, "max_requests": 8, "check": True}
    return Engine(model, EngineConfig(**{**values, **config}))  # type: ignore[arg-type]


def alone(model: Model, prompt: list[int], params: SamplingParams) -> Completion:
    (completion,) = engine(model, cache_tokens=200 * BLOCK).generate([prompt], params)
    return completion


@pytest.mark.parametrize("length", [1, 127, 128, 129, 1000, 2500])
def test_a_reply_is_the_models_own(length: int, model: Model) -> None:
    prompt = words(length, length)
    completion = alone(model, prompt, GREEDY)
    assert completion.ids == list(model.generate(prompt, max_new_tokens=12))
    assert completion.text == model.tokenizer.decode(completion.ids)
    assert (completion.finish_reason, completion.usage.prompt_tokens) == ("length", length)
    assert (completion.usage.completion_tokens, completion.usage.cached_tokens) == (12, 0)


@pytest.mark.parametrize(("num_pages", "step_tokens"), [(12, 140), (12, 500), (24, 300), (60, 140)])
def test_random_walks_change_no_token(num_pages: int, step_tokens: int, model: Model) -> None:
    """Arrivals in any order, chunks, shared prefixes, too few pages, aborts, greedy beside sampled replies."""
    generator = random.Random(num_pages + step_tokens)
    served = engine(model, cache_tokens=num_pages * BLOCK, step_tokens=step_tokens)
    prefixes = [words(90 + i, generator.randrange(1, 600)) for i in range(3)]
    asked: dict[int, tuple[list[int], SamplingParams]] = {}
    done: dict[int, Completion] = {}
    while len(asked) < 28 or served.has_work:
        if len(asked) < 28 and generator.random() < 0.4:
            prompt = generator.choice(prefixes) + words(generator.randrange(1000), generator.randrange(1, 400))
            params = replace(generator.choice((GREEDY, SAMPLED)), seed=generator.randrange(100))
            asked[served.add(prompt, replace(params, max_tokens=generator.randrange(1, 80)))] = prompt, params
        if generator.random() < 0.03 and asked:
            number = generator.choice(list(asked))
            if (last := served.abort(number)) is not None:
                assert last.finish_reason == "abort"
                asked[number] = [], GREEDY
        for number, delta in served.step().items():
            if delta.completion is not None:
                done[number] = delta.completion
    assert served.scheduler.preemptions > 0 or num_pages > 12
    assert served.pages.num_available == served.pages.num_pages
    reused = 0
    for number, completion in done.items():
        prompt, params = asked[number]
        reused += completion.usage.cached_tokens
        same = replace(params, max_tokens=completion.usage.completion_tokens)
        if params.plain:
            assert completion.ids == list(model.generate(prompt, max_new_tokens=same.max_tokens))
        else:
            assert completion.ids == alone(model, prompt, same).ids
    assert len(done) + sum(not prompt for prompt, _ in asked.values()) == 28 and reused > 500


def test_m3_tiny_serves_many_as_it_serves_one(tiny: Model) -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    ids = tiny.tokenizer.encode(text)
    prompts = [ids[: 200 + 157 * i] for i in range(12)]
    completions = engine(tiny, cache_tokens=200 * BLOCK, max_requests=12).generate(prompts, GREEDY)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.ids == list(tiny.generate(prompt, max_new_tokens=12))


def test_the_same_prompt_again_is_read_from_the_cache(model: Model) -> None:
    served, prompt = engine(model), words(3, 1000)
    first, second = (served.generate([prompt], GREEDY)[0] for _ in range(2))
    assert (first.usage.cached_tokens, second.usage.cached_tokens) == (0, 7 * BLOCK)
    assert first.ids == second.ids
    assert engine(model, prefix_cache=False).generate([prompt, prompt], GREEDY)[1].usage.cached_tokens == 0


def test_a_conversation_goes_on_where_it_was(model: Model) -> None:
    served, prompt = engine(model), words(4, 500)
    before = 0
    for _ in range(4):
        completion = served.generate([prompt], GREEDY)[0]
        assert completion.ids == alone(model, prompt, GREEDY).ids
        assert completion.usage.cached_tokens == before // BLOCK * BLOCK
        before = len(prompt) + 11
        prompt = prompt + completion.ids + words(len(prompt), 30)


def test_streams_add_up_and_may_take_turns(model: Model) -> None:
    served = engine(model)
    prompts = [words(5, 300), words(6, 10)]
    streams = [served.stream(prompt, GREEDY) for prompt in prompts]
    parts: list[list[int]] = [[], []]
    lasts: list[Completion | None] = [None, None]
    running = {0, 1}
    while running:
        for i in list(running):
            delta = next(streams[i], None)
            if delta is None:
                running.remove(i)
            else:
                parts[i] += delta.ids
                lasts[i] = delta.completion
    for prompt, ids, last in zip(prompts, parts, lasts, strict=True):
        assert last is not None and last.ids == ids == list(model.generate(prompt, max_new_tokens=12))


def test_who_stops_listening_ends_the_reply(model: Model) -> None:
    served = engine(model)
    stream = served.stream(words(7, 300), GREEDY)
    next(stream)
    assert served.has_work
    stream.close()  # type: ignore[attr-defined]
    assert not served.has_work and served.pages.num_held == 0


def test_stop_tokens_and_strings_end_a_reply(model: Model) -> None:
    prompt = words(8, 200)
    plain = alone(model, prompt, replace(GREEDY, max_tokens=40))
    at = next(i for i in range(5, 40) if plain.ids[i] not in plain.ids[:i])
    stopped = alone(model, prompt, replace(GREEDY, max_tokens=40, stop_ids=[plain.ids[at]]))
    assert (stopped.ids, stopped.finish_reason) == (plain.ids[:at], "stop")
    assert stopped.usage.completion_tokens == at + 1
    later = alone(model, prompt, replace(GREEDY, max_tokens=40, min_tokens=at + 1, stop_ids=[plain.ids[at]]))
    assert later.usage.completion_tokens > at + 1 and plain.ids[at] not in later.ids[: at + 1]
    middle = plain.text[10:13]
    cut = alone(model, prompt, replace(GREEDY, max_tokens=40, stop=middle))
    assert (cut.text, cut.finish_reason) == (plain.text[: plain.text.index(middle)], "stop")


def test_log_probabilities_are_the_models(model: Model) -> None:
    prompt = words(9, 60)
    completion = alone(model, prompt, replace(SAMPLED, max_tokens=5, logprobs=3))
    assert completion.logprobs is not None and len(completion.logprobs) == 5
    logprob_TV = model.logits(prompt + completion.ids).log_softmax(-1)[len(prompt) - 1 :]
    for i, place in enumerate(completion.logprobs):
        assert place.id == completion.ids[i]
        assert place.logprob == pytest.approx(float(logprob_TV[i, place.id]), abs=1e-4)
        best = logprob_TV[i].topk(3)
        assert [token for token, _ in place.top] == best.indices.tolist()
        assert torch.allclose(torch.tensor([value for _, value in place.top]), best.values, atol=1e-4)
    assert alone(model, prompt, GREEDY).logprobs is None


def test_seeds_and_penalties_matter(model: Model) -> None:
    prompt = words(10, 50)
    same = [alone(model, prompt, SAMPLED).ids for _ in range(2)]
    assert same[0] == same[1] != alone(model, prompt, replace(SAMPLED, seed=8)).ids
    unseeded = [alone(model, prompt, replace(SAMPLED, seed=None)).ids for _ in range(2)]
    assert unseeded[0] != unseeded[1]
    penalised = alone(model, prompt, replace(GREEDY, max_tokens=30, presence_penalty=2.0, frequency_penalty=2.0)).ids
    assert len(set(penalised)) > len(set(alone(model, prompt, replace(GREEDY, max_tokens=30)).ids))


def test_timings_and_deadlines_follow_the_clock(model: Model) -> None:
    now = [100.0]

    def tick() -> float:
        now[0] += 1.0
        return now[0]

    served = Engine(model, EngineConfig(cache_tokens=4000, step_tokens=300, max_requests=2), clock=tick)
    completion = served.generate([words(11, 500)], replace(GREEDY, max_tokens=3))[0]
    timings = completion.timings
    assert timings.queue > 0 and timings.prefill > 0 and len(timings.between) == 2
    assert timings.first_token + sum(timings.between) <= timings.total
    late = served.generate([words(12, 500)], replace(GREEDY, max_tokens=400, timeout=30.0))[0]
    assert late.finish_reason == "timeout" and 0 < len(late.ids) < 20
    assert not served.has_work


def test_what_can_never_run_is_refused_at_once(model: Model) -> None:
    served = engine(model, cache_tokens=1000, max_waiting=2)
    with pytest.raises(
        PromptError, match="900 tokens and 200 to generate need room for 1099, but the cache holds 1024"
    ):
        served.add(words(13, 900), SamplingParams(max_tokens=200))
    with pytest.raises(PromptError, match="the prompt is empty"):
        served.add([])
    with pytest.raises(PromptError, match="stop_ids holds 999, outside the vocabulary of 320"):
        served.add([1], SamplingParams(stop_ids=[999]))
    with pytest.raises(PromptError, match="2 prompts need as many params, not 1"):
        served.generate([[1], [2]], [GREEDY])
    for _ in range(2):
        served.add([1, 2, 3])
    with pytest.raises(BusyError, match="2 requests are waiting already"):
        served.add([1, 2, 3])


def test_pools_that_do_not_fit_are_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openm3.engine.engine.free_bytes", lambda: 1 << 20)
    with pytest.raises(ConfigError, match=r"a cache of 1,000,064 tokens needs \d+\.\d GiB, but 0\.0 GiB is free"):
        engine(model, cache_tokens=1_000_000)
    with pytest.raises(ConfigError, match="a page of 128 tokens takes"):
        engine(model, cache_tokens=None, cache_bytes=100)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_tokens", 0, "max_tokens must be at least 1, not 0"),
        ("min_tokens", 200, "min_tokens must be between 0 and max_tokens 128, not 200"),
        ("temperature", -1, "temperature must be at least 0"),
        ("temperature", float("nan"), "temperature must be at least 0"),
        ("top_p", 1.5, "top_p must be between 0 and 1"),
        ("stop", ("",), "stop must be strings that are not empty"),
        ("logprobs", 21, "logprobs must be between 0 and 20"),
        ("seed", 2**63, "seed must be a whole number of 64 bits"),
        ("timeout", 0.0, "timeout must be more than 0 seconds"),
        ("max_tokens", 2.5, "max_tokens must be a whole number, not 2.5"),
        ("max_tokens", "7", "max_tokens must be a whole number, not '7'"),
        ("top_k", 1.5, "top_k must be a whole number"),
        ("min_tokens", True, "min_tokens must be a whole number, not True"),
        ("temperature", None, "temperature must be a number, not None"),
        ("temperature", "hot", "temperature must be a number"),
        ("logprobs", 1.0, "logprobs must be a whole number"),
        ("priority", 0.5, "priority must be a whole number"),
        ("timeout", "soon", "timeout must be a number"),
        ("stop", None, "stop must be strings, not None"),
        ("stop", [3], r"stop must be strings, not \[3\]"),
        ("stop_ids", ["a"], "stop_ids must be token ids"),
    ],
)
def test_impossible_parameters_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step_tokens": 100}, "step_tokens must be at least 192, a token a request and a block, not 100"),
        ({"cache_tokens": 1, "cache_bytes": 1}, "give cache_tokens or cache_bytes, not both"),
        ({"memory_share": 0.0}, "memory_share must be more than 0"),
        ({"memory_share": "all"}, "memory_share must be more than 0"),
        ({"cache_tokens": 0}, "cache_tokens must be a whole number of at least 1, not 0"),
        ({"cache_tokens": 1.5}, "cache_tokens must be a whole number of at least 1, not 1.5"),
        ({"draft_tokens": -1}, "draft_tokens must be a whole number of at least 0, not -1"),
        ({"max_requests": 0}, "max_requests must be a positive whole number"),
        ({"cache_dir": "x", "prefix_cache": False}, "cache_dir keeps what prefix_cache finds"),
    ],
)
def test_impossible_configs_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**values)  # type: ignore[arg-type]


def test_strings_are_prompts_too(tiny: Model) -> None:
    served = engine(tiny)
    text, ids = served.generate(["def main():", tiny.tokenizer.encode("def main():")], GREEDY)
    assert text.ids == ids.ids


def test_a_folder_keeps_what_was_read(model: Model, tmp_path: Path) -> None:
    prompt = words(20, 1000)
    with engine(model, cache_dir=tmp_path) as first:
        cold = first.generate([prompt], GREEDY)[0]
    with engine(model, cache_dir=tmp_path) as second:
        warm = second.generate([prompt + words(21, 40)], GREEDY)[0]
        again = second.generate([prompt], GREEDY)[0]
    assert (cold.usage.cached_tokens, warm.usage.cached_tokens, again.usage.cached_tokens) == (0, 896, 999)
    assert again.ids == cold.ids
    assert warm.ids == alone(model, prompt + words(21, 40), GREEDY).ids
    assert second.archive is not None
    assert (second.archive.store.restored, second.archive.store.damaged) == (7, 0)


def test_damaged_pages_are_computed_again(model: Model, tmp_path: Path) -> None:
    prompt = words(22, 1000)
    with engine(model, cache_dir=tmp_path) as first:
        cold = first.generate([prompt], GREEDY)[0]
    for i, path in enumerate(sorted(tmp_path.rglob("*.page"))):
        if i % 3 == 1:
            path.write_bytes(path.read_bytes()[:-7] + b"garbage")
    cached = []
    # Two are damaged; the first one met is mended, and the next one when it is met.
    for _ in range(3):
        with engine(model, cache_dir=tmp_path) as later:
            warm = later.generate([prompt], GREEDY)[0]
        assert warm.ids == cold.ids
        cached.append(warm.usage.cached_tokens)
    assert cached[0] < 896 and cached[2] == 896


def test_other_weights_do_not_find_the_pages(model: Model, tmp_path: Path) -> None:
    prompt = words(23, 500)
    with engine(model, cache_dir=tmp_path) as first:
        first.generate([prompt], GREEDY)
    other = load(GOLDEN / "model")
    other.network.layers[0].attn.k_norm.weight.add_(0.1)  # type: ignore[union-attr, operator]
    with engine(other, cache_dir=tmp_path) as second:
        completion = second.generate([prompt], GREEDY)[0]
    assert completion.usage.cached_tokens == 0
    assert completion.ids == list(other.generate(prompt, max_new_tokens=12))


@pytest.mark.parametrize("params", [GREEDY, replace(SAMPLED, logprobs=2)], ids=["greedy", "sampled"])
def test_logits_that_are_no_numbers_end_one_reply(
    params: SamplingParams, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = engine(model)
    head = model.network.head.forward
    broken = served.add(words(30, 50), params)

    def spoiled(hidden_SD: torch.Tensor) -> torch.Tensor:
        logit_SV: torch.Tensor = head(hidden_SD)
        logit_SV[0, 7] = torch.nan
        return logit_SV

    served.step()
    whole = served.add(words(31, 50), params)
    monkeypatch.setattr(model.network.head, "forward", spoiled)
    deltas = served.step()
    assert deltas[broken].finish_reason == "error"
    last = deltas[broken].completion
    assert last is not None and len(last.ids) == 1
    monkeypatch.undo()
    while served.has_work:
        deltas = served.step()
    reply = deltas[whole].completion
    assert reply is not None and reply.ids == alone(model, words(31, 50), params).ids


def test_an_interrupted_step_is_made_up_for(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was to begin with a copy of a page."""
    served, prompt = engine(model), words(40, 700)
    served.generate([prompt], GREEDY)
    changed = prompt[:600] + words(41, 50)
    number = served.add(changed, GREEDY)
    run = served.runner.run

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(served.runner, "run", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            served.step()
        served.scheduler.check()
    monkeypatch.setattr(served.runner, "run", run)
    completion = None
    while completion is None:
        completion = served.step()[number].completion if served.has_work else None
    assert completion.ids == list(model.generate(changed, max_new_tokens=12))
    assert served.pages.num_held == 0


def test_an_interrupted_restoration_is_made_up_for(model: Model, tmp_path: Path) -> None:
    """Ctrl-C while one request is restored must not let another believe that its page was copied."""
    with engine(model, cache_dir=tmp_path) as first:
        first.generate([words(50, 500)], GREEDY)
    served = engine(model, cache_dir=tmp_path)
    served.generate([words(51, 300)], GREEDY)
    half = words(51, 300)[:250] + words(52, 60)
    copied, restored = served.add(half, GREEDY), served.add(words(50, 500), GREEDY)
    restore = served.scheduler.restore

    def interrupted(key: bytes, page: int) -> bool:
        raise KeyboardInterrupt

    served.scheduler.restore = interrupted
    with pytest.raises(KeyboardInterrupt):
        served.step()
    served.scheduler.check()
    served.scheduler.restore = restore
    done: dict[int, Completion] = {}
    while served.has_work:
        done |= {number: delta.completion for number, delta in served.step().items() if delta.completion is not None}
    assert done[copied].ids == list(model.generate(half, max_new_tokens=12))
    assert done[restored].ids == list(model.generate(words(50, 500), max_new_tokens=12))
    served.close()


def test_an_abort_is_heard(model: Model) -> None:
    served = engine(model)
    stream = served.stream(words(42, 100), GREEDY)
    next(stream)
    (number,) = served._requests
    served.abort(number)
    assert [delta.finish_reason for delta in stream] == ["abort"]
