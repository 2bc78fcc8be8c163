"""Covered mass against a plain computation, and the order that must hold between the three sets of blocks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openm3 import cli
from openm3.errors import ConfigError, DocumentError
from openm3.eval import coverage
from openm3.eval.coverage import covered, measure
from openm3.eval.needles import limit_to_window
from openm3.model.attention import Heads
from openm3.model.batch import Batch
from openm3.model.model import Model
from openm3.model.network import Network
from openm3.train.corpus import Source


@pytest.fixture(autouse=True)
def _few_sources(monkeypatch: pytest.MonkeyPatch, sources: list[Source]) -> None:
    monkeypatch.setattr("openm3.eval.haystack.standard_library", lambda held_out: sources)
    monkeypatch.setattr(coverage, "RANDOM_TOKENS", 40)


def test_covered_is_what_a_dense_softmax_gives(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "_SCORES_AT_ONCE", 10_000)
    seen: list[Heads] = []

    def observer(layer: int, heads: Heads, batch: Batch) -> None:
        position_T = torch.tensor([700, 601, 899, 640])
        share_TG3 = covered(heads, batch, position_T)
        assert heads.block_TGK is not None
        for t, position in enumerate(position_T.tolist()):
            for g in range(2):
                key_SH = heads.pool.k_MGBH[:, g].flatten(0, 1)[: position + 1].double()
                query_hH = heads.q_TNH[position - 600, 2 * g : 2 * g + 2].double()
                weight_S = (query_hH @ key_SH.T * heads.scale).softmax(-1).mean(0)
                mass = [block.sum().item() for block in weight_S.split(128)]
                own = position // 128
                chosen = sum(mass[b] for b in heads.block_TGK[position - 600, g].tolist())
                best = mass[own] + max(mass[:own])
                expected = [chosen, best, mass[own] + mass[own - 1]]
                assert share_TG3[t, g].tolist() == pytest.approx(expected, abs=1e-5)
        seen.append(heads)

    session = model.session(900)
    ids = torch.randint(model.config.vocab_size, (900,)).tolist()
    session.read(ids[:600])
    session.read(ids[600:], observer=observer)
    assert len(seen) == 2


def test_measure_counts_and_orders(model: Model) -> None:
    progress: list[tuple[int, int]] = []
    rows = measure(model, 1200, 2, 0, on_progress=lambda done, total: progress.append((done, total)))
    assert [(row.kind, row.layer) for row in rows] == [("answers", 0), ("answers", 1), ("random", 0), ("random", 1)]
    assert rows[0].tokens == rows[1].tokens > 100 and rows[2].tokens == 80
    for row in rows:
        assert 0 < row.selected <= row.best < 1 and 0 < row.newest <= row.best
    assert progress[-1][0] == progress[-1][1] > 2400
    assert [done for done, _ in progress] == sorted({done for done, _ in progress})
    assert rows == measure(model, 1200, 2, 0)


def test_window_selects_the_newest(model: Model) -> None:
    window = Model(limit_to_window(model.network), model.tokenizer, "window")
    for row in measure(window, 1200, 1, 0):
        assert row.selected == pytest.approx(row.newest, abs=1e-6)


def test_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["eval", "coverage", "--model", str(folder), "--length", "1024", "--count", "1"]
    assert cli.main([*line, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["length"], values["texts"], len(values["layers"])) == (1024, 1, 4)
    assert values["layers"][2].keys() == {"layer", "kind", "tokens", "selected", "best", "newest"}
    assert cli.main(line) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Share of dense attention mass in 2 blocks of 128 tokens, 1K tokens of context:"
    shown = [row["selected"] for row in values["layers"][2:]]
    assert lines[-3].split("|")[2:4] == ["     0 ", f" {shown[0]:8.1%} "]
    assert lines[-1].split("|")[1:4] == ["    40 at random ", "   all ", f" {sum(shown) / 2:8.1%} "]


def test_refusals(model: Model) -> None:
    with pytest.raises(DocumentError, match=r"up to 256 tokens every block is selected: .* not 300"):
        measure(model, 300, 1, 0)
    dense = Model(Network(replace(model.config, layer_types=("full", "full"))), model.tokenizer, "dense")
    with pytest.raises(ConfigError, match="the model has no sparse layer"):
        measure(dense, 1200, 1, 0)
