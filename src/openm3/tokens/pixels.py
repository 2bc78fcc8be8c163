"""Frames to patches: how large a picture becomes, resizing, cutting. Knows no file formats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from openm3.errors import PromptError

PATCH = 14
"""Side of a patch in pixels."""
MERGE = 2
"""Patches a side that become one token."""
TEMPORAL = 2
"""Frames of a patch."""
SEGMENT = 4
"""Temporal patches that the vision tower sees together."""

_FACTOR = PATCH * MERGE
_MAX_ASPECT = 200
_MIN_SHORT_SIDE = 112
_MIN_PIXELS = 3_136
_LONG_SIDES = range(150, 3_584 + 1)

Detail = Literal["low", "default", "auto", "high"]


@dataclass(frozen=True)
class Budget:
    """How large pictures or frames may become: the pixels of each, and of all frames of a video together."""

    each: int
    together: int = 12_845_056


# "default" is the published processor's rule; the others, where none is published, are built around it from what the
# hosted model is documented to take. A token is 28x28 pixels, of two frames in a video. "auto" is OpenAI's name.
_IMAGE = {"low": Budget(301_056), "default": Budget(451_584)}
IMAGE_BUDGETS = {**_IMAGE, "auto": _IMAGE["default"], "high": Budget(12_845_056)}
"""Of pictures: at most 384, 576 and 16,384 tokens."""

_VIDEO = {"low": Budget(150_528, 45_158_400), "default": Budget(602_112, 45_158_400)}
VIDEO_BUDGETS = {**_VIDEO, "auto": _VIDEO["default"], "high": Budget(2_408_448, 301_056_000)}
"""Of videos: frames of about 504, 1008 and 2016 pixels on the long side at 16:9."""

MAX_PIXELS = {"image": 12_845_056, "video": 301_056_000}
"""No picture, and no video's frames together, may have more pixels once resized, whatever was asked for."""


def check_size_options(detail: str, max_long_side_pixel: int | None) -> None:
    """Raise PromptError unless these are a known detail tier and a long side within 150 to 3,584 pixels."""
    if detail not in IMAGE_BUDGETS:
        raise PromptError(f"detail must be one of {', '.join(IMAGE_BUDGETS)}, not {detail!r}")
    is_whole = isinstance(max_long_side_pixel, int) and not isinstance(max_long_side_pixel, bool)
    if max_long_side_pixel is not None and not (is_whole and max_long_side_pixel in _LONG_SIDES):
        raise PromptError(
            f"max_long_side_pixel must be a whole number from {_LONG_SIDES[0]} to {_LONG_SIDES[-1]}, "
            f"not {max_long_side_pixel!r}"
        )


def target_size(
    size: tuple[int, int], budget: Budget, max_long_side_pixel: int | None = None, num_frames: int | None = None
) -> tuple[int, int]:
    """Height and width that a picture, or each of `num_frames` frames, is resized to.

    `max_long_side_pixel`, if given, decides alone; else the budget does. Raises PromptError for a picture more than
    200 times as long as wide, and for more pixels than MAX_PIXELS.
    """
    if max_long_side_pixel is None:
        share = max(_MIN_PIXELS, min(budget.each, budget.together // (num_frames or 1)))
        height, width = smart_resize(*size, max_pixels=share)
    else:
        height, width = long_side_resize(*size, max_long_side_pixel)
    ceiling = MAX_PIXELS["video" if num_frames else "image"]
    if (pixels := height * width * (num_frames or 1)) > ceiling:
        what = f"{num_frames} frames of {width}x{height}" if num_frames else f"a picture of {width}x{height}"
        raise PromptError(f"{what} have {pixels:,} pixels, more than {ceiling:,}: ask for fewer frames or smaller ones")
    return height, width


def smart_resize(
    height: int, width: int, *, min_pixels: int = _MIN_PIXELS, max_pixels: int = IMAGE_BUDGETS["default"].each
) -> tuple[int, int]:
    """The published rule: both sides to the nearest multiple of 28, the area into the bounds, the aspect about kept.

    Halves round to even. Raises PromptError for an aspect over 200 and for an empty picture.
    """
    _check_aspect(height, width)
    new_height, new_width = _nearest(height), _nearest(width)
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        # The published rule has no floor of 28 here: there a sliver becomes empty, and is refused, under small budgets.
        new_height = max(_FACTOR, math.floor(height / shrink / _FACTOR) * _FACTOR)
        new_width = max(_FACTOR, math.floor(width / shrink / _FACTOR) * _FACTOR)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / _FACTOR) * _FACTOR
        new_width = math.ceil(width * grow / _FACTOR) * _FACTOR
    return new_height, new_width


def long_side_resize(height: int, width: int, max_long_side_pixel: int) -> tuple[int, int]:
    """The published opt-in rule: a longer long side shrinks to this; else a short side under 112 grows to that.

    Then both sides go to the nearest multiple of 28. Raises PromptError as `smart_resize` does.
    """
    _check_aspect(height, width)
    scale = 1.0
    if max(height, width) > max_long_side_pixel:
        scale = max_long_side_pixel / max(height, width)
    elif min(height, width) < _MIN_SHORT_SIDE:
        scale = _MIN_SHORT_SIDE / min(height, width)
    return _nearest(height * scale), _nearest(width * scale)


def resize(picture: Image.Image, size: tuple[int, int]) -> NDArray[np.uint8]:
    """An RGB picture as [height, width, 3] of `size`: bicubic with antialiasing, in whole numbers as published."""
    height, width = size
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture)


def cut(first_HWC: NDArray[np.uint8], second_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The patches [I, 3*2*14*14] of a pair of frames [H, W, 3] whose sides are multiples of 28, rows as in `Media`."""
    rows, columns = first_HWC.shape[0] // _FACTOR, first_HWC.shape[1] // _FACTOR
    patch = np.empty((rows, columns, MERGE, MERGE, 3, TEMPORAL, PATCH, PATCH), np.uint8)
    for i, frame_HWC in enumerate((first_HWC, second_HWC)):
        tiles = frame_HWC.reshape(rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
        patch[:, :, :, :, :, i] = tiles.transpose(0, 3, 1, 4, 6, 2, 5)
    return patch.reshape(-1, 3 * TEMPORAL * PATCH * PATCH)


def cut_video(frames: Iterable[NDArray[np.uint8]]) -> tuple[NDArray[np.uint8], list[tuple[int, int, int]]]:
    """Patches and grids of one or more frames of the same size; of an odd number the last is repeated."""
    pairs: list[NDArray[np.uint8]] = []
    first: NDArray[np.uint8] | None = None
    shape = (0, 0)
    for frame_HWC in frames:
        shape = (frame_HWC.shape[0] // PATCH, frame_HWC.shape[1] // PATCH)
        if first is None:
            first = frame_HWC
        else:
            pairs.append(cut(first, frame_HWC))
            first = None
    if first is not None:
        pairs.append(cut(first, first))
    grids = [(min(SEGMENT, len(pairs) - start), *shape) for start in range(0, len(pairs), SEGMENT)]
    return np.concatenate(pairs), grids


def patch_seconds(seconds: Sequence[float]) -> list[float]:
    """Times of the temporal patches of frames at these times."""
    return list(seconds[::TEMPORAL])


def _nearest(side: float) -> int:
    return max(_FACTOR, round(side / _FACTOR) * _FACTOR)


def _check_aspect(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise PromptError(f"a picture of {width}x{height} pixels is empty")
    if max(height, width) / min(height, width) > _MAX_ASPECT:
        raise PromptError(f"a picture of {width}x{height} pixels is too long: one side may be {_MAX_ASPECT}x the other")
