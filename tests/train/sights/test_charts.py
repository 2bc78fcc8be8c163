"""The highest bar, the largest slice and the direction of a line, measured in the picture."""

import re

import numpy as np
import pytest

from openm3.train.sights import charts
from openm3.train.sights.canvas import Painter


@pytest.fixture
def lettered(plain_painter: Painter, monkeypatch: pytest.MonkeyPatch) -> Painter:
    monkeypatch.setattr(charts, "_labels", lambda painter, num: list("ABCDEF"[:num]))
    return plain_painter


def test_the_bar_asked_for_is_the_highest_or_lowest(lettered: Painter) -> None:
    asked = set()
    for _ in range(60):
        sight = charts._bars(lettered)
        pixels = sight.frames[0].astype(int)
        paper = pixels[0, 0]
        # The longest row of one colour is the floor on which the bars stand.
        ink_rows = [int((row == row[len(row) // 2]).all(-1)[3:-3].all() and (row[3] != paper).any()) for row in pixels]
        floor = ink_rows.index(1)
        standing = (pixels[floor - 1] != paper).any(-1)
        starts = np.flatnonzero(np.diff(np.r_[0, standing]) == 1)
        ends = np.flatnonzero(np.diff(np.r_[standing, 0]) == -1)
        heights = []
        for start, end in zip(starts, ends, strict=True):
            column = pixels[: floor - 1, (start + end) // 2]
            same = (column == pixels[floor - 1, (start + end) // 2]).all(-1)[::-1]
            heights.append(int(np.argmin(np.r_[same, False])))
        if sight.answer.startswith("It is "):
            highest = re.search("highest|tallest", sight.question) is not None
            name = "ABCDEF"[int(np.argmax(heights) if highest else np.argmin(heights))]
            assert sight.answer == f"It is {name}." and sight.spelled == name
            asked.add(highest)
        else:
            assert re.fullmatch(r"The value is \d+\.", sight.answer)
    assert asked == {True, False}


def test_the_slice_asked_for_is_the_largest_or_smallest(
    plain_painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    shades = {name: (20 * i, 37 * i % 101, 53 * i % 211) for i, name in enumerate(charts.COLOUR_NAMES)}
    monkeypatch.setattr(charts, "random_shade", lambda name, rng: shades[name])
    for _ in range(20):
        sight = charts._pie(plain_painter)
        pixels = sight.frames[0].reshape(-1, 3).tolist()
        sizes = {name: pixels.count(list(shade)) for name, shade in shades.items() if pixels.count(list(shade)) > 40}
        pick = min if "smallest" in sight.question else max
        assert sight.answer == f"It is {pick(sizes, key=sizes.__getitem__)}."


def test_lines_go_where_the_answer_says(plain_painter: Painter) -> None:
    seen = set()
    for _ in range(60):
        sight = charts._line(plain_painter)
        if sight.answer not in ("It rises.", "It falls."):
            continue
        pixels = sight.frames[0]
        drawn = (pixels != pixels[0, 0]).any(-1)
        floor = int(drawn[:, 4:-4].all(1).argmax())
        columns = np.flatnonzero(drawn[: floor - 1].any(0))
        first, last = (int(drawn[: floor - 1, x].argmax()) for x in (columns[2], columns[-3]))
        assert sight.answer == ("It rises." if first > last else "It falls.")
        seen.add(sight.answer)
    assert len(seen) == 2


def test_charts_of_every_sort(painter: Painter) -> None:
    sights = [charts.chart(painter) for _ in range(60)]
    words = {re.sub(r"\W", " ", s.question).split()[1] for s in sights}
    assert {"bar", "slice", "point"} <= words
    assert all(s.kind == "chart" and len(s.frames) == 1 for s in sights)
