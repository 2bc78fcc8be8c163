"""What is written is what the answer says, and lies where the target says."""

import re
from collections.abc import Callable

import numpy as np
import pytest

from openm3.train.sights import text
from openm3.train.sights.canvas import Painter
from openm3.train.sights.sight import Sight, point_text


@pytest.mark.parametrize("make", [text.number, text.word, text.text])
def test_all_ink_lies_in_the_target(plain_painter: Painter, make: Callable[[Painter], Sight]) -> None:
    for _ in range(25):
        sight = make(plain_painter)
        rows, columns = np.nonzero((sight.frames[0] != 225).any(-1))
        left, top, right, bottom = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert sight.target is not None
        # The faintest pixels of an edge may round to the ground.
        assert np.abs(np.array(sight.target) - (left, top, right, bottom)).max() <= 1


def test_numbers_have_one_to_four_digits(painter: Painter) -> None:
    sights = [text.number(painter) for _ in range(100)]
    assert {len(s.spelled or "") for s in sights} == {1, 2, 3, 4}
    for sight in sights:
        assert sight.answer == f"The number is {sight.spelled}." and re.fullmatch(
            r"0|[1-9]\d{0,3}", sight.spelled or ""
        )
        assert sight.kind == "number" and sight.question in text.NUMBER_QUESTIONS


def test_words_come_in_three_cases(painter: Painter) -> None:
    sights = [text.word(painter) for _ in range(100)]
    words = [s.spelled or "" for s in sights]
    assert {w.lower() for w in words} <= set(painter.sources.words)
    assert sum(w.islower() for w in words) > 50 and any(w.istitle() for w in words) and any(w.isupper() for w in words)
    assert all(s.answer == f"It says {s.spelled}." for s in sights)


def test_text_on_several_lines_is_answered_in_one(painter: Painter) -> None:
    sights = [text.text(painter) for _ in range(60)]
    assert {len((s.spelled or "").split(" ")) for s in sights} == {2, 3}
    assert all("\n" not in s.answer and s.answer == f"It says {s.spelled}." for s in sights)


def test_the_word_pointed_at_is_the_one_asked_for(plain_painter: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[tuple[int, int], list[str]] = {}
    letters = Painter.letters

    def remember(self: Painter, written: str, *rest: object) -> object:
        mask = letters(self, written, *rest)  # type: ignore[arg-type]
        drawn.setdefault(mask.size, []).append(written)
        return mask

    monkeypatch.setattr(Painter, "letters", remember)
    for _ in range(30):
        drawn.clear()
        sight = text.where_word(plain_painter)
        left, top, right, bottom = sight.target or (0, 0, 0, 0)
        asked = re.search("“(.+)”", sight.question)
        assert asked is not None and asked[1] in drawn[right - left, bottom - top]
        inside = sight.frames[0][top:bottom, left:right]
        assert (inside != 225).any()
        height, width, _ = sight.frames[0].shape
        assert sight.answer == f"At ({point_text((left, top, right, bottom), width, height)})."


def test_words_that_look_the_same_in_both_cases_are_not_shown(painter: Painter) -> None:
    object.__setattr__(painter.sources, "words", [*painter.sources.words, "cow", "zoo"])
    assert "cow" not in {text.random_word(painter) for _ in range(300)}
    object.__setattr__(painter.sources, "words", painter.sources.words[:-2])


def test_free_place_keeps_the_gap(painter: Painter) -> None:
    taken = [(0, 0, 50, 100)]
    for _ in range(50):
        place = text.free_place(painter, (100, 100), (20, 20), taken, 5)
        assert place is None or (place[0] >= 55 and place[0] + 20 <= 99 and 1 <= place[1] <= 79)
    assert text.free_place(painter, (100, 100), (60, 20), taken, 5) is None
    assert text.free_place(painter, (100, 100), (99, 20), [], 5) is None
