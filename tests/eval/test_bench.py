"""Benchmarks count what they time, and print one JSON line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openm3 import cli
from openm3.eval import bench
from openm3.eval.bench import Peaks
from openm3.model import cost
from openm3.model.model import Model


def test_prefill_counts_every_token_once(model: Model) -> None:
    def others(context: int) -> int:
        parts = cost.flops_per_token(model.config, context)
        return parts["total"] - parts["head"]

    exact = sum(others(n) for n in range(1, 1001)) + cost.flops_per_token(model.config, 1)["head"]
    assert exact <= bench._prefill_flops(model.config, 1000) < 1.1 * exact
    assert bench._prefill_flops(model.config, 1) == cost.flops_per_token(model.config, 1)["total"]


def test_shares_follow_from_the_peaks(model: Model) -> None:
    timings = [
        *bench.model_timings(model, 400, Peaks(1e-3, 1e-3)),
        *bench.operator_timings(model, 400, Peaks(1.0, 1.0)),
    ]
    assert [t.what for t in timings] == ["prefill", "decode", "select_blocks", "sparse_attention"]
    prefill, decode, select, attend = timings
    flops = bench._prefill_flops(model.config, 400)
    assert prefill.share == pytest.approx(flops * prefill.tokens_per_second / 400 / 1e6)
    size = cost.bytes_per_token(model.config, 400, weight_bytes=4, cache_bytes=4)["total"]
    assert decode.share == pytest.approx(size * decode.tokens_per_second / 1e6)
    assert select.share == pytest.approx(2 * 2 * 16 * 400 * select.tokens_per_second / 1e9)
    assert attend.share == pytest.approx(4 * 4 * 16 * 256 * attend.tokens_per_second / 1e9)


def test_nothing_is_scanned_where_every_block_is_taken(model: Model) -> None:
    select, attend = bench.operator_timings(model, 256, Peaks(1.0, 1.0))
    assert select.share == 0 < attend.share


@pytest.mark.parametrize("subject", ["ops", "model"])
def test_command(
    folder: Path, subject: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["bench", subject, "--model", str(folder), "--lengths", "300", "512"]
    assert cli.main([*line, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["gflops"] > 0.1 and values["gbytes"] > 0.1
    assert [t["context"] for t in values["timings"]] == [300, 300, 512, 512]
    monkeypatch.setattr(bench, "measure_peaks", lambda: Peaks(100.0, 10.0))
    assert cli.main(line) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Measured peaks: 100 GFLOP/s in float32 products, 10.0 GB/s read")
    assert len(lines) == 8
    assert cli.main([*line, "1048576"]) == 2
    assert "exceed the model's limit of 1048576" in capsys.readouterr().err
