"""The published sizes, to the pixel, and the order of patches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from openm3.errors import PromptError
from openm3.tokens.pixels import (
    IMAGE_BUDGETS,
    VIDEO_BUDGETS,
    Budget,
    check_size_options,
    cut,
    cut_video,
    long_side_resize,
    patch_seconds,
    resize,
    smart_resize,
    target_size,
)


@pytest.mark.parametrize(
    ("size", "target"),
    [
        ((50, 50), (56, 56)),
        ((203, 317), (196, 308)),
        ((700, 1000), (560, 784)),
        ((672, 672), (672, 672)),
        ((2016, 2016), (672, 672)),
        ((4000, 3000), (756, 560)),
        # Halves go to the even multiple: 1.5, 2.5 and 3.5 times 28.
        ((42, 196), (56, 196)),
        ((70, 196), (56, 196)),
        ((98, 196), (112, 196)),
        ((1, 150), (28, 140)),
        ((1, 1), (56, 56)),
        ((1, 200), (28, 196)),
    ],
)
def test_smart_resize(size: tuple[int, int], target: tuple[int, int]) -> None:
    assert smart_resize(*size) == target
    assert smart_resize(*size[::-1]) == target[::-1]


@given(st.integers(1, 30_000), st.integers(1, 30_000), st.sampled_from([*IMAGE_BUDGETS.values(), Budget(58_800)]))
def test_smart_resize_keeps_its_bounds(height: int, width: int, budget: Budget) -> None:
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(PromptError, match="too long"):
            smart_resize(height, width)
        return
    sides = smart_resize(height, width, max_pixels=budget.each)
    assert all(side >= 28 and side % 28 == 0 for side in sides)
    # Only a sliver, which is never thinner than 28 pixels, may exceed the budget.
    assert sides[0] * sides[1] <= budget.each or min(sides) == 28
    assert sides[0] * sides[1] >= 3_136


@pytest.mark.parametrize(
    ("size", "long_side", "tokens"),
    [
        *[((2048, 2048), side, tokens) for side, tokens in ((252, 81), (504, 324), (1008, 1296))],
        *[((3000, 5000), side, tokens) for side, tokens in ((252, 45), (504, 198), (1008, 792))],
        ((500, 400), 1008, 252),
        # A short side under 112 grows to it, unless the long side had to shrink.
        ((50, 200), 1008, 64),
        ((100, 4000), 1008, 36),
    ],
)
def test_long_side_resize(size: tuple[int, int], long_side: int, tokens: int) -> None:
    height, width = long_side_resize(*size, long_side)
    assert height % 28 == width % 28 == 0
    assert height * width // 784 == tokens
    assert target_size(size, IMAGE_BUDGETS["low"], long_side) == (height, width)


@pytest.mark.parametrize(("detail", "tokens"), [("low", 384), ("default", 576), ("auto", 576), ("high", 16_384)])
def test_detail_tiers_bound_the_tokens_of_a_picture(detail: str, tokens: int) -> None:
    height, width = target_size((3000, 4000), IMAGE_BUDGETS[detail])
    assert tokens * 0.9 <= height * width // 784 <= tokens
    assert target_size((280, 420), IMAGE_BUDGETS[detail]) == (280, 420)


def test_videos_share_a_budget() -> None:
    def pixels(frames: int, detail: str = "default") -> int:
        height, width = target_size((720, 1280), VIDEO_BUDGETS[detail], None, frames)
        return height * width

    assert pixels(60) == 560 * 1008
    assert pixels(10, "low") == 280 * 504
    assert pixels(10, "high") == 728 * 1288
    assert 0.8 * 45_158_400 < 768 * pixels(768) <= 45_158_400
    assert 0.8 * 301_056_000 < 768 * pixels(768, "high") <= 301_056_000


def test_a_ceiling_stands_above_what_is_asked_for() -> None:
    assert target_size((1000, 1780), VIDEO_BUDGETS["default"], 2016, 100) == (1008, 1792)
    with pytest.raises(PromptError, match="768 frames of 1792x1008 have 1,387,266,048 pixels, more than 301,056,000"):
        target_size((1000, 1780), VIDEO_BUDGETS["default"], 2016, 768)
    assert target_size((3584, 3584), IMAGE_BUDGETS["default"], 3584) == (3584, 3584)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_empty_pictures_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(PromptError, match="is empty"):
        smart_resize(*size)
    with pytest.raises(PromptError, match="is empty"):
        long_side_resize(*size, 504)


@pytest.mark.parametrize(
    ("detail", "side", "word"),
    [
        ("huge", None, "detail must be one of low, default, auto, high, not 'huge'"),
        *[("low", side, "from 150 to 3584") for side in (149, 3585, 504.0, True, "504")],
    ],
)
def test_size_options_are_checked(detail: str, side: int | None, word: str) -> None:
    with pytest.raises(PromptError, match=word):
        check_size_options(detail, side)


def test_size_options_at_the_bounds() -> None:
    for side in (None, 150, 3584):
        check_size_options("high", side)


def test_cut_orders_patches_by_groups_of_four() -> None:
    rng = np.random.default_rng(0)
    pair = rng.integers(0, 256, (2, 56, 84, 3), dtype=np.uint8)
    expected = [
        [
            pair[t, 28 * row + 14 * i + y, 28 * column + 14 * j + x, c]
            for c in range(3)
            for t in range(2)
            for y in range(14)
            for x in range(14)
        ]
        for row in range(2)
        for column in range(3)
        for i in range(2)
        for j in range(2)
    ]
    patch_IC = cut(pair[0], pair[1])
    assert patch_IC.dtype == np.uint8
    assert np.array_equal(patch_IC, np.asarray(expected))


@pytest.mark.parametrize(
    ("num_frames", "temporal"), [(1, [1]), (2, [1]), (7, [4]), (8, [4]), (9, [4, 1]), (17, [4, 4, 1])]
)
def test_videos_are_cut_into_segments(num_frames: int, temporal: list[int]) -> None:
    frames = [np.full((28, 56, 3), number, np.uint8) for number in range(num_frames)]
    patch_IC, grids = cut_video(iter(frames))
    assert grids == [(t, 2, 4) for t in temporal]
    assert patch_IC.shape == (sum(temporal) * 8, 1176)
    # The last of an odd number stands twice.
    shown = patch_IC.reshape(-1, 8, 3, 2, 196)[:, 0, 0, :, 0].reshape(-1).tolist()
    assert shown == [min(number, num_frames - 1) for number in range(2 * sum(temporal))]
    assert patch_seconds([float(number) for number in range(num_frames)]) == shown[::2]


def test_resize_leaves_pictures_of_the_right_size_alone() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (28, 56, 3), dtype=np.uint8)
    assert np.array_equal(resize(Image.fromarray(picture), (28, 56)), picture)
    assert resize(Image.fromarray(picture), (56, 28)).shape == (56, 28, 3)
