"""`openm3 train`: run a recipe on every core, show how it goes, survive a kill, and export a checkpoint.

One worker process a core, each with its own text, averaging gradients after every step: small models lose more time to
waiting between threads than to this one exchange. Worker 0 saves and reports.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.multiprocessing.spawn import spawn

from openm3.errors import CheckpointError, ConfigError
from openm3.model import checkpoint
from openm3.ops.dispatch import missing_compiler
from openm3.tokens.tokenizer import Tokenizer, train_bpe
from openm3.train.corpus import standard_library, words
from openm3.train.data import SequenceMaker
from openm3.train.loop import Report, Trainer, final_weights
from openm3.train.pictures import SightMaker
from openm3.train.recipe import RECIPES, Recipe, Stage

LOG_EVERY = 25


def run(args: argparse.Namespace) -> int:
    """Handle `openm3 train`. Returns the exit code; raises ConfigError or CheckpointError for what cannot be run."""
    recipe = _recipe(args)
    out = Path(args.out)
    state = out / "state.pt"
    if state.exists() and not args.resume:
        raise CheckpointError(f"{out} already holds a run: continue it with --resume, or choose another --out")
    if args.resume and not state.exists():
        raise CheckpointError(f"nothing to resume in {out}: there is no {state.name}; start it without --resume")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer_folder = out / "tokenizer"
    if not (tokenizer_folder / "tokenizer.json").exists():
        print(f"training a vocabulary of {recipe.vocab_size} on the standard library")
        train_bpe((s.text for s in standard_library(held_out=False)), recipe.vocab_size).save(tokenizer_folder)
    workers = args.threads or max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"
        if workers == 1:
            _work(0, 1, meeting, recipe, out)
        else:
            spawn(_work, (workers, meeting, recipe, out), nprocs=workers)
    export(recipe, state, tokenizer_folder, out / "model")
    print(f"exported {out / 'model'}: try  openm3 ask --model {out / 'model'} ...")
    return 0


def export(recipe: Recipe, state: Path, tokenizer_folder: Path, out: Path) -> None:
    """Write a saved run as a checkpoint in the published layout, bfloat16 with float32 routers."""
    saved = torch.load(state, weights_only=True)
    checkpoint.write(out, recipe.model, final_weights(saved), dtype=torch.bfloat16)
    Tokenizer.from_folder(tokenizer_folder).save(out)


def _recipe(args: argparse.Namespace) -> Recipe:
    """The named recipe with what the flags change."""
    if args.recipe not in RECIPES:
        raise ConfigError(f"unknown recipe {args.recipe!r}; choose one of: {', '.join(sorted(RECIPES))}")
    recipe = replace(RECIPES[args.recipe], seed=args.seed)
    if args.steps is None:
        return recipe
    if args.steps < 1:
        raise ConfigError(f"--steps must be at least 1, not {args.steps}")
    share = args.steps / recipe.steps
    stages = [replace(s, steps=max(1, round(s.steps * share))) for s in recipe.stages]
    return replace(recipe, stages=tuple(stages))


def _work(rank: int, workers: int, meeting: Path, recipe: Recipe, out: Path) -> None:
    """One worker: its share of every step."""
    torch.set_num_threads(1)
    if workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=workers)
    sources = standard_library(held_out=False)
    tokenizer = Tokenizer.from_folder(out / "tokenizer")
    recipe = replace(recipe, stages=tuple(_share(stage, workers) for stage in recipe.stages))
    seed = 1000 * recipe.seed + rank
    sights = None if recipe.model.vision is None else SightMaker(seed, held_out=False)
    maker = SequenceMaker(tokenizer, sources, words(sources), seed, sights)
    lacking = missing_compiler()
    if lacking and rank == 0:
        print(f"{lacking}: training without fused operators, about half as fast")
    trainer = Trainer(recipe, maker, worker=rank, low_precision=has_bfloat16_units(), compiled=lacking is None)
    state = out / "state.pt"
    if state.exists():
        trainer.resume(state)
    with _Log(trainer, out, workers, shown=rank == 0) as log:
        trainer.run(log.add, state if rank == 0 else None)
    if workers > 1:
        dist.destroy_process_group()


def _share(stage: Stage, workers: int) -> Stage:
    """The stage with one worker's share of each step's tokens."""
    mixture = stage.mixture
    mixture = replace(mixture, tokens=max(mixture.length, mixture.tokens // workers), shown=mixture.shown // workers)
    if mixture.pictured:
        mixture = replace(mixture, pictured=max(mixture.length, mixture.pictured // workers))
    return replace(stage, mixture=mixture)


def has_bfloat16_units() -> bool:
    """Whether matrix products in bfloat16 are worth it here: the processor multiplies tiles of them."""
    return bool(torch.cpu._is_amx_tile_supported())


class _Log:
    """A progress bar on the terminal, and a line of means every few steps in log.jsonl."""

    def __init__(self, trainer: Trainer, out: Path, workers: int, *, shown: bool) -> None:
        self.trainer, self.workers, self.shown = trainer, workers, shown
        self.path = out / "log.jsonl"
        self.recent: deque[Report] = deque(maxlen=LOG_EVERY)
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, TextColumn("{task.fields[figures]}"), disable=not shown)
        self.task = self.bar.add_task("training", total=trainer.recipe.steps, completed=trainer.step, figures="")
        self.begin = time.monotonic()

    def __enter__(self) -> _Log:
        self.bar.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.bar.stop()

    def add(self, report: Report) -> None:
        if not self.shown:
            return
        self.recent.append(report)
        last = self.recent[-1]
        means = {name: _mean([getattr(r, name) for r in self.recent]) for name in _MEANS}
        speed = self.workers * sum(r.tokens for r in self.recent) / sum(r.seconds for r in self.recent)
        figures = (
            f"{last.stage}: answers {means['answer_exact']:.1%}, on sight {means['seen_exact']:.1%} "
            f"(things {means['sight_exact']:.1%}), "
            f"loss {means['answer_loss']:.2f}, {speed:,.0f} tok/s"
        )
        self.bar.update(self.task, completed=report.step, figures=figures)
        if report.step % LOG_EVERY == 0:
            entry = {
                **asdict(last),
                **means,
                "tokens_per_second": speed,
                "minutes": (time.monotonic() - self.begin) / 60,
            }
            with self.path.open("a", encoding="utf-8") as file:
                rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in entry.items() if v == v}
                file.write(json.dumps(rounded) + "\n")


def _mean(values: Sequence[float | None]) -> float:
    """The mean of those that are there, NaN without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


_MEANS = (
    "text_loss",
    "answer_loss",
    "answer_exact",
    "seen_exact",
    "sight_loss",
    "sight_exact",
    "index_loss",
    "seconds",
)
