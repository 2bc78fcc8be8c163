"""What a look at some steps says of sparsity."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from openm3.config import EngineConfig
from openm3.engine.engine import Engine
from openm3.engine.probe import Probe, common
from openm3.engine.request import SamplingParams
from openm3.model.model import load
from openm3.ops.dispatch import Implementation, Operator, always, timed


def test_common_blocks_are_counted() -> None:
    a_TGK = torch.tensor([[[1, 2, 3], [4, -1, -1]]])
    b_TGK = torch.tensor([[[2, 3, 5], [4, 6, -1]]])
    assert common(a_TGK, b_TGK) == (3, 5)
    assert common(b_TGK, a_TGK) == (3, 4)


def test_operators_are_timed_without_those_that_they_call() -> None:
    inner = Operator("inner", (Implementation("reference", always, lambda: time.sleep(0.02)),))

    def twice() -> None:
        time.sleep(0.01)
        inner()
        inner()

    outer = Operator("outer", (Implementation("reference", always, twice),))
    outer()
    with timed() as seconds:
        outer()
    assert set(seconds) == {"inner", "outer"}
    assert seconds["inner"] >= 0.04 and 0.01 <= seconds["outer"] < seconds["inner"]


def test_an_engine_reports_its_sparsity() -> None:
    model = load("m3-tiny")
    engine = Engine(model, EngineConfig(cache_tokens=20_000))
    engine._probe = Probe(every=3)
    ids = model.tokenizer.encode(Path(__file__).read_text(encoding="utf-8") * 5)[:6000]
    prompts = [ids, ids[:5000]]
    plain = Engine(model, EngineConfig(cache_tokens=20_000)).generate(prompts, SamplingParams(max_tokens=10))
    assert [reply.ids for reply in engine.generate(prompts, SamplingParams(max_tokens=10))] == [r.ids for r in plain]
    found = engine.stats()
    assert 8 < found["blocks_selected"] <= 16
    assert 0.3 < found["overlap_steps"] <= 1 and 0.3 < found["overlap_neighbours"] <= 1
    times = [found[f"time_{part}"] for part in ("index", "attention", "experts", "rest")]
    assert min(times) > 0 and sum(times) == pytest.approx(1)
    assert 0 <= found.get("blocks_rescored", 0) < 1
    assert found["requests_finished"] == 2 and found["tokens_cached"] >= 4000
