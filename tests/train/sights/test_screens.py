"""Buttons lie where the answer says and fields hold what it says."""

import re

import numpy as np
import pytest

from openm3.train.sights import screens
from openm3.train.sights.canvas import Painter
from openm3.train.sights.screens import screen
from openm3.train.sights.sight import point_text


def test_buttons_are_where_the_point_is(plain_painter: Painter) -> None:
    forms = set()
    for _ in range(80):
        sight = screen(plain_painter)
        left, top, right, bottom = sight.target or (0, 0, 0, 0)
        pixels = sight.frames[0]
        height, width, _ = pixels.shape
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        point = re.search(r"\((\d\d, \d\d)\)", sight.question + sight.answer)
        if point is not None:
            assert point[1] == point_text((left, top, right, bottom), width, height)
            # The edge of the button runs along all of its sides, but for rounded corners.
            middle = (left + right) // 2
            assert (pixels[top, middle - 3 : middle + 3] == pixels[top, middle]).all()
            assert (pixels[top, middle] == pixels[bottom - 1, middle]).all()
            assert (pixels[top - 1, middle] != pixels[top, middle]).any()
        forms.add(re.sub(r"\(.*\)|It says .*", "", sight.answer))
    assert forms == {"At .", "", "Yes.", "No."}


def test_ticks_are_seen(plain_painter: Painter) -> None:
    ink = {"Yes.": [], "No.": []}
    for _ in range(200):
        sight = screen(plain_painter)
        if sight.answer in ink:
            left, top, right, bottom = sight.target or (0, 0, 0, 0)
            inside = sight.frames[0][top + 1 : bottom, left + 1 : right]
            ink[sight.answer].append(bool((inside != inside[0, 0]).any()))
    assert len(ink["Yes."]) > 5 and all(ink["Yes."])
    assert len(ink["No."]) > 5 and not any(ink["No."])


def test_what_is_read_is_spelled(painter: Painter) -> None:
    said = [s for s in (screen(painter) for _ in range(60)) if s.answer.startswith("It says")]
    assert len(said) > 15 and all(s.answer == f"It says {s.spelled}." for s in said)


def test_no_name_is_given_twice() -> None:
    names = [*screens.BUTTONS, *screens.FIELDS, *screens.OPTIONS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("theme", screens._THEMES)
def test_themes_can_be_read(theme: screens._Theme) -> None:
    from PIL import ImageColor

    from openm3.train.sights.canvas import contrast, luminance

    def between(one: str, other: str) -> float:
        return contrast(*(luminance(ImageColor.getrgb(c)[:3]) for c in (one, other)))

    pairs = (
        (theme.page, theme.ink),
        (theme.bar, theme.bar_ink),
        (theme.field, theme.ink),
        (theme.button, theme.button_ink),
    )
    assert min(between(*pair) for pair in pairs) > 4.5
    assert np.array(ImageColor.getrgb(theme.edge)).shape == (3,)
