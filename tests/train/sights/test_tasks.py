"""Every kind is made, by weight, the same for the same seed."""

import random
from dataclasses import replace

import numpy as np
import pytest

from openm3.errors import ConfigError
from openm3.train.pictures import KINDS, Sight, SightMaker
from openm3.train.sights.sources import Sources


def equal(one: Sight, other: Sight) -> bool:
    texts = [(s.question, s.answer, s.spelled, s.kind, s.target, s.at, s.seconds) for s in (one, other)]
    return texts[0] == texts[1] and np.array_equal(one.frames, other.frames)


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_sights(drawing_sources: Sources, kind: str) -> None:
    one, same, other = (SightMaker(seed, False, drawing_sources) for seed in (7, random.Random(7), 8))
    sights = [[maker.make(kind) for _ in range(4)] for maker in (one, same, other)]
    assert all(equal(a, b) for a, b in zip(sights[0], sights[1], strict=True))
    assert kind == "caption" or not any(equal(a, b) for a, b in zip(sights[0], sights[2], strict=True))
    for sight in sights[0]:
        assert sight.kind == kind
        assert all(f.dtype == np.uint8 and f.shape[2:] == (3,) and min(f.shape[:2]) >= 43 for f in sight.frames)
        assert (sight.seconds is None) == (len(sight.frames) == 1)
        assert sight.spelled is None or sight.spelled in sight.answer


def test_kinds_by_weight(drawing_sources: Sources) -> None:
    maker = SightMaker(0, False, drawing_sources)
    kinds = [maker.make().kind for _ in range(300)]
    assert kinds.count("word") > kinds.count("chart") > 0
    patches = [sum(f.shape[0] * f.shape[1] for f in s.frames) / 196 for s in (maker.make("word") for _ in range(200))]
    assert 40 < np.mean(patches) < 130


def test_without_clip_art_no_captions_come_by_themselves(drawing_sources: Sources) -> None:
    maker = SightMaker(0, False, replace(drawing_sources, clip_art=[]))
    assert "caption" not in {maker.make().kind for _ in range(120)}


def test_unknown_kind(drawing_sources: Sources) -> None:
    with pytest.raises(ConfigError, match="no kind of sight 'smell': it is one of number, word"):
        SightMaker(0, False, drawing_sources).make("smell")
