"""Cases are answered right by their own truth, by nothing else, and needles lie where they are said to."""

from dataclasses import replace

import numpy as np
import pytest

from openm3.errors import ConfigError
from openm3.eval.sight import (
    GOALS,
    ImageNeedleMaker,
    is_right,
    sight_cases,
)
from openm3.model.model import Model
from openm3.train.corpus import Source
from openm3.train.pictures import KINDS, Sight
from openm3.train.sights.sources import Sources


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right_by_their_own_truth(drawing_sources: Sources, kind: str) -> None:
    cases = sight_cases(kind, 12, seed=3, sources=drawing_sources)
    again = sight_cases(kind, 12, seed=3, sources=drawing_sources)
    for case, same in zip(cases, again, strict=True):
        assert case.answer == same.answer and np.array_equal(case.frames[-1], same.frames[-1])
        assert is_right(case, case.answer) and is_right(case, f"\n {case.answer}  ")
        for wrong in (
            "",
            case.answer[:-1],
            case.answer.lower(),
            f"{case.answer} Yes.",
            "At (200, 3).",
            "At x seconds.",
        ):
            assert not is_right(case, wrong)
    assert set(GOALS) <= set(KINDS)


def sight(answer: str, *, target: tuple[int, int, int, int] | None = None, at: float | None = None) -> Sight:
    return Sight([np.zeros((100, 200, 3), np.uint8)], None, "?", answer, None, "test", target, at)


def test_points_are_right_inside_the_target() -> None:
    case = sight("At (35, 30).", target=(60, 20, 80, 40))
    assert is_right(case, "At (30, 20).") and is_right(case, "At (39, 39).")
    assert not is_right(case, "At (29, 30).") and not is_right(case, "At (40, 30).")
    assert not is_right(case, "At (35, 19).") and not is_right(case, "At (35, 40).")
    assert not is_right(case, "At (35,30).") and not is_right(case, "(35, 30)")


def test_seconds_are_right_within_one() -> None:
    case = sight("At 12 seconds.", at=12.0)
    assert [n for n in range(60) if is_right(case, f"At {n} seconds.")] == [11, 12, 13]
    assert is_right(sight("At 1 second.", at=1.0), "At 0 seconds.")


def test_needles_lie_in_text_of_the_length(model: Model, sources: list[Source], drawing_sources: Sources) -> None:
    maker = ImageNeedleMaker(model.tokenizer, 1, sources, drawing_sources)
    needles = [maker.make(3000, i, 5) for i in range(5)]
    for i, needle in enumerate(needles):
        assert needle.depth == pytest.approx((i + 0.5) / 5, abs=0.02)
        assert needle.before.endswith("\n") and needle.after.endswith("\n\nWhat number is in the picture?")
        assert needle.sight.question == "What number is in the picture?"
        text = needle.before + needle.after.removesuffix(needle.sight.question)
        prompt = model.tokenizer.chat([{"role": "user", "content": text + needle.sight.question}])
        assert abs(len(prompt) - 3000) < 40
        assert text.startswith("File: ")
    assert len({n.sight.answer for n in needles}) > 1
    same = ImageNeedleMaker(model.tokenizer, 1, sources, drawing_sources).make(3000, 2, 5)
    assert (same.before, same.after, same.sight.answer) == (
        needles[2].before,
        needles[2].after,
        needles[2].sight.answer,
    )
    with pytest.raises(ConfigError, match="needle 5 is not one of 5: give 0 to 4"):
        maker.make(3000, 5, 5)


def test_a_truth_with_a_point_needs_a_target() -> None:
    with pytest.raises(AssertionError):
        is_right(replace(sight("At (35, 30).")), "At (35, 30).")
