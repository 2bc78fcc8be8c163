"""`openm3 eval`: from arguments to a measurement, its tables and its files."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from openm3.errors import ConfigError
from openm3.eval import coverage, heatmap, quantisation
from openm3.eval.needles import Plan, Result, Store, ask
from openm3.eval.report import progress, table, tokens, wilson
from openm3.model.model import Model, load

SHORT = 65_536
"""Up to this many tokens a length is asked for 200 pass keys by default, above it for 50."""

KINDS = {"pass_key": "pass keys", "digits": "pass keys, digits alone", "quote": "quotes", "absence": "absence"}


def run(args: argparse.Namespace) -> int:
    """Run one evaluation and print it."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.task == "quantisation":
        return quantisation.run(args)
    if args.task == "needles":
        heatmap.require_matplotlib()
    model = load(args.model, dtype=getattr(torch, args.dtype), weights=args.weights)
    if args.task == "sight":
        # Only here: what draws pictures takes a moment to load.
        from openm3.eval import sight_command

        return sight_command.run(args, model)
    return _needles(args, model) if args.task == "needles" else coverage.run(args, model)


def _needles(args: argparse.Namespace, model: Model) -> int:
    plan = Plan(tuple(args.lengths), _pass_keys(args.lengths, args.count), tuple(args.attention), args.seed)
    store = Store(Path(args.out), model, args.seed)
    with progress() as bar:
        task = bar.add_task("reading haystacks", total=sum(length for length, *_ in plan.readings()))
        try:
            results = ask(model, plan, store, on_progress=lambda read: bar.update(task, advance=read))
        except KeyboardInterrupt:
            bar.stop()
            print(f"every finished haystack is in {store.path}: the same command goes on from there", file=sys.stderr)
            raise
    picture = Path(args.out) / "needles.png"
    heatmap.draw(results, picture)
    text = render(results)
    (Path(args.out) / "needles.md").write_text(text + "\n", encoding="utf-8")
    if args.json:
        files = {"results": str(store.path), "picture": str(picture)}
        print(json.dumps({"model": model.name, "seed": args.seed, "shares": shares(results), **files}))
    else:
        print(f"{text}\n\nEvery answer: {store.path}   Heat map: {picture}")
    return 0


def _pass_keys(lengths: Sequence[int], counts: Sequence[int] | None) -> tuple[int, ...]:
    """How many pass keys to ask for at each length."""
    if counts is None:
        return tuple(200 if length <= SHORT else 50 for length in lengths)
    if len(counts) not in (1, len(lengths)):
        raise ConfigError(f"--count takes one number, or one for each of the {len(lengths)} lengths, not {len(counts)}")
    return tuple(counts) if len(counts) == len(lengths) else tuple(counts) * len(lengths)


def shares(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Right answers by length, kind and attention, with 95% intervals; kind "digits" looks at the pass key alone."""
    rows = []
    for length in sorted({r.length for r in results}):
        for kind in KINDS:
            for attention in dict.fromkeys(r.attention for r in results):
                source = "pass_key" if kind == "digits" else kind
                some = [r for r in results if (r.length, r.kind, r.attention) == (length, source, attention)]
                if not some:
                    continue
                right = sum(r.digits if kind == "digits" else r.right for r in some)
                low, high = wilson(right, len(some))
                row = {"length": length, "kind": kind, "attention": attention, "right": right, "asked": len(some)}
                rows.append({**row, "share": right / len(some), "low": low, "high": high})
    return rows


def render(results: Sequence[Result]) -> str:
    """Two tables: right answers by length and task, and pass keys by depth."""
    attentions = list(dict.fromkeys(r.attention for r in results))
    cells = {(row["length"], row["kind"], row["attention"]): row for row in shares(results)}
    lengths = sorted({r.length for r in results})
    rows = []
    for length in lengths:
        for kind, title in KINDS.items():
            found = [cells.get((length, kind, attention)) for attention in attentions]
            if any(found):
                rows.append([tokens(length), title, *(_share(row) for row in found)])
    head = ["tokens", "task", *(f"right, {a} (95% interval)" for a in attentions)]
    deep = []
    for d in range(heatmap.DEPTHS):
        counts = [heatmap.by_depth(results, "pass_key", a, length)[d] for length in lengths for a in attentions]
        deep.append([f"{d * 10}-{d * 10 + 10}%", *(f"{right} of {asked}" if asked else "" for right, asked in counts)])
    deep_head = ["depth", *(f"{tokens(length)}, {a}" for length in lengths for a in attentions)]
    first = table(head, rows, "><" + ">" * len(attentions))
    return f"{first}\n\nPass keys by depth:\n\n{table(deep_head, deep, '>' * len(deep_head))}"


def _share(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['right']} of {row['asked']}, {row['share']:.1%} ({row['low']:.0%} to {row['high']:.0%})"
