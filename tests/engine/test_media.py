"""Pictures and videos in the engine: the oracle's tokens, encoded once, a part at a time, for nobody who has left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from openm3.config import BLOCK, EngineConfig
from openm3.engine.engine import Engine
from openm3.engine.request import SamplingParams, placed
from openm3.errors import PromptError
from openm3.eval.agree_media import recorded_media
from openm3.model.model import Model, load
from openm3.tokens.media import Media, Run

GOLDEN = Path(__file__).parents[1] / "golden/m3-random-s0"
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> Model:
    return load(GOLDEN / "model")


def engine(model: Model, **config: Any) -> Engine:
    return Engine(model, EngineConfig(**{"cache_tokens": 60 * BLOCK, "step_tokens": 300, "check": True, **config}))


def picture(seed: int, height: int = 4, width: int = 6) -> Media:
    pixels = np.random.default_rng(seed).integers(0, 256, (height * width, 1176), np.uint8)
    return Media.of("image", pixels, [(1, height, width)], (14 * height, 14 * width))


def video(seed: int) -> Media:
    pixels = np.random.default_rng(seed).integers(0, 256, (6 * 16, 1176), np.uint8)
    return Media.of("video", pixels, [(4, 4, 4), (2, 4, 4)], (56, 56), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0])


def prompt(model: Model, media: Sequence[Media], before: str = "", after: str = "What is it?") -> list[int]:
    parts: list[dict[str, str]] = [{"type": "text", "text": before}] if before else []
    parts += [{"type": item.kind} for item in media]
    return model.tokenizer.chat([{"role": "user", "content": [*parts, {"type": "text", "text": after}]}], media=media)


def alone(model: Model, ids: list[int], media: Sequence[Media]) -> list[int]:
    return list(model.generate(ids, media=media, max_new_tokens=12))


def replies(served: Engine, asked: Sequence[tuple[list[int], Sequence[Media]]]) -> dict[int, list[int]]:
    """The replies to some prompts at once, by their numbers."""
    numbers = [served.add(ids, GREEDY, media=media) for ids, media in asked]
    done = {}
    while served.has_work:
        for number, delta in served.step().items():
            if delta.completion is not None:
                done[number] = delta.completion.ids
    assert served.pages.num_held == 0
    return {number: done[number] for number in numbers}


@pytest.mark.parametrize("name", ["image0", "image_two", "video"])
def test_recorded_cases_are_answered_as_recorded(model: Model, name: str) -> None:
    case = load_file(GOLDEN / f"golden/{name}.safetensors")
    ids = case["input_ids"][0].tolist()
    served = engine(model)
    (last,) = [
        delta.completion
        for delta in served.stream(ids, SamplingParams(max_tokens=24), media=recorded_media(case, name))
        if delta.completion
    ]
    recorded = json.loads((GOLDEN / "golden/manifest.json").read_text())["cases"][name]
    assert last.ids == case["gen_ids"][0].tolist()[: len(last.ids)] and len(last.ids) == 24
    assert served.stats()["images_encoded"] == len(recorded["grid_thw"])


@pytest.mark.parametrize("step_tokens", [200, 2048])
def test_many_at_once_are_each_as_alone(model: Model, step_tokens: int) -> None:
    shown: list[list[Media]] = [[picture(1)], [], [picture(2, 8, 20), picture(1)], [video(3)], [picture(4, 2, 2)]]
    asked = [(prompt(model, media, before=f"Look {i} " * 40), media) for i, media in enumerate(shown)]
    done = replies(engine(model, step_tokens=step_tokens), asked)
    assert list(done.values()) == [alone(model, *one) for one in asked]
    assert len({tuple(ids) for ids in done.values()}) == 5


def test_what_was_seen_is_not_encoded_again(model: Model) -> None:
    served = engine(model, prefix_cache=False)
    one, other = prompt(model, [picture(1)]), prompt(model, [picture(2), picture(1)], before="Another chat. ")
    replies(served, [(one, [picture(1)])])
    assert served.stats()["images_encoded"] == 1
    replies(served, [(other, [picture(2), picture(1)]), (one, [picture(1)])])
    assert served.stats()["images_encoded"] == 2


def test_prefixes_are_shared_by_what_is_seen(model: Model) -> None:
    served = engine(model)
    media = [picture(1, 20, 20)]
    ids = prompt(model, media, before="x" * 200)
    cached = []
    for shown in (media, [picture(2, 20, 20)], media):
        number = served.add(ids, GREEDY, media=shown)
        while served.has_work:
            for _, delta in served.step().items():
                if delta.completion is not None:
                    cached.append(delta.completion.usage.cached_tokens)
                    assert delta.completion.ids == alone(model, ids, shown)
        assert number
    assert cached[0] == 0 and 128 <= cached[1] <= 220 and cached[2] >= 256
    assert served.stats()["images_encoded"] == 2


def test_a_prompt_may_end_with_a_picture_and_be_cached_whole(model: Model) -> None:
    media = [picture(1)]
    ids = prompt(model, media)
    ids = ids[: max(i for i, token in enumerate(ids) if token == model.config.image_id) + 1]
    served = engine(model)
    for _ in range(2):
        assert list(replies(served, [(ids, media)]).values()) == [alone(model, ids, media)]


def test_encoding_goes_on_beside_replies(model: Model) -> None:
    """A long video does not keep a reply from its tokens: one with every step, while a part of it is encoded."""
    served = engine(model, step_tokens=200)
    writer = served.add([5, 6, 7], SamplingParams(max_tokens=200, ignore_eos=True))
    served.step()
    grid = (4, 20, 20)
    pixels = np.random.default_rng(0).integers(0, 256, (3 * 1600, 1176), np.uint8)
    media = [Media.of("video", pixels, [grid] * 3, (280, 280))]
    ids = prompt(model, media)
    viewer = served.add(ids, GREEDY, media=media)
    steps, seen = 0, 0.0
    while seen < 3:
        deltas = served.step()
        assert len(deltas[writer].ids) >= 1 and viewer not in deltas
        steps, seen = steps + 1, served.stats()["images_encoded"]
    # 4,800 patches, and what they attend to, an eighth of 200 patches a step or a piece of 512 of one of two layers.
    assert 15 <= steps <= 200
    served.abort(writer)
    last = [delta.completion.ids for _ in range(40) for delta in served.step().values() if delta.completion]
    assert last == [alone(model, ids, media)]


def test_who_leaves_is_not_encoded_for(model: Model) -> None:
    served = engine(model)
    media = [picture(i, 40, 40) for i in range(6)]
    number = served.add(prompt(model, media), GREEDY, media=media)
    served.step()
    served.abort(number)
    before = served.stats()["images_encoded"]
    replies(served, [([5, 6, 7], [])])
    assert served.stats()["images_encoded"] == before < 6


def test_a_full_cache_forgets_what_was_seen_longest_ago(model: Model) -> None:
    served = engine(model, image_cache_bytes=2 * 6 * 128 * 4, prefix_cache=False)
    for seed, encoded in ((1, 1), (2, 2), (1, 2), (3, 3), (2, 4), (3, 4)):
        replies(served, [(prompt(model, [picture(seed)]), [picture(seed)])])
        assert served.stats()["images_encoded"] == encoded, seed


def test_a_cache_of_nothing_still_serves(model: Model) -> None:
    media = [picture(i) for i in range(4)] + [video(9)]
    ids = prompt(model, media)
    done = replies(engine(model, image_cache_bytes=0, step_tokens=200), [(ids, media), (ids, media)])
    assert list(done.values()) == [alone(model, ids, media)] * 2


def test_what_does_not_fit_is_refused(model: Model) -> None:
    served, media = engine(model), [picture(1)]
    ids = prompt(model, media)
    with pytest.raises(PromptError, match="the prompt has 6 media placeholders, the media need 12"):
        served.add(ids, media=[*media, *media])
    with pytest.raises(PromptError, match="is of kind video, but the prompt has kind image"):
        served.add(ids, media=[Media.of("video", picture(1).patch_IC, [(1, 4, 6)], (56, 84))])
    assert not served.has_work
    blind = Model(model.network, model.tokenizer, "blind")
    blind.config = replace(model.config, vision=None)
    with pytest.raises(PromptError, match="reads text only"):
        engine(blind).add(ids, media=media)


def test_runs_are_cut_at_rows() -> None:
    media = [video(1)]
    parts = placed(media, [Run(0, 10, 0, 6), Run(0, 20, 6, 12), Run(0, 40, 18, 6)])
    assert [(p.row, p.first, p.offset, p.count) for p in parts] == [
        (0, 10, 0, 6),
        (0, 20, 6, 10),
        (1, 30, 0, 2),
        (1, 40, 2, 6),
    ]
    assert torch.tensor([p.count for p in parts]).sum() == media[0].num_tokens
