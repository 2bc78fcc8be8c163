"""Ink stands out from what is behind it, and letters fit where they are to go."""

import numpy as np
import pytest
from PIL import Image

from openm3.train.sights.canvas import (
    MIN_CONTRAST,
    Painter,
    contrast,
    distance,
    ink_for,
    luminance,
    luminance_range,
    paste,
)


def test_contrast_of_known_colours() -> None:
    assert luminance((0, 0, 0)) == pytest.approx(0, abs=1e-3)
    assert luminance((255, 255, 255)) == pytest.approx(1)
    assert luminance((0, 255, 0)) == pytest.approx(0.7152)
    assert contrast(1, 0) == contrast(0, 1) == pytest.approx(21)
    # The grey that accessibility guides give as the lightest with 4.5 on white.
    assert contrast(luminance((118, 118, 118)), 1) == pytest.approx(4.54, abs=0.01)


def test_luminance_range_leaves_out_specks() -> None:
    pixels = np.full((20, 20, 3), 118, np.uint8)
    pixels[0, :5] = 255
    assert luminance_range(Image.fromarray(pixels)) == (pytest.approx(0.181, abs=1e-3),) * 2
    assert luminance_range(Image.fromarray(pixels), (0, 0, 5, 1)) == (pytest.approx(1),) * 2


@pytest.mark.parametrize(
    "options", [{"photos": 1.0}, {"photos": 0.0, "gradients": 1.0}, {"photos": 0.0, "gradients": 0.0}]
)
def test_ink_stands_out_from_every_background(painter: Painter, options: dict[str, float]) -> None:
    for _ in range(60):
        image = painter.background(painter.rng.randint(56, 224), painter.rng.randint(56, 224), **options)
        darkest, lightest = luminance_range(image)
        own = luminance(ink_for(darkest, lightest, painter.rng))
        assert min(contrast(own, darkest), contrast(own, lightest)) >= MIN_CONTRAST


def test_distance_in_the_space_of_the_eye() -> None:
    image = Image.new("RGB", (30, 20), (255, 255, 255))
    colours = np.array([[255, 255, 255], [0, 0, 0], [255, 0, 0]], np.uint8)
    # OKLab: black is 1 away from white; red is L 0.628, a 0.225, b 0.126.
    expected = [0, 1, np.hypot(1 - 0.628, np.hypot(0.225, 0.126))]
    assert distance(image, colours) == pytest.approx(expected, abs=2e-3)
    image.paste((0, 0, 0), (0, 0, 15, 20))
    assert distance(image, colours)[1] == pytest.approx(0, abs=2e-3)


@pytest.mark.parametrize("text", ["hello", "47", "two\nlines"])
def test_letters_are_cut_to_their_ink_and_fit(painter: Painter, text: str) -> None:
    face = painter.sources.face(painter.rng)
    for _ in range(20):
        size = painter.fitting(text, face, 100, 50, 8, 40)
        assert size is not None
        mask = painter.letters(text, face, size)
        assert mask.getbbox() == (0, 0, *mask.size)
        assert mask.width <= 102 and mask.height <= 52
    assert painter.fitting(text, face, 10, 50, 8, 40) is None
    turned = painter.letters(text, face, 30, 8)
    assert turned.height > painter.letters(text, face, 30).height


def test_paste_colours_the_mask_alone() -> None:
    image = Image.new("RGB", (10, 10))
    assert paste(image, Image.new("L", (3, 2), 255), (9, 8, 7), (4, 5)) == (4, 5, 7, 7)
    pixels = np.array(image)
    assert (pixels[5:7, 4:7] == (9, 8, 7)).all()
    pixels[5:7, 4:7] = 0
    assert not pixels.any()


def test_wear_keeps_size_and_what_is_seen(painter: Painter) -> None:
    image = Image.new("RGB", (61, 47), (200, 40, 40))
    worn = [painter.worn(image, 10) for _ in range(60)]
    assert {w.shape for w in worn} == {(47, 61, 3)} and {w.dtype for w in worn} == {np.dtype(np.uint8)}
    assert all(np.abs(w.mean((0, 1)) - (200, 40, 40)).max() < 4 for w in worn)
    # Noise of up to 9 in some, none in others.
    assert min(w.std((0, 1)).max() for w in worn) == 0 and 2 < max(w.std((0, 1)).max() for w in worn) < 12
