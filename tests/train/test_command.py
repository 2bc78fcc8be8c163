"""`openm3 train` from the command line: a run of seconds, its files, going on, and clear refusals."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import openm3
from openm3 import cli
from openm3.train import command
from openm3.train.corpus import Source
from openm3.train.recipe import Recipe


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, sources: list[Source]) -> None:
    """A tiny recipe on a few files, without a compiler, which would take longer than the run."""
    monkeypatch.setitem(command.RECIPES, "test", recipe)
    monkeypatch.setattr(command, "standard_library", lambda *, held_out: sources)
    monkeypatch.setattr(command, "missing_compiler", lambda: "torch.compile needs a compiler")
    monkeypatch.setattr(command, "has_bfloat16_units", lambda: False)
    monkeypatch.setattr(command, "LOG_EVERY", 2)


def train(out: Path, *flags: str) -> int:
    return cli.main(["train", "--recipe", "test", "--threads", "1", "--out", str(out), *flags])


def test_run_makes_a_model_that_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(out, "--seed", "1") == 0
    assert {p.name for p in out.iterdir()} == {"log.jsonl", "state.pt", "tokenizer", "model"}

    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(e["step"], e["stage"]) for e in entries] == [(2, "short"), (4, "long"), (6, "selected")]
    assert all(e["text_loss"] > 0 and e["tokens_per_second"] > 0 for e in entries)

    model = openm3.load(out / "model")
    state = torch.load(out / "state.pt", weights_only=True)
    assert state["step"] == 6
    assert torch.equal(model.network.head.weight, state["network"]["head.weight"].bfloat16().float())
    ids = model.tokenizer.chat([{"role": "user", "content": "What is the pass key for Ada?"}], thinking="disabled")
    answer = list(model.generate(ids, max_new_tokens=4))
    assert len(answer) == 4 and max(answer) < 600

    printed = capsys.readouterr().out
    assert "torch.compile needs a compiler: training without fused operators, about half as fast\n" in printed
    assert f"exported {out / 'model'}: try " in printed

    assert train(out) == 2
    assert "already holds a run: continue it with --resume, or choose another --out" in capsys.readouterr().err

    assert train(out, "--resume") == 0
    assert len((out / "log.jsonl").read_text().splitlines()) == 3


def test_nothing_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", "--resume") == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_unknown_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--recipe", "m4", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: unknown recipe 'm4'; choose one of: m3-tiny, test\n"


def test_steps_scale_every_stage(recipe: Recipe) -> None:
    args = cli.build_parser().parse_args(["train", "--recipe", "test", "--steps", "12", "--seed", "7"])
    scaled = command._recipe(args)
    assert [stage.steps for stage in scaled.stages] == [6, 4, 2]
    assert scaled.seed == 7
    args.steps = 1
    assert [stage.steps for stage in command._recipe(args).stages] == [1, 1, 1]
    args.steps = None
    assert command._recipe(args) == replace(recipe, seed=7)


def test_workers_share_a_steps_tokens(recipe: Recipe) -> None:
    stage = recipe.stages[0]
    assert command._share(stage, 2).mixture.tokens == 256
    assert command._share(stage, 8).mixture.tokens == stage.mixture.length
    assert replace(command._share(stage, 2), mixture=stage.mixture) == stage


def test_two_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> None:
    monkeypatch.setenv("PATH", "")  # The workers are new processes: without a compiler on the path they do not compile.
    out = tmp_path / "run"
    assert cli.main(["train", "--recipe", "test", "--threads", "2", "--steps", "2", "--out", str(out)]) == 0
    assert torch.load(out / "state.pt", weights_only=True)["step"] == 3
    assert openm3.load(out / "model").config == recipe.model
