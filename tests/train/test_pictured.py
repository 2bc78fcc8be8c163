"""Pictures in training: conversations about them, what is said to be where, and a step that teaches the tower."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openm3.config import VisionConfig
from openm3.tokens.tokenizer import Tokenizer
from openm3.train.command import export
from openm3.train.corpus import Source, words
from openm3.train.data import Mixture, Sample, SequenceMaker
from openm3.train.loop import Report, Trainer
from openm3.train.pictures import Sight, SightMaker
from openm3.train.recipe import Recipe, Stage, tiny_model
from openm3.train.sight_loss import SightLoss
from openm3.train.sights.sources import Sources

MIXTURE = Mixture(length=512, tokens=512, max_questions=3, pictured=1024, inserted_share=1.0, shown=500)


@pytest.fixture
def maker(tokenizer: Tokenizer, sources: list[Source], drawing_sources: Sources) -> SequenceMaker:
    return SequenceMaker(tokenizer, sources, words(sources), 0, SightMaker(0, held_out=False, sources=drawing_sources))


@pytest.fixture
def seeing(recipe: Recipe) -> Recipe:
    vision = VisionConfig(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, projector_hidden_size=40)
    ids = tiny_model(recipe.vocab_size, vision=vision)
    model = replace(recipe.model, vision=vision, image_id=ids.image_id, video_id=ids.video_id)
    return replace(recipe, model=model, stages=(Stage("seen", 3, MIXTURE, selected=False),))


def placeholders(maker: SequenceMaker, sample: Sample) -> int:
    ids = sample.ids_T.tolist()
    return sum(ids.count(maker.tokenizer.token_id(f"]<]{kind}[>[")) for kind in ("image", "video"))


def answers(maker: SequenceMaker, sample: Sample) -> list[str]:
    text = maker.tokenizer.decode(sample.ids_T[sample.answer_T].tolist())
    return text.replace("</mm:think>", "").split("[e~[")[:-1]


def test_a_batch_has_texts_conversations_and_pictures_to_look_at(maker: SequenceMaker) -> None:
    text, one, other, shown = maker.batch(MIXTURE)
    assert [len(sample.ids_T) for sample in (text, one, other, shown)] == [512, 512, 512, 0]
    assert [sample.seen for sample in (text, one, other, shown)] == [False, True, True, False]
    assert len(text.glimpses) == 1 and len(one.glimpses) > 1
    for sample in (text, one, other):
        assert placeholders(maker, sample) == sum(glimpse.media.num_tokens for glimpse in sample.glimpses)
    sizes = [len(glimpse.media.patch_IC) for glimpse in shown.glimpses]
    assert sum(sizes) >= 500 > sum(sizes[:-1])


def test_every_turn_is_answered_and_what_is_read_is_spelled(maker: SequenceMaker) -> None:
    made: list[Sight] = []
    make = maker.sights.make  # type: ignore[union-attr]

    class Noting:
        def make(self, kind: str | None = None) -> Sight:
            made.append(make("word"))
            return made[-1]

    maker.sights = Noting()  # type: ignore[assignment]
    sample = maker.pictured(MIXTURE)
    found = answers(maker, sample)
    assert found == [sight.answer for sight in made[: len(found)]] and len(found) == len(sample.glimpses) > 2
    word = made[0].spelled
    assert word is not None
    spelled = [maker.tokenizer.encode(" " + word[0]), *(maker.tokenizer.encode(c) for c in word[1:])]
    ids, wanted = sample.ids_T.tolist(), [token for piece in spelled for token in piece]
    assert any(ids[i : i + len(wanted)] == wanted for i in range(len(ids)))


def test_a_picture_in_a_text_is_asked_for_among_the_rest(maker: SequenceMaker) -> None:
    sample = maker.make(MIXTURE)
    (glimpse,) = sample.glimpses
    assert placeholders(maker, sample) == glimpse.media.num_tokens
    assert 1 <= len(answers(maker, sample)) <= 4
    # It stands among the documents, in the first turn, before every answer.
    first = int((sample.ids_T == maker.tokenizer.token_id("]<]image[>[")).nonzero()[0])
    assert first < int(sample.answer_T.nonzero()[0])


def test_labels_name_what_is_in_a_token_s_square(maker: SequenceMaker) -> None:
    assert maker.sights is not None
    sight = Sight([maker.sights.make("count").frames[0][:56, :56]], None, "", "", None, "test")
    sight = replace(sight, shown=(("7", (0, 0, 14, 28)), ("red", (28, 28, 56, 56)), ("x", (26, 0, 34, 28))))
    glimpse = maker.look(sight).glimpse
    seven, red, x = (maker.tokenizer.encode(name)[0] for name in ("7", " red", "x"))
    found = list(zip(glimpse.place_N.tolist(), glimpse.name_N.tolist(), glimpse.weight_N.tolist(), strict=True))
    # The whole of the seven; all of the red square; three quarters of the x, whose other quarter is too little.
    assert found == [(0, seven, pytest.approx(1.0)), (3, red, pytest.approx(1.0)), (1, x, pytest.approx(0.75))]


def test_the_same_seed_shows_the_same(tokenizer: Tokenizer, sources: list[Source], drawing_sources: Sources) -> None:
    def batch(seed: int) -> list[Sample]:
        sights = SightMaker(seed, held_out=False, sources=drawing_sources)
        return SequenceMaker(tokenizer, sources, words(sources), seed, sights).batch(MIXTURE)

    one, same, other = batch(3), batch(3), batch(4)
    assert all(a.ids_T.equal(b.ids_T) for a, b in zip(one, same, strict=True))
    assert [g.media.digest for s in one for g in s.glimpses] == [g.media.digest for s in same for g in s.glimpses]
    assert not one[1].ids_T.equal(other[1].ids_T)


def test_a_step_teaches_the_tower_and_goes_on_where_it_was(
    seeing: Recipe, maker: SequenceMaker, tmp_path: Path
) -> None:
    trainer = Trainer(seeing, maker, low_precision=False, compiled=False)
    muon, adam = ({id(p) for p in o.param_groups[0]["params"]} for o in (trainer.muon, trainer.adam))
    assert trainer.sight is not None
    known = {id(p) for p in [*trainer.network.parameters(), *trainer.sight.parameters()]}
    assert muon | adam == known and not muon & adam
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    batch = maker.batch(MIXTURE)
    reports = [trainer.train_step(batch) for _ in range(6)]
    assert reports[-1].sight_loss < reports[0].sight_loss - 0.2
    assert 0 <= reports[0].sight_exact <= 1 and 0 <= reports[0].seen_exact <= 1
    moved = {name for name, value in trainer.network.state_dict().items() if not value.equal(before[name])}
    assert {"vision.patch_embed.weight", "vision.layers.1.mlp.up.weight", "projector.merge_2.bias"} <= moved
    trainer.save(tmp_path / "state.pt")
    again = Trainer(seeing, maker, low_precision=False, compiled=False)
    again.resume(tmp_path / "state.pt")
    one, other = (t.train_step(batch) for t in (trainer, again))
    assert replace(one, seconds=0.0) == replace(other, seconds=0.0)


def test_a_run_is_exported_with_its_tower(
    seeing: Recipe, maker: SequenceMaker, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from openm3.model.model import load

    reports: list[Report] = []
    one_step = replace(seeing, stages=(Stage("seen", 1, MIXTURE, selected=True, kept=1),))
    trainer = Trainer(one_step, maker, low_precision=False, compiled=False)
    trainer.run(reports.append, tmp_path / "state.pt")
    tokenizer.save(tmp_path / "tokenizer")
    export(seeing, tmp_path / "state.pt", tmp_path / "tokenizer", tmp_path / "model")
    model = load(tmp_path / "model")
    assert model.config.vision == seeing.model.vision and model.config.image_id == seeing.model.image_id
    sample = maker.pictured(MIXTURE)
    media = [glimpse.media for glimpse in sample.glimpses]
    assert model.logits(sample.ids_T.tolist(), media).shape == (512, seeing.vocab_size)


def test_low_precision_sees_the_same(seeing: Recipe, maker: SequenceMaker) -> None:
    batch = maker.batch(MIXTURE)
    exact, rough = (
        Trainer(seeing, maker, low_precision=low, compiled=False).train_step(batch) for low in (False, True)
    )
    assert rough.sight_loss == pytest.approx(exact.sight_loss, rel=0.02)
    assert rough.answer_loss == pytest.approx(exact.answer_loss, rel=0.02)


def test_names_are_compared_with_all_that_is_shown(seeing: Recipe, maker: SequenceMaker) -> None:
    loss = SightLoss(seeing.model)
    torch.nn.init.zeros_(loss.place.weight)
    glimpse = next(g for g in maker.shown(replace(MIXTURE, shown=3000))[0].glimpses if len(g.place_N) > 5)
    embed_VD = torch.randn(600, 48, generator=torch.Generator().manual_seed(0))
    image_ID = torch.zeros((glimpse.media.num_tokens, 48))
    blind, _ = loss([(glimpse, image_ID)], embed_VD)
    for i in glimpse.weight_N.argsort().tolist():
        image_ID[glimpse.place_N[i]] = embed_VD[glimpse.name_N[i]] / 20
    seen, right = loss([(glimpse, image_ID)], embed_VD)
    assert seen < blind and right == 1.0
    nothing, none = loss([], embed_VD)
    assert nothing == 0 and none is None
