"""One picture or short video with a question and its one right answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Sight:
    """Frames to look at, a question about them, and the answer in the one form of its kind.

    `frames` are [H, W, 3] uint8 in RGB: one for a picture, else one for each of `seconds`. `spelled` is a part of the
    answer that a model shall write one character at a time. `target` is the box (left, top, right, bottom; in pixels,
    right and bottom exclusive) of what a question asks to point at or to read, and `at` the second that it asks for.
    `shown` says what is where as far as it is known, also of what nobody asks for: glyphs, and names of shapes and
    colours, with their boxes.
    """

    frames: list[NDArray[np.uint8]]
    seconds: list[float] | None
    question: str
    answer: str
    spelled: str | None
    kind: str
    target: tuple[int, int, int, int] | None = None
    at: float | None = None
    shown: tuple[tuple[str, tuple[int, int, int, int]], ...] = ()


def point_text(box: tuple[int, int, int, int], width: int, height: int) -> str:
    """The middle of a box as "37, 62": hundredths from the left and from the top, two digits each, 00 to 99."""
    x = 50 * (box[0] + box[2]) // width
    y = 50 * (box[1] + box[3]) // height
    return f"{min(x, 99):02d}, {min(y, 99):02d}"
