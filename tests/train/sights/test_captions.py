"""Clip art is named for what it shows."""

from dataclasses import replace

import numpy as np
import pytest

from openm3.errors import DocumentError
from openm3.train.sights.canvas import Painter
from openm3.train.sights.captions import caption


def test_clip_art_lies_in_its_box(painter: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Painter, "worn", lambda self, image, finest: np.array(image))
    for _ in range(10):
        sight = caption(painter)
        assert sight.answer == "It shows a ball." and sight.spelled is None
        left, top, right, bottom = sight.target or (0, 0, 0, 0)
        pixels = sight.frames[0].copy()
        # The disc fills the box: its transparent margin was cut off.
        assert (pixels[(top + bottom) // 2, (left + right) // 2] == (200, 30, 30)).all()
        assert right - left == bottom - top
        pixels[top:bottom, left:right] = pixels[0, 0]
        assert (pixels == pixels[0, 0]).all()


def test_vowels_take_an(painter: Painter) -> None:
    path, _ = painter.sources.clip_art[0]
    other = Painter(replace(painter.sources, clip_art=[(path, "apple")]), painter.rng)
    assert caption(other).answer == "It shows an apple."


def test_without_clip_art(painter: Painter) -> None:
    with pytest.raises(DocumentError, match=r"docs/sights.md"):
        caption(Painter(replace(painter.sources, clip_art=[]), painter.rng))
