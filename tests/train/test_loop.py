"""The training loop on a network of seconds: it learns, stops, and goes on exactly where it was."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openm3.train.data import SequenceMaker
from openm3.train.loop import Report, Trainer, final_weights
from openm3.train.recipe import Recipe


def trainer(recipe: Recipe, maker: SequenceMaker) -> Trainer:
    return Trainer(recipe, maker, low_precision=False, compiled=False)


def at(t: Trainer, step: int) -> Trainer:
    t.step = step
    return t


def test_loss_goes_down(recipe: Recipe, maker: SequenceMaker) -> None:
    stages = (replace(recipe.stages[0], steps=12),)
    reports: list[Report] = []
    trainer(replace(recipe, stages=stages), maker).run(reports.append)
    assert [r.step for r in reports] == list(range(1, 13))
    assert all(r.tokens == 512 and r.seconds > 0 and 0 <= r.answer_exact <= 1 for r in reports)
    assert reports[0].text_loss == pytest.approx(6.4, abs=0.3)  # ln 600: every token as likely as any other
    assert reports[-1].text_loss < reports[0].text_loss - 0.5
    assert reports[-1].answer_loss < reports[0].answer_loss - 0.5
    assert all(r.index_loss > 0 for r in reports)


def test_stages_follow_each_other(recipe: Recipe, maker: SequenceMaker) -> None:
    reports: list[Report] = []
    t = trainer(recipe, maker)
    t.run(reports.append)
    assert [r.stage for r in reports] == ["short"] * 3 + ["long"] * 2 + ["selected"]
    assert [at(t, step).stage().name for step in (0, 2, 3, 4, 5, 6)] == [
        "short",
        "short",
        "long",
        "long",
        "selected",
        "selected",
    ]


def test_learning_rate(recipe: Recipe, maker: SequenceMaker) -> None:
    constant = replace(recipe.stages[0], steps=50)
    falling = replace(recipe.stages[0], steps=100, rate=(0.5, 0.1))
    t = trainer(replace(recipe, stages=(constant, falling), warmup_steps=10), maker)
    expected = {0: 0.1, 4: 0.5, 9: 1.0, 49: 1.0, 50: 0.5, 75: 0.4, 149: 0.104, 150: 0.1}
    assert {step: at(t, step).learning_rate() for step in expected} == pytest.approx(expected)


def test_rates_reach_both_optimisers(recipe: Recipe, maker: SequenceMaker) -> None:
    t = trainer(replace(recipe, warmup_steps=4), maker)
    t.train_step(maker.batch(recipe.stages[0].mixture))
    assert t.muon.param_groups[0]["lr"] == pytest.approx(recipe.matrix_lr / 4)
    assert t.adam.param_groups[0]["lr"] == pytest.approx(recipe.vector_lr / 4)


def test_every_parameter_has_one_optimiser(recipe: Recipe, maker: SequenceMaker) -> None:
    t = trainer(recipe, maker)
    muon, adam = ({id(p) for p in o.param_groups[0]["params"]} for o in (t.muon, t.adam))
    names = {id(p): name for name, p in t.network.named_parameters()}
    assert muon | adam == set(names) and not muon & adam
    assert {names[i] for i in adam} >= {"embed.weight", "head.weight", "layers.0.mlp.router.weight"}
    assert {names[i] for i in muon} >= {"layers.1.attn.index_q.weight", "layers.0.mlp.experts.gate_up"}


def test_resumed_run_equals_the_one_that_went_on(recipe: Recipe, maker: SequenceMaker, tmp_path: Path) -> None:
    batches = [maker.batch(recipe.stages[0].mixture) for _ in range(4)]
    first = trainer(recipe, maker)
    for rows in batches[:2]:
        first.train_step(rows)
    first.save(tmp_path / "state.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]
    second = trainer(replace(recipe, seed=9), maker)
    second.resume(tmp_path / "state.pt")
    assert second.step == 2
    for rows in batches[2:]:
        a, b = first.train_step(rows), second.train_step(rows)
        assert replace(a, seconds=0) == replace(b, seconds=0)
    for (name, p), q in zip(first.network.named_parameters(), second.network.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_resumed_runs_draw_the_same_text(recipe: Recipe, maker: SequenceMaker, tmp_path: Path) -> None:
    t = trainer(recipe, maker)
    t.save(tmp_path / "state.pt")
    drawn = []
    for _ in range(2):
        t.resume(tmp_path / "state.pt")
        drawn.append(maker.batch(recipe.stages[0].mixture)[0].ids_T)
    assert torch.equal(*drawn)


def test_interrupted_run_saves_and_goes_on(recipe: Recipe, maker: SequenceMaker, tmp_path: Path) -> None:
    def stop_after_two(report: Report) -> None:
        if report.step == 2:
            raise KeyboardInterrupt

    state = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        trainer(recipe, maker).run(stop_after_two, state)
    t = trainer(recipe, maker)
    t.resume(state)
    reports: list[Report] = []
    t.run(reports.append, state)
    assert [(r.step, r.stage) for r in reports] == [(3, "short"), (4, "long"), (5, "long"), (6, "selected")]


def test_state_is_saved_every_few_minutes(recipe: Recipe, maker: SequenceMaker, tmp_path: Path) -> None:
    state = tmp_path / "state.pt"
    steps = []

    def look(_report: Report) -> None:
        steps.append(torch.load(state, weights_only=True)["step"] if state.exists() else None)

    short = replace(recipe, stages=recipe.stages[:1], checkpoint_minutes=0.0)
    trainer(short, maker).run(look, state)
    assert steps == [None, 1, 2]


AVERAGE = """
import sys, torch, torch.distributed as dist
from openm3.train.loop import Trainer
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
t = Trainer.__new__(Trainer)
t.sight = None
t.network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1), torch.nn.Linear(1, 1))
for i, p in enumerate(t.network[:2].parameters()):
    p.grad = torch.full_like(p, i + 10.0 * rank)
t._average_gradients()
print([sorted(set(p.grad.flatten().tolist())) for p in t.network[:2].parameters()], t.network[2].weight.grad.tolist())
dist.destroy_process_group()
"""


def test_workers_average_their_gradients(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", AVERAGE, str(rank), str(tmp_path / "meeting")], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [worker.communicate(timeout=120)[0].splitlines()[-1] for worker in workers]
    assert outputs == ["[[5.0], [6.0], [7.0], [8.0]] [[0.0]]"] * 2


def test_the_mean_of_kept_stages_is_what_is_exported(recipe: Recipe, maker: SequenceMaker, tmp_path: Path) -> None:
    short, long, selected = recipe.stages
    kept = replace(recipe, stages=(replace(short, kept=1), long, replace(selected, kept=3)))
    ends = {sum(s.steps for s in kept.stages[: i + 1]) for i in (0, 2)}
    seen: list[torch.Tensor] = []
    t = trainer(kept, maker)

    def note(report: Report) -> None:
        if report.step in ends:
            seen.append(t.network.embed.weight.detach().clone())

    t.run(note, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert len(seen) == len(state["kept"]) == 2
    torch.testing.assert_close(final_weights(state)["embed.weight"], (seen[0] + 3 * seen[1]) / 4)
    last = final_weights(state | {"kept": []})
    assert torch.equal(last["embed.weight"], state["network"]["embed.weight"])
