"""A model is put to pictures: answers by kind, needles in text, a table, and a sheet of what was seen wrongly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import openm3
from openm3 import cli
from openm3.eval import sight_command
from openm3.eval.sight import ImageNeedle, ImageNeedleMaker, Score, sight_cases
from openm3.model.model import Model
from openm3.train.corpus import Source
from openm3.train.pictures import Sight
from openm3.train.sights.sources import Sources

SEEING = Path(__file__).parents[1] / "golden/m3-random-s0/model"


@pytest.fixture(scope="module")
def seeing() -> Model:
    return openm3.load(SEEING)


def told(monkeypatch: pytest.MonkeyPatch, answers: list[str]) -> list[sight_command.Asked]:
    """Have the model give these answers; what it is asked."""
    asked: list[sight_command.Asked] = []
    left = iter(answers)

    def answer(model: Model, some: list[sight_command.Asked], *_: object) -> list[str]:
        asked.extend(some)
        return [next(left) for _ in some]

    monkeypatch.setattr(sight_command, "_answers", answer)
    return asked


def test_cases_are_scored(seeing: Model, drawing_sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = sight_cases("number", 4, sources=drawing_sources)
    asked = told(monkeypatch, [cases[0].answer, "no", f" {cases[2].answer}\n", cases[2].answer + "0"])
    score = sight_command.score_cases(seeing, "number", cases, lambda: None)
    assert (score.count, score.share) == (4, 0.5)
    assert [case for case, _ in score.wrong] == [cases[1], cases[3]] and score.wrong[0][1] == "no"
    for (ids, media), case in zip(asked, cases, strict=True):
        assert ids.count(seeing.config.image_id) == sum(item.num_tokens for item in media)
        assert seeing.tokenizer.decode(ids).count(case.question) == 1


def test_a_video_is_shown_with_its_times(
    seeing: Model, drawing_sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = sight_cases("minute", 1, sources=drawing_sources)
    asked = told(monkeypatch, [case.answer])
    assert sight_command.score_cases(seeing, "minute", [case], lambda: None).share == 1
    ((ids, (media,)),) = asked
    assert media.kind == "video" and media.seconds == tuple(float(2 * i) for i in range(30))
    assert "]<]58.0 seconds[>[" in seeing.tokenizer.decode(ids)


def test_needles_stand_in_text(
    seeing: Model, sources: list[Source], drawing_sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = ImageNeedleMaker(seeing.tokenizer, 1, sources, drawing_sources)
    needles: list[ImageNeedle] = [maker.make(1500, i, 2) for i in range(2)]
    asked = told(monkeypatch, [needles[0].sight.answer, "The number is -1."])
    score = sight_command.score_needles(seeing, 1500, needles, lambda: None)
    assert (score.kind, score.share) == ("number in 1,500 of text", 0.5)
    assert score.wrong == ((needles[1].sight, "The number is -1."),)
    places = [ids.index(seeing.config.image_id) / len(ids) for ids, _ in asked]
    assert places == pytest.approx([0.25, 0.75], abs=0.06)


def test_the_engine_is_asked_many_at_a_time(seeing: Model, drawing_sources: Sources) -> None:
    cases = sight_cases("number", 5, sources=drawing_sources)
    heard: list[int] = []
    score = sight_command.score_cases(seeing, "number", cases, lambda: heard.append(1))
    assert len(heard) == score.count == 5
    # Random weights read nothing, and what they say is what the model alone says.
    ids, media = sight_command._asked(seeing, cases[0])
    stop = (seeing.tokenizer.eos_id,)
    alone = list(seeing.generate(ids, media=media, max_new_tokens=sight_command.ANSWER_TOKENS, stop_ids=stop))
    assert dict(score.wrong)[cases[0]] == seeing.tokenizer.decode(alone)


def test_wrong_answers_are_drawn(tmp_path: Path) -> None:
    frame = np.full((56, 84, 3), (200, 0, 0), np.uint8)
    wrong = tuple((Sight([frame], None, f"What is {i}?", "red", None, "colour"), "blue") for i in range(7))
    path = tmp_path / "wrong.png"
    sight_command.draw_wrong([Score("colour", 9, wrong)], path)
    with Image.open(path) as sheet:
        assert sheet.size == (230 * 5, 230 * 2)
        assert sheet.getpixel((20, 20)) == sheet.getpixel((235 + 20, 235 + 20)) == (200, 0, 0)
        assert sheet.getpixel((235 * 4, 235 + 20)) == (255, 255, 255)
    sight_command.draw_wrong([Score("colour", 9, ())], path)
    assert not path.exists()


def test_the_command_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], drawing_sources: Sources
) -> None:
    def cases(kind: str, count: int, seed: int) -> list[Sight]:
        return sight_cases(kind, count, seed, drawing_sources)

    monkeypatch.setattr(sight_command, "sight_cases", cases)
    told(monkeypatch, ["It is sour.", *(case.answer for case in cases("colour", 3, 0)[1:])])
    command = ["eval", "sight", "--model", str(SEEING), "--out", str(tmp_path), "--needles", "0"]
    assert cli.main([*command, "--kinds", "colour", "--count", "3", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["shares"]
    assert (row["kind"], row["right"], row["asked"], row["goal"]) == ("colour", 2, 3, 0.95)
    table = (tmp_path / "sight.md").read_text()
    assert "| colour  | 2 of 3 |" in table and "instead of 'It is " in table
    assert (tmp_path / "wrong.png").is_file()


def test_what_cannot_be_asked_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = ["eval", "sight", "--model", str(SEEING), "--out", str(tmp_path)]
    assert cli.main([*command, "--kinds", "number", "feeling"]) == 2
    assert "there is no kind of picture 'feeling': give some of number, word" in capsys.readouterr().err
