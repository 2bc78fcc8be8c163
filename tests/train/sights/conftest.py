"""What the tests of pictures share: a painter, and one whose pictures show nothing but what was drawn."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from openm3.train.sights.canvas import Painter
from openm3.train.sights.sources import Sources

Boxes = list[tuple[int, int, int, int]]


@pytest.fixture
def painter(drawing_sources: Sources) -> Painter:
    return Painter(drawing_sources, random.Random(0))


@pytest.fixture
def plain_painter(painter: Painter, monkeypatch: pytest.MonkeyPatch) -> Painter:
    """A painter on light grey, without wear: what is not (225, 225, 225) was drawn."""
    ground = (225, 225, 225)
    monkeypatch.setattr(Painter, "background", lambda self, w, h, **options: Image.new("RGB", (w, h), ground))
    monkeypatch.setattr(Painter, "worn", lambda self, image, finest: np.array(image))
    return painter


@pytest.fixture
def drawn_boxes() -> Callable[[NDArray[np.uint8]], Boxes]:
    """The boxes of all connected areas that differ from a picture's top left corner, from top to bottom."""

    def boxes(pixels: NDArray[np.uint8]) -> Boxes:
        left = {(int(y), int(x)) for y, x in np.argwhere((pixels != pixels[0, 0]).any(-1))}
        found = []
        while left:
            area, edge = set(), [left.pop()]
            while edge:
                y, x = edge.pop()
                area.add((y, x))
                near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
                left -= near
                edge += near
            rows, columns = zip(*area, strict=True)
            found.append((min(columns), min(rows), max(columns) + 1, max(rows) + 1))
        return sorted(found, key=lambda box: box[1])

    return boxes
