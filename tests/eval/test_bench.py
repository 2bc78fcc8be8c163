"""Benchmarks time what they say they time, count its work, and end with one JSON line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openm3 import cli
from openm3.config import ModelConfig
from openm3.errors import ConfigError
from openm3.eval import bench, bench_headline, bench_model, bench_ops, bench_peaks, bench_selections
from openm3.eval.bench_ops import Case, behind
from openm3.eval.bench_peaks import Peaks, Work
from openm3.model import cost
from openm3.model.model import Model
from openm3.ops.cases import PackedCase, random_blocks

SMALL = PackedCase(name="small", num_tokens=(200, 1), lengths=(1000, 300), num_selected=3)
QUICK = [
    "select_1_behind_1m",
    "select_512_behind_128k",
    "prefill_2048_behind_64k",
    "prefill_2048_behind_64k_random",
    "decode_batch16",
]


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches are emptied by a smaller read than in earnest."""
    monkeypatch.setattr(bench_peaks, "READ_BYTES", 1 << 20)
    bench_peaks._wide.cache_clear()


@pytest.fixture
def small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"num_groups": 2, "heads_per_group": 2, "head_dim": 16, "index_dim": 16, "num_selected": 2}
    cases = tuple(
        replace(case, shape=replace(case.shape, num_tokens=(3,), lengths=(700,), **shape)) for case in bench_ops.CASES
    )
    monkeypatch.setattr(bench_ops, "CASES", cases)
    monkeypatch.setattr(bench, "BUDGET", 0.01)
    monkeypatch.setattr(bench, "QUICK_BUDGET", 0.01)


def test_the_main_cases_are_the_quick_ones() -> None:
    assert [case.name for case in bench_ops.choose(None, quick=True)] == QUICK
    assert set(bench_ops.choose(None, quick=False)) == set(bench_ops.CASES) > set(bench_ops.choose(None, quick=True))


def test_cases_by_name_and_pattern() -> None:
    assert [c.name for c in bench_ops.choose(["decode_*", "dense_512_behind_8k", "decode_batch16"], quick=True)] == [
        "decode_batch16",
        "decode_1_behind_1m",
        "dense_512_behind_8k",
    ]
    assert len(bench_ops.choose(["served_*"], quick=False)) == 31
    with pytest.raises(ConfigError, match=r"no case is named 'decode'; give one of select_1_behind_1m, .*decode_batch"):
        bench_ops.choose(["decode"], quick=False)


def test_names_are_unique_and_described() -> None:
    names = [case.name for case in (*bench_ops.CASES, *bench_ops.SERVED)]
    assert len(set(names)) == len(names)
    lines = bench_ops.describe().splitlines()
    assert [line.split()[0] for line in lines] == names
    assert lines[0].endswith("select_blocks, 1 token behind 1M")
    assert lines[6].endswith("sparse_attention, correlated selections, 16 requests of 1 token behind 64K")


def test_work_of_selection() -> None:
    work = bench_ops.select_work(behind("", 3, 100))
    assert work == Work(flops=2 * 4 * 128 * (101 + 102 + 103), nbytes=128 * 103, limit="gemm")
    assert bench_ops.select_work(behind("", 1, 100, requests=2)).limit == "read"


def test_work_of_attention() -> None:
    block_TGK = random_blocks(SMALL, torch.Generator().manual_seed(0))
    keys = pairs = 0
    for request, tokens in ((0, range(200)), (1, range(200, 201))):
        for group in range(2):
            union: set[int] = set()
            for t in tokens:
                position = 800 + t if request == 0 else 299
                chosen = [b for b in block_TGK[t, group].tolist() if b >= 0]
                seen = {s for b in chosen for s in range(b * 128, b * 128 + 128) if s <= position}
                pairs += len(seen)
                union |= seen
            keys += len(union)
    assert bench_ops.sparse_work(SMALL, block_TGK) == Work(4 * 2 * 16 * pairs, 2 * 16 * 2 * keys, "gemm")
    dense = bench_ops.dense_work(SMALL)
    assert dense.flops == 4 * 4 * 16 * (sum(range(801, 1001)) + 300)
    assert dense.nbytes == 2 * 2 * 16 * 2 * 1300


def test_correlated_selections_are_valid() -> None:
    block_TGK = bench_selections.correlated_blocks(SMALL, torch.Generator().manual_seed(1))
    assert block_TGK.shape == (201, 2, 3) and block_TGK.dtype == torch.int32
    for t, chosen in enumerate(block_TGK.tolist()):
        own = (800 + t if t < 200 else 299) // 128
        for row in chosen:
            assert own in row
            assert sorted(set(row)) == row and row[0] >= 0 and row[-1] <= own
    again = bench_selections.correlated_blocks(SMALL, torch.Generator().manual_seed(1))
    assert torch.equal(block_TGK, again)
    few = replace(SMALL, num_tokens=(2,), lengths=(129,))
    assert bench_selections.correlated_blocks(few, torch.Generator())[:, 0].tolist() == [[0, -1, -1], [0, 1, -1]]


def test_correlated_selections_share_as_m3_tiny_does() -> None:
    case = behind("", 1024, 65536 - 1024)
    drawn = bench_selections.sharing(bench_selections.correlated_blocks(case, torch.Generator().manual_seed(0)))
    assert drawn.next == pytest.approx(0.64, abs=0.03)
    assert drawn.union_64 == pytest.approx(6.4, abs=0.5)
    assert drawn.union_128 == pytest.approx(9.2, abs=0.7)
    random = bench_selections.sharing(random_blocks(case, torch.Generator().manual_seed(0)))
    assert random.next < 0.1 and random.union_64 > 25


def test_sharing_of_equal_and_of_disjoint_selections() -> None:
    equal = torch.tensor([0, 5, 9, -1]).expand(256, 2, 4)
    assert bench_selections.sharing(equal) == bench_selections.Sharing(1.0, 1.0, 1.0)
    disjoint = torch.arange(256 * 4).view(256, 1, 4)
    assert bench_selections.sharing(disjoint) == bench_selections.Sharing(0.0, 64.0, 128.0)
    with pytest.raises(ValueError, match="127 are too few"):
        bench_selections.sharing(disjoint[:127])


def test_turns_and_their_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    monkeypatch.setattr(bench_peaks.time, "perf_counter", lambda: clock[0])

    def call(name: str, seconds: float) -> None:
        order.append(name)
        clock[0] += seconds

    calls = {"a": lambda: call("a", 1.0), "b": lambda: call("b", 2.0), "slow": lambda: call("slow", 99.0)}
    assert bench_peaks.medians(calls, budget=10, least=2) == {"a": 1.0, "b": 2.0, "slow": 99.0}
    assert order == ["a", "b", "slow", *"ab" * 4]
    order.clear()
    assert bench_peaks.medians({"a": lambda: call("a", 0.0)}, budget=10, most=5) == {"a": 0.0}
    assert len(order) == 6


def test_peaks_are_of_this_machine() -> None:
    peaks = bench_peaks.measure_peaks()
    assert 0.1 < peaks.gflops < 1e6 and 0.1 < peaks.gbytes < 1e5
    assert Peaks(1.0, 5.0).better(Peaks(2.0, 4.0)) == Peaks(2.0, 5.0)


def test_shares_follow_from_the_limit() -> None:
    assert Work(6 * 10**9, 10**9, "gemm").share(2.0, Peaks(30.0, 1.0)) == pytest.approx(0.1)
    assert Work(6 * 10**9, 10**9, "read").share(2.0, Peaks(30.0, 1.0)) == pytest.approx(0.5)


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ops, "free_bytes", lambda: 1 << 30)
    with pytest.raises(ConfigError, match=r"decode_batch16 needs 2\.\d GiB of memory; 1\.0 GiB are free"):
        bench_ops.prepare(bench_ops.choose(["decode_batch16"], quick=False)[0], torch.Generator())


@pytest.mark.parametrize("operator", ["select", "sparse", "dense"])
def test_a_prepared_call_runs(operator: str) -> None:
    shape = replace(behind("", 2, 2500), num_groups=2, heads_per_group=2, head_dim=16, index_dim=16)
    call, _ = bench_ops.prepare(Case(operator, shape), torch.Generator().manual_seed(0))
    out = call()
    assert out.shape == ((2, 2, 16) if operator == "select" else (2, 4, 16))
    if operator == "select":
        assert (out[:, :, -1] == 19).all() and (out >= 0).all()
    else:
        assert out.dtype == torch.bfloat16 and out.isfinite().all()


@pytest.mark.usefixtures("small_cases")
def test_ops_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "ops", "--quick", "--json"]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(values["cases"]) == QUICK
    assert values["gemm_gflops"] > 0.1 and values["read_gbs"] > 0.1
    for case in values["cases"].values():
        assert case["ms"] > 0 and case["share"] > 0
        peak = values["gemm_gflops"] if case["of"] == "gemm" else values["read_gbs"]
        assert case["share"] == pytest.approx((case["gflops"] if case["of"] == "gemm" else case["gbs"]) / peak)
    assert cli.main(["bench", "ops", "--case", "prefill_2048_behind_64k", "--against", "reference"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Measured peaks: ") and len(lines) == 5
    assert "reference takes" in lines[2] and lines[4].startswith("| prefill_2048_behind_64k |")
    assert cli.main(["bench", "ops", "--against", "none"]) == 2
    assert "no implementation is named 'none'; give one of reference" in capsys.readouterr().err
    assert cli.main(["bench", "ops", "--list"]) == 0
    assert capsys.readouterr().out.startswith("select_1_behind_1m ")


def test_headline_at_a_small_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_headline.native, "missing", lambda: None)
    decode, prefill = bench_headline.measure(budget=0.0, context=4096, chunk=16)
    assert (decode.name, prefill.name) == ("headline_decode", "headline_prefill")
    assert decode.dense_work.flops == 4 * 48 * 128 * 4097
    assert decode.work.flops == 2 * 4 * 128 * 4097 + 4 * 64 * 128 * (15 * 128 + 1)
    assert min(decode.sparse, decode.dense, decode.plain, prefill.sparse, prefill.dense, prefill.plain) > 0
    text = bench.render_headlines([decode, prefill], Peaks(100.0, 10.0))
    assert "| headline_prefill |" in text and text.count("of GEMM") == text.count("of read") == 1
    monkeypatch.setattr(bench_headline.native, "missing", lambda: "not compiled")
    with pytest.raises(ConfigError, match="native operators, and they are missing: not compiled"):
        bench_headline.measure(budget=0.0)


def test_prefill_counts_every_token_once(model: Model) -> None:
    def others(context: int) -> int:
        parts = cost.flops_per_token(model.config, context)
        return parts["total"] - parts["head"]

    for start, count in ((0, 1000), (500, 512), (3, 1)):
        exact = sum(others(n) for n in range(start + 1, start + count + 1))
        exact += cost.flops_per_token(model.config, 1)["head"]
        assert exact <= bench_model.prefill_flops(model.config, start, count) < 1.1 * exact
    assert bench_model.prefill_flops(model.config, 0, 1) == cost.flops_per_token(model.config, 1)["total"]


@pytest.mark.parametrize("whole", [False, True])
def test_a_filled_session_goes_on(model: Model, whole: bool) -> None:
    session = model.session(900)
    bench_model.fill(session, 700, whole=whole)
    assert session.length == 700
    assert session.read([1, 2, 3]).isfinite().all()
    keys = session.pools[1].k_MGBH.transpose(1, 2).flatten(0, 1)
    assert keys[:703].abs().amin(0).gt(0).all() and (keys[703:] == 0).all()
    if not whole:
        (first, _, index), *rest = bench_model.random_keys(model.config, 1, 700)
        assert rest == [] and index is not None
        assert torch.equal(keys[:700], first.float())


def test_model_timings(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_model, "CHUNK", 64)
    monkeypatch.setattr(bench_model, "DECODED", 3)
    prefill, decode = bench_model.measure(model.network, [300], repeats=1)
    assert (prefill.what, prefill.context, prefill.tokens) == ("prefill", 300, 64)
    assert (decode.what, decode.context, decode.tokens) == ("decode", 300, 1)
    assert prefill.work.flops == bench_model.prefill_flops(model.config, 300, 64) and prefill.work.limit == "gemm"
    size = cost.bytes_per_token(model.config, 300, weight_bytes=4, cache_bytes=4)["total"]
    assert decode.work.nbytes == size and decode.work.limit == "read"


def test_random_network_has_the_config_and_dtype(folder: Path) -> None:
    config = ModelConfig.from_file(folder)
    network = bench_model.random_network(config, torch.bfloat16)
    assert {p.dtype for name, p in network.named_parameters() if ".router." not in name} == {torch.bfloat16}
    assert network.layers[0].mlp.router.weight.dtype == network.layers[0].mlp.router.bias.dtype == torch.float32
    again = bench_model.random_network(config, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))
    with pytest.raises(ConfigError, match=r"a model of this config needs \d+\.\d GiB"):
        bench_model.random_network(replace(config, num_experts=2**30, num_active=1), torch.bfloat16)


@pytest.mark.parametrize("source", ["--model", "--config"])
def test_model_command(
    folder: Path, source: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_model, "CHUNK", 64)
    monkeypatch.setattr(bench_model, "DECODED", 3)
    path = folder / "config.json" if source == "--config" else folder
    line = ["bench", "model", source, str(path), "--dtype", "bfloat16", "--lengths", "300", "512"]
    assert cli.main([*line, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["gemm_gflops"] > 0.1 and values["dtype"] == "bfloat16"
    assert [(t["what"], t["context"]) for t in values["timings"]] == [
        ("prefill", 300),
        ("decode", 300),
        ("prefill", 512),
        ("decode", 512),
    ]
    monkeypatch.setattr(bench, "measure_peaks", lambda: Peaks(100.0, 10.0))
    assert cli.main(line) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Measured peaks: 100 GFLOP/s in float32 products (GEMM), 10.0 GB/s read")
    assert len(lines) == 8
    assert cli.main([*line, "--weights", "int8"]) == (2 if source == "--config" else 0)
    assert ("are made from a checkpoint's" in capsys.readouterr().err) == (source == "--config")
    assert cli.main([*line, "1048576"]) == 2
    assert "1048576 tokens with 67 more exceed the model's limit of 1048576" in capsys.readouterr().err
