"""One frame differs, at the second that the answer says."""

import re

import numpy as np
import pytest

from openm3.train.sights import videos
from openm3.train.sights.canvas import Painter
from openm3.train.sights.videos import MAX_FRAMES, MIN_FRAMES, minute, video, video_number, when_text


@pytest.fixture
def steady(plain_painter: Painter, monkeypatch: pytest.MonkeyPatch) -> Painter:
    """A painter whose frames neither flicker nor are noisy."""
    monkeypatch.setattr(videos, "_filmed", lambda painter, images: [np.array(image) for image in images])
    return plain_painter


def test_the_frame_asked_for_is_like_no_other(steady: Painter) -> None:
    alone = 0
    for _ in range(30):
        sight = video(steady)
        assert sight.at is not None and sight.answer == when_text(int(sight.at)) and sight.spelled == str(int(sight.at))
        same = [np.array_equal(frame, sight.frames[int(sight.at)]) for frame in sight.frames]
        assert sum(same) == 1
        others = {frame.tobytes() for frame in sight.frames} - {sight.frames[int(sight.at)].tobytes()}
        assert 1 <= len(others) <= 3
        alone += len(others) == 1
    # With nothing else to see in half of them, and other things in the rest.
    assert 5 < alone < 28


def test_times_and_sizes(painter: Painter) -> None:
    for _ in range(10):
        sight = video(painter)
        assert MIN_FRAMES <= len(sight.frames) <= MAX_FRAMES
        assert sight.seconds == list(range(len(sight.frames)))
        assert {f.shape for f in sight.frames} == {sight.frames[0].shape}
        assert {side % 28 for side in sight.frames[0].shape[:2]} == {0}
        assert sum(f.shape[0] * f.shape[1] for f in sight.frames) <= MAX_FRAMES * 84 * 84
    sight = minute(painter)
    assert len(sight.frames) == 60 and sight.kind == "minute"


def test_the_number_of_a_video_is_the_only_one(steady: Painter) -> None:
    for _ in range(10):
        sight = video_number(steady)
        assert sight.at is not None and re.fullmatch(r"The number is \d{1,3}\.", sight.answer)
        assert len({frame.tobytes() for frame in sight.frames}) == 2


def test_when_text() -> None:
    assert [when_text(n) for n in (0, 1, 12)] == ["At 0 seconds.", "At 1 second.", "At 12 seconds."]


def test_film_flickers_and_is_noisy_at_times(painter: Painter) -> None:
    from PIL import Image

    image = Image.new("RGB", (28, 28), (100, 120, 140))
    spreads = []
    for _ in range(40):
        frames = videos._filmed(painter, [image] * 6)
        assert all(np.abs(f.mean((0, 1)) - (100, 120, 140)).max() < 12 for f in frames)
        spreads.append((max(f.std() for f in frames), np.std([f.mean() for f in frames])))
    assert len({bool(flicker > 0.5) for _, flicker in spreads}) == 2
