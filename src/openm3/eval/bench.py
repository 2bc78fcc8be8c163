"""`openm3 bench`: how fast operators and models run here, beside what the machine could do.

The peaks are measured before and after, in the same run: float32 matrix products and memory reads. What a call has to
do is counted from its shape.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from openm3.config import EngineConfig
from openm3.engine.engine import Engine
from openm3.errors import ConfigError
from openm3.eval import bench_engine, bench_headline, bench_model, bench_ops, bench_serve
from openm3.eval.bench_engine import Served
from openm3.eval.bench_headline import Headline
from openm3.eval.bench_model import Timing
from openm3.eval.bench_ops import Line
from openm3.eval.bench_peaks import Peaks, Work, measure_peaks
from openm3.eval.bench_serve import Overhead
from openm3.eval.http import Address
from openm3.eval.report import table, tokens
from openm3.model.checkpoint import BUNDLED
from openm3.model.model import load
from openm3.ops.dispatch import NAMES
from openm3.server.settings import read_keys
from openm3.tokens import Tokenizer

BUDGET, QUICK_BUDGET = 6.0, 1.5
"""Seconds that a case is repeated for."""

_LIMITS = {"gemm": "GEMM", "read": "read"}


def run(args: argparse.Namespace) -> int:
    """Measure, and print a table or one JSON line."""
    if args.threads:
        torch.set_num_threads(args.threads)
    return {"ops": _ops, "model": _model, "engine": _engine, "serve": _serve}[args.subject](args)


def _ops(args: argparse.Namespace) -> int:
    if args.list:
        print(bench_ops.describe())
        return 0
    if args.against and args.against not in NAMES:
        raise ConfigError(f"no implementation is named {args.against!r}; give one of {', '.join(NAMES)}")
    budget = QUICK_BUDGET if args.quick else BUDGET
    cases = [] if args.headline and not args.case else bench_ops.choose(args.case, args.quick)
    peaks = measure_peaks()
    lines = bench_ops.measure(cases, budget=budget, against=args.against)
    headlines = bench_headline.measure(budget=budget) if args.headline else []
    peaks = peaks.better(measure_peaks())
    if args.json:
        print(json.dumps(_ops_values(lines, headlines, peaks, args.against)))
    else:
        print(render_ops(lines, peaks, args.against) + render_headlines(headlines, peaks))
    return 0


def _model(args: argparse.Namespace) -> int:
    network, name = bench_model.open_network(args.model, args.config, getattr(torch, args.dtype), args.weights)
    peaks = measure_peaks()
    timings = list(bench_model.measure(network, args.lengths, whole=args.whole))
    peaks = peaks.better(measure_peaks())
    if args.json:
        rows = [
            {"what": t.what, "context": t.context, "tokens_per_second": t.tokens / t.seconds}
            | _rates(t.seconds, t.work, peaks)
            for t in timings
        ]
        settings = {"model": name, "dtype": args.dtype, "weights": args.weights, "whole": args.whole}
        print(json.dumps(settings | _machine(peaks) | {"timings": rows}))
    else:
        print(render_model(name, timings, peaks))
    return 0


def _engine(args: argparse.Namespace) -> int:
    workloads = bench_engine.choose(args.workload)
    model = load(args.model, dtype=getattr(torch, args.dtype), weights=args.weights)
    config = EngineConfig(draft_tokens=args.draft_tokens)
    peaks = measure_peaks()
    runs = bench_engine.measure(
        lambda: Engine(model, config), workloads, requests=args.requests, rate=args.rate, seed=args.seed
    )
    served = list(runs)
    if args.json:
        settings = {"model": model.name, "dtype": args.dtype, "weights": args.weights}
        print(json.dumps(settings | _machine(peaks) | {"workloads": [run.values() for run in served]}))
    else:
        print(render_engine(served))
    return 0


def _serve(args: argparse.Namespace) -> int:
    workloads = bench_engine.choose(args.workload)
    own = {"requests": args.requests, "rate": args.rate, "seed": args.seed}
    overhead = None
    if args.url:
        keys = read_keys(None, os.environ)
        tokenizer = Tokenizer.from_folder(BUNDLED.get(args.model, args.model))
        address = Address(args.url, keys[0] if keys else None)
        served = list(bench_serve.measure(address, tokenizer, workloads, **own))
    else:
        model = load(args.model, dtype=getattr(torch, args.dtype), weights=args.weights)
        options = [args.model, "--dtype", args.dtype, "--threads", str(torch.get_num_threads())]
        options += ["--weights", args.weights] if args.weights else []
        with bench_serve.serving(options) as server:
            http = list(bench_serve.measure(server.address, model.tokenizer, workloads, **own))
            alone = list(bench_engine.measure(lambda: Engine(model), workloads, **own))
            served = [run for pair in zip(http, alone, strict=True) for run in pair]
            overhead = bench_serve.compare(
                Engine(model), server.address, batch=args.batch, rounds=args.rounds, written=args.written
            )
    if args.json:
        about = {"model": args.model, "url": args.url, "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
        about |= {} if overhead is None else {"comparison": overhead.values()}
        print(json.dumps(about | {"workloads": [run.values() for run in served]}))
    else:
        print(render_engine(served) + ("" if overhead is None else f"\n\n{render_overhead(overhead)}"))
    return 0


def render_overhead(overhead: Overhead) -> str:
    """What HTTP takes, in a sentence."""
    alone, http = (f"{statistics.median(rates):,.0f}" for rates in (overhead.engine, overhead.http))
    return (
        f"{overhead.batch} replies at a time: {alone} tokens/s by the engine alone, {http} over HTTP, which takes "
        f"{overhead.share:.1%} (medians of {len(overhead.http)} rounds)"
    )


def render_engine(served: Sequence[Served]) -> str:
    """A table of what requests waited for, in milliseconds."""
    head = (
        *("workload", "requests", "first token p50", "p95", "p99", "between p50", "p95", "p99"),
        *("written/s", "read/s", "from cache", "host"),
    )
    rows = []
    for run in served:
        values = run.values()
        times = (f"{1e3 * seconds:,.0f}" for seconds in run.percentiles().values())
        speeds = (f"{values[name]:,.0f}" for name in ("written_per_second", "read_per_second"))
        shares = ("" if values[name] is None else f"{values[name]:.1%}" for name in ("cache_hit_rate", "host_share"))
        rows.append((run.workload, str(values["requests"]), *times, *speeds, *shares))
    return table(head, rows, "<" + ">" * (len(head) - 1))


def _ops_values(
    lines: Sequence[Line], headlines: Sequence[Headline], peaks: Peaks, against: str | None
) -> dict[str, Any]:
    cases: dict[str, dict[str, Any]] = {}
    for line in lines:
        cases[line.name] = _rates(line.seconds, line.work, peaks)
        if line.other is not None:
            cases[line.name] |= {"against": against, "ratio": line.other / line.seconds}
    for h in headlines:
        ratios = {"dense_ratio": h.dense / h.sparse, "sdpa_ratio": h.plain / h.sparse}
        flops_ratio = h.dense_work.flops / h.work.flops
        cases[h.name] = _rates(h.sparse, h.work, peaks) | ratios | {"flops_ratio": flops_ratio}
    return _machine(peaks) | {"cases": cases}


def _machine(peaks: Peaks) -> dict[str, Any]:
    """The peaks, and whose they are."""
    return {
        "gemm_gflops": peaks.gflops,
        "read_gbs": peaks.gbytes,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _rates(seconds: float, work: Work, peaks: Peaks) -> dict[str, Any]:
    gflops, gbytes = work.flops / seconds / 1e9, work.nbytes / seconds / 1e9
    share = work.share(seconds, peaks)
    return {"ms": seconds * 1e3, "share": share, "of": work.limit, "gflops": gflops, "gbs": gbytes}


def render_ops(lines: Sequence[Line], peaks: Peaks, against: str | None) -> str:
    """The cases as a table under the machine's peaks."""
    if not lines:
        return _title(peaks)
    rows = []
    for line in lines:
        ratio = [] if line.other is None else [f"{line.other / line.seconds:.1f}x"]
        rows.append([line.name, _milliseconds(line.seconds), *ratio, *_cells(line.seconds, line.work, peaks)])
    head = ["case", "ms", *([f"{against} takes"] if against else []), "GFLOP/s", "GB/s", "share of peak"]
    return f"{_title(peaks)}\n\n" + table(head, rows, "<" + ">" * (len(head) - 1))


def render_headlines(headlines: Sequence[Headline], peaks: Peaks) -> str:
    """Sparse against dense attention at a million tokens, as a table; nothing without measurements."""
    if not headlines:
        return ""
    rows = []
    for h in headlines:
        times = [_milliseconds(seconds) for seconds in (h.sparse, h.dense, h.plain)]
        ratios = [f"{seconds / h.sparse:.1f}x" for seconds in (h.dense, h.plain)]
        work = f"1/{h.dense_work.flops / h.work.flops:.1f}"
        rows.append([h.name, *times, *ratios, work, f"{h.work.share(h.sparse, peaks):.0%} of {_LIMITS[h.work.limit]}"])
    head = ["behind 1M tokens", "sparse ms", "dense ms", "SDPA ms", "dense takes", "SDPA takes", "operations", "share"]
    return "\n\n" + table(head, rows, "<" + ">" * (len(head) - 1))


def render_model(name: str, timings: Sequence[Timing], peaks: Peaks) -> str:
    """A model's timings as a table under the machine's peaks."""
    rows = []
    for t in timings:
        what = f"{t.what} {t.tokens}" if t.tokens > 1 else t.what
        rate = f"{t.tokens / t.seconds:,.1f}"
        rows.append([what, tokens(t.context), rate, _milliseconds(t.seconds), *_cells(t.seconds, t.work, peaks)])
    head = [name, "behind", "tokens/s", "ms", "GFLOP/s", "GB/s", "share of peak"]
    return f"{_title(peaks)}\n\n" + table(head, rows, "<>>>>>>")


def _title(peaks: Peaks) -> str:
    best = f"{peaks.gflops:.0f} GFLOP/s in float32 products (GEMM), {peaks.gbytes:.1f} GB/s read"
    return f"Measured peaks: {best} ({torch.get_num_threads()} threads)"


def _cells(seconds: float, work: Work, peaks: Peaks) -> list[str]:
    rates = [f"{amount / seconds / 1e9:,.1f}" for amount in (work.flops, work.nbytes)]
    return [*rates, f"{work.share(seconds, peaks):.0%} of {_LIMITS[work.limit]}"]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.{2 if seconds < 0.1 else 0}f}"
