"""Which frames of a video the model sees, when they were, and how they are cut."""

import io
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

from openm3 import Media, MediaLimits, VideoOptions, read_video, video_from_frames
from openm3.errors import PromptError
from openm3.tokens.video import sampled
from tests.tokens.clips import make_clip, numbered_frame

GOLDEN = Path(__file__).parents[1] / "golden" / "m3-random-s0" / "golden"
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def frames_of(media: Media) -> NDArray[np.uint8]:
    """The frames [frames, H, W, 3] back from the patches, the repeated last one too."""
    assert media.kind == "video"
    h, w = media.grids[0][1:]
    t = sum(grid[0] for grid in media.grids)
    patch = media.patch_IC.reshape(t, h // 2, w // 2, 2, 2, 3, 2, 14, 14)
    return patch.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(2 * t, 14 * h, 14 * w, 3)


def numbers(media: Media) -> list[int]:
    """Which frames of a made clip these are: the bars in their lower half say it."""
    frames = frames_of(media)
    row, bars = frames.shape[1] * 3 // 4, [(2 * bit + 1) * frames.shape[2] // 16 for bit in range(8)]
    return [sum(int(frame[row, bar].mean() > 127) << bit for bit, bar in enumerate(bars)) for frame in frames]


def steady(num_frames: int, fps: int = 10) -> list[int]:
    return [1000 * i // fps for i in range(num_frames)]


@pytest.mark.parametrize("case", ["video", "video_resized"])
def test_recorded_pixel_values(case: str) -> None:
    recorded = load_file(GOLDEN / f"{case}.safetensors")
    frames = recorded["video_u8"]
    media = video_from_frames(frames, [i / 2 for i in range(len(frames))])
    assert media.grids == tuple(map(tuple, recorded["video_grid_thw"].tolist()))
    assert media.seconds == tuple(float(i) for i in range((len(frames) + 1) // 2))
    assert media.size == frames.shape[1:3]
    scaled = recorded["pixel_values_videos"].reshape(-1, 3, 392) * np.array(STD)[:, None] + np.array(MEAN)[:, None]
    difference = np.abs(media.patch_IC / 255 - scaled.reshape(-1, 1176))
    assert difference.max() < 2.001 / 255
    assert difference.mean() < 1e-4


@pytest.mark.parametrize(
    ("seconds", "duration", "options", "chosen"),
    [
        # Ten frames a second for five seconds, one taken a second.
        ([i / 10 for i in range(50)], 5.0, {}, [0, 10, 20, 30, 40]),
        ([i / 10 for i in range(50)], 5.0, {"fps": 2}, list(range(0, 50, 5))),
        ([i / 10 for i in range(51)], 5.1, {}, [0, 10, 20, 30, 40, 50]),
        # Too few: at least four, spread evenly, or all there are.
        ([i / 10 for i in range(20)], 2.0, {}, [0, 5, 10, 15]),
        ([0.0, 0.5], 1.0, {}, [0, 1]),
        ([0.0], 0.0, {}, [0]),
        ([i / 10 for i in range(20)], 2.0, {"min_frames": 1}, [0, 10]),
        # Too many: at most so many, spread evenly.
        ([i / 10 for i in range(100)], 10.0, {"max_frames": 5}, [0, 20, 40, 60, 80]),
        # 29.97 frames a second do not drift away.
        ([i / 29.97 for i in range(1200)], 1200 / 29.97, {}, [int(np.ceil((k - 2e-3) * 29.97)) for k in range(41)]),
        # Milliseconds rounded down.
        ([0.0, 0.333, 0.666, 0.999, 1.333, 1.666, 1.999], 2.333, {"min_frames": 1}, [0, 3, 6]),
        # A picture that stays for long is taken once, and time goes on by the clock.
        ([0.0, 0.1, 7.0, 7.1, 7.2, 8.3], 8.4, {}, [0, 1, 3, 4]),
        ([0.0, 0.1, 7.0, 7.1, 7.2, 8.3], 8.4, {"min_frames": 1}, [0, 2, 5]),
        # Also the last, if nothing comes after it.
        ([0.0, 2.0], 4.0, {"fps": 0.3, "min_frames": 1}, [0, 1]),
    ],
)
def test_sampling(seconds: list[float], duration: float, options: dict[str, Any], chosen: list[int]) -> None:
    assert sampled(seconds, duration, VideoOptions(**options)) == chosen


@given(
    st.lists(st.floats(0.01, 3), min_size=1, max_size=200),
    st.floats(0.2, 5),
    st.integers(1, 8),
    st.integers(8, 40),
)
def test_sampling_keeps_its_bounds(gaps: list[float], fps: float, fewest: int, most: int) -> None:
    seconds = list(np.cumsum([0.0, *gaps]))
    options = VideoOptions(fps=fps, min_frames=fewest, max_frames=most)
    chosen = sampled(seconds, seconds[-1] + gaps[-1], options)
    assert chosen == sorted(set(chosen))
    assert chosen[0] == 0
    assert min(fewest, len(seconds)) <= len(chosen) <= min(most, len(seconds))


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("mp4", "libx264"),
        ("mov", "mpeg4"),
        ("matroska", "libx264"),
        ("webm", "libvpx-vp9"),
        ("avi", "mpeg4"),
        ("avi", "mjpeg"),
        ("avi", "libx264"),
        ("mp4", "libx265"),
    ],
)
def test_every_container_gives_the_same_frames(container: str, codec: str) -> None:
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    media = read_video(make_clip(steady(45), container=container, codec=codec, options=options))
    assert media.size == (48, 64)
    assert media.grids == ((3, 4, 4),)
    assert numbers(media) == [0, 10, 20, 30, 40, 40]
    assert media.seconds == pytest.approx((0, 2, 4), abs=1e-3)


def test_sparse_decoding_gives_the_pixels_of_full_decoding() -> None:
    clip = make_clip(steady(60), options={"g": "7", "bf": "3"})
    full = frames_of(read_video(clip, VideoOptions(fps=5)))
    assert len(full) == 30
    for fps, step in ((1.0, 5), (0.5, 10)):
        assert np.array_equal(frames_of(read_video(clip, VideoOptions(fps=fps, min_frames=1)))[:3], full[::step][:3])


def test_variable_frame_rates_go_by_the_clock() -> None:
    times = [0, 40, 80, 120, 3000, 3040, 3080, 4010, 9000, 9500]
    media = read_video(make_clip(times), VideoOptions(min_frames=1))
    assert numbers(media) == [0, 4, 7, 8, 9, 9]
    assert media.seconds == pytest.approx((0, 4.01, 9.5))


def test_times_count_from_the_first_frame() -> None:
    media = read_video(make_clip([5000 + time for time in steady(45)], container="matroska"))
    assert media.seconds == pytest.approx((0, 2, 4), abs=1e-3)


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
def test_rotated_streams_are_turned_upright(rotation: int) -> None:
    media = read_video(make_clip(steady(4), rotation=rotation))
    turned = rotation % 180 != 0
    assert media.size == ((64, 48) if turned else (48, 64))
    frame = frames_of(media)[0]
    height, width = frame.shape[:2]
    colours = [frame[y, x].argmax() for y in (5, height - 6) for x in (5, width - 6)]
    dark = [int(np.ptp(frame[y, x])) < 40 for y in (5, height - 6) for x in (5, width - 6)]
    # Stored: red top left, blue top right, black below; turned counterclockwise by the rotation.
    expected = {
        0: ["red", "blue", "black", "black"],
        90: ["blue", "black", "red", "black"],
        180: ["black", "black", "blue", "red"],
        -90: ["black", "red", "black", "blue"],
    }[rotation]
    found = ["black" if is_dark else {0: "red", 2: "blue"}[int(c)] for c, is_dark in zip(colours, dark, strict=True)]
    assert found == expected


@pytest.mark.parametrize("container", ["matroska", "avi", "mp4"])
def test_of_a_file_that_was_cut_off_the_rest_counts(container: str) -> None:
    codec = "mpeg4" if container == "avi" else "libx264"
    clip = make_clip(steady(60), container=container, codec=codec, options={"g": "10"})
    if container == "mp4":
        # Its index stands at the end: without it nothing can be read, so cut the samples instead.
        with pytest.raises(PromptError, match="damaged or was cut off"):
            read_video(clip[: len(clip) // 2])
        start, size = clip.index(b"mdat") + 4, clip.index(b"moov") - clip.index(b"mdat") - 8
        clip = clip[: start + size // 2] + bytes(size - size // 2) + clip[start + size :]
    else:
        clip = clip[: len(clip) * 3 // 4]
    media = read_video(clip, VideoOptions(min_frames=1))
    shown = numbers(media)
    assert shown[0] == 0
    assert 1 < len(set(shown)) < 6
    assert media.seconds == pytest.approx([number / 10 for number in shown[::2]], abs=1e-3)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animations_are_videos_when_asked(form: str) -> None:
    frames = [Image.fromarray(numbered_frame(i, (84, 56))) for i in range(30)]
    target = io.BytesIO()
    frames[0].save(target, form, save_all=True, append_images=frames[1:], duration=200, lossless=True)
    media = read_video(target.getvalue())
    assert media.size == (84, 56)
    assert numbers(media) == [0, 5, 10, 15, 20, 25]
    assert media.seconds == pytest.approx((0, 2, 4))


def test_options_decide_number_and_size() -> None:
    clip = make_clip(steady(45), size=(480, 640))
    assert read_video(clip).grids == ((3, 34, 46),)
    assert read_video(clip, VideoOptions(detail="low")).grids == ((3, 24, 32),)
    assert read_video(clip, VideoOptions(detail="high", fps=2)).grids == ((4, 34, 46), (1, 34, 46))
    assert read_video(clip, VideoOptions(max_long_side_pixel=252)).grids == ((3, 14, 18),)
    assert numbers(read_video(clip, VideoOptions(max_frames=4))) == [0, 12, 23, 34]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        *[({"fps": fps}, "fps must be a number from 0.2 to 5") for fps in (0, 0.1, 100, "1", True, float("nan"))],
        *[({"max_frames": count}, "1 to 768") for count in (0, 769, 3, 5.0)],
        ({"min_frames": 0}, "1 to 768"),
        ({"detail": "ultra"}, "detail must be one of"),
        ({"max_long_side_pixel": 10**9}, "max_long_side_pixel must be"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(PromptError, match=word):
        VideoOptions(**options)


def test_frames_without_times() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 56, 84, 3), dtype=np.uint8)
    media = video_from_frames(list(frames))
    assert media.seconds is None
    assert np.array_equal(frames_of(media), np.concatenate([frames, frames[-1:]]))
    assert video_from_frames(frames, [0.5, 1.5, 9]).seconds == (0.5, 9.0)
    assert video_from_frames(frames, [0.5, 1.5, 9]).digest == media.digest
    assert video_from_frames(frames[:2]).digest != media.digest


def frame(*shape: int, dtype: Any = np.uint8) -> NDArray[Any]:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("frames", "seconds", "word"),
    [
        ([], None, "1 to 768 frames, not 0"),
        ([frame(28, 28, 3)] * 769, None, "1 to 768 frames, not 769"),
        ([frame(28, 28)], None, "frames must be \\[H, W, 3\\], not \\[28, 28\\]"),
        ([frame(0, 28, 3)], None, "frames must be"),
        ([frame(28, 28, 3), frame(28, 56, 3)], None, "all of the same shape"),
        ([frame(28, 28, 3, dtype=np.float32)], None, "arrays of uint8"),
        ([frame(28, 28, 3)], [0, 1], "1 times from 0 on"),
        ([frame(28, 28, 3)], [-1], "from 0 on"),
        ([frame(28, 28, 3)], [float("inf")], "from 0 on"),
        ([frame(28, 28, 3)] * 2, [1, 0], "must ascend"),
        ([frame(28, 5_700, 3)], None, "too long"),
    ],
)
def test_bad_frames_are_refused(frames: Sequence[NDArray[Any]], seconds: list[float] | None, word: str) -> None:
    with pytest.raises(PromptError, match=word):
        video_from_frames(frames, seconds)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"<!doctype html>", "the file is HTML, not a video: expected MP4, MOV, Matroska or AVI"),
        (b"\xff\xd8\xff", "a picture \\(JPEG\\), not a video"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd", "a playlist, not a video"),
        (b"ffconcat version 1.0\nfile /etc/passwd", "the file is text, not a video"),
        (b"\0\0\0\x20ftypisom" + bytes(100), "damaged or was cut off"),
        (b"\x1a\x45\xdf\xa3" + bytes(100), "damaged or was cut off"),
        (b"RIFF\0\0\0\0AVI LIST", "damaged or was cut off"),
        (b"", "empty"),
    ],
)
def test_what_is_no_video_is_refused(data: bytes, word: str) -> None:
    with pytest.raises(PromptError, match=word):
        read_video(data)


def test_a_still_picture_is_no_video() -> None:
    target = io.BytesIO()
    Image.new("RGB", (56, 56)).save(target, "PNG")
    with pytest.raises(PromptError, match="a picture \\(PNG\\), not a video"):
        read_video(target.getvalue())


def test_files_are_read_within_limits(tmp_path: Path) -> None:
    file = tmp_path / "clip.png"
    file.write_bytes(make_clip(steady(20)))
    assert numbers(read_video(file)) == [0, 5, 10, 15]
    with pytest.raises(PromptError, match="larger than 100 bytes"):
        read_video(file, limits=MediaLimits(video_bytes=100))


def test_text_and_pictures_do_without_ffmpeg() -> None:
    code = "import sys, openm3; openm3.read_image, openm3.read_video; print('av' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
