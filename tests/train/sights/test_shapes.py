"""Colours, counts and places of shapes, checked against the pixels."""

import colorsys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openm3.train.sights import shapes
from openm3.train.sights.canvas import Painter
from openm3.train.sights.shapes import COLOURS, SHAPES, shape_mask, side_of, standing_out

Boxes = Callable[[Any], list[tuple[int, int, int, int]]]


def names_of(pixel: np.ndarray) -> list[str]:
    """The colour names that a pixel may have."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
    found = []
    for name, (hues, saturations, values) in COLOURS.items():
        turns = any(hues[0] - 2 <= 360 * hue + turn <= hues[1] + 2 for turn in (-360, 0))
        within = [low - 0.02 <= x <= high + 0.02 for x, (low, high) in ((saturation, saturations), (value, values))]
        # Whole numbers say little about the saturation of what is almost black.
        within[0] |= value < 0.1
        if (turns or name in ("black", "white", "grey") or value < 0.1) and all(within):
            found.append(name)
    return found


def test_no_shade_has_two_names(painter: Painter) -> None:
    for colour in COLOURS:
        for _ in range(50):
            assert names_of(np.array(shapes.random_shade(colour, painter.rng))) == [colour]


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_are_cut_to_the_shape(shape: str) -> None:
    for size, degrees in ((13, 0), (30, 0), (48, 10)):
        mask = shape_mask(shape, size, degrees)
        assert mask.getbbox() == (0, 0, *mask.size)
        assert 0.6 * size <= min(mask.size) and max(mask.size) <= 1.35 * size
        assert np.asarray(mask).max() == 255


def test_shapes_differ() -> None:
    masks = [np.asarray(shape_mask(s, 40, 0).resize((24, 24)), float) / 255 for s in SHAPES]
    for i, one in enumerate(masks):
        assert all(np.abs(one - other).mean() > 0.1 for other in masks[:i])


def test_the_colour_asked_for_is_that_of_the_shape(plain_painter: Painter) -> None:
    for _ in range(30):
        sight = shapes.colour(plain_painter)
        left, top, right, bottom = sight.target or (0, 0, 0, 0)
        inside = sight.frames[0][top:bottom, left:right].reshape(-1, 3)
        pixels, counts = np.unique(inside[(inside != 225).any(-1)], axis=0, return_counts=True)
        assert [f"It is {name}." for name in names_of(pixels[counts.argmax()])] == [sight.answer]


def test_as_many_shapes_as_counted(plain_painter: Painter, drawn_boxes: Boxes) -> None:
    seen = set()
    for _ in range(80):
        sight = shapes.count(plain_painter)
        if " shapes" in sight.question and not any(colour in sight.question for colour in COLOURS):
            assert sight.answer == f"I count {len(drawn_boxes(sight.frames[0]))}."
        assert (
            sight.spelled is not None and sight.answer == f"I count {sight.spelled}." and 1 <= int(sight.spelled) <= 9
        )
        seen.add(int(sight.spelled))
    assert len(seen) >= 8


def test_the_shape_pointed_at_is_there(plain_painter: Painter, drawn_boxes: Boxes) -> None:
    for make in (shapes.where_shape, shapes.shape, shapes.position):
        for _ in range(20):
            sight = make(plain_painter)
            assert sight.target in drawn_boxes(sight.frames[0])
            assert sight.frames[0].shape[0] <= 168


@pytest.mark.parametrize(
    ("one", "other", "side"),
    [
        ((0, 0, 10, 10), (50, 5, 60, 15), "left"),
        ((50, 5, 60, 15), (0, 0, 10, 10), "right"),
        ((0, 0, 10, 10), (3, 40, 13, 50), "above"),
        ((3, 40, 13, 50), (0, 0, 10, 10), "below"),
        ((0, 0, 10, 10), (30, 30, 40, 40), None),
        ((0, 0, 10, 30), (5, 10, 20, 20), None),
    ],
)
def test_sides_are_named_only_where_they_are_plain(
    one: tuple[int, int, int, int], other: tuple[int, int, int, int], side: str | None
) -> None:
    assert side_of(one, other) == side


def test_colours_near_the_background_are_not_used() -> None:
    assert "white" not in standing_out(Image.new("RGB", (50, 50), (240, 240, 240)))
    assert "black" not in standing_out(Image.new("RGB", (50, 50), (15, 15, 15)))
    reds = Image.new("RGB", (50, 50), (200, 0, 0))
    assert "red" not in standing_out(reds) and "blue" in standing_out(reds)
    reds.paste((0, 0, 230), (0, 0, 25, 50))
    assert not {"red", "blue"} & set(standing_out(reds))
