"""Traces: which blocks each token of a reply was drawn from."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from openm3.config import BLOCK, EngineConfig
from openm3.engine.engine import Engine
from openm3.engine.request import SamplingParams
from openm3.errors import PromptError
from openm3.model.model import Model, load

GOLDEN = Path(__file__).parents[1] / "golden/m3-random-s0"
TRACED = SamplingParams(max_tokens=6, ignore_eos=True, trace=True)


@pytest.fixture(scope="module")
def model() -> Model:
    return load(GOLDEN / "model")


def words(seed: int, count: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(300) for _ in range(count)]


def engine(model: Model, **config: object) -> Engine:
    values: dict[str, object] = {"cache_tokens": 60 * BLOCK, "step_tokens": 300, "max_requests": 8, "check": True}
    return Engine(model, EngineConfig(**{**values, **config}))  # type: ignore[arg-type]


def test_blocks_are_those_of_the_models_own_trace(model: Model) -> None:
    """Beside a request that is not traced, with and without drafts."""
    prompt = words(1, 40) * 50
    for draft_tokens in (0, 8):
        served = engine(model, draft_tokens=draft_tokens)
        other = served.add(words(2, 700), replace(TRACED, trace=False))
        number = served.add(prompt, TRACED)
        ids: list[int] = []
        blocks: list[np.ndarray] = []
        while served.has_work:
            for n, delta in served.step().items():
                if n == other:
                    assert delta.blocks is None
                elif n == number:
                    assert delta.blocks is not None and len(delta.blocks) == len(delta.ids)
                    ids += delta.ids
                    blocks += delta.blocks
        assert ids == list(model.generate(prompt, max_new_tokens=6))
        trace = model.trace(prompt + ids)
        config = model.config
        for i, block_LGK in enumerate(blocks):
            assert block_LGK.shape == (config.num_layers, config.num_groups, config.num_selected)
            assert block_LGK.dtype == np.int32
            for layer, kind in enumerate(config.layer_types):
                if kind == "sparse":
                    assert (block_LGK[layer] == trace.blocks[layer][len(prompt) - 1 + i]).all()
                else:
                    assert (block_LGK[layer] == -1).all()


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
    served.generate([words(3, 20)], replace(TRACED, trace=False))
    assert set(seen) == {None}
    steps = len(seen)
    served.generate([words(3, 20)], TRACED)
    assert sum(observer is not None for observer in seen[steps:]) == 6


def test_only_true_or_false(model: Model) -> None:
    with pytest.raises(PromptError, match="trace must be true or false, not 1"):
        SamplingParams(trace=1)  # type: ignore[arg-type]
