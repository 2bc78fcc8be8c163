"""Videos to patches: which frames the model sees, how large, and when they were."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from openm3.errors import PromptError
from openm3.tokens.media import Media
from openm3.tokens.pictures import Animation
from openm3.tokens.pixels import (
    VIDEO_BUDGETS,
    Detail,
    check_size_options,
    cut_video,
    patch_seconds,
    resize,
    target_size,
)
from openm3.tokens.sources import VIDEOS, MediaLimits, format_of, read_source, refusal

_FPS = (0.2, 5.0)
_MAX_FRAMES = 768
# Containers round times to milliseconds, and a frame a little early is the one that was meant.
_EARLY = 2e-3


@dataclass(frozen=True)
class VideoOptions:
    """Which frames of a video the model sees, and how large. Raises PromptError for values that are not allowed.

    `fps` frames a second (0.2 to 5); of a short video at least `min_frames` or all there are, of a long one at most
    `max_frames` (768 at most), spread evenly. Frames have at most 602,112 pixels, 150,528 with `detail` "low",
    2,408,448 with "high"; all together at most 45,158,400, with "high" 301,056,000, so that more frames are smaller
    ones. `max_long_side_pixel` (150 to 3,584), if given, decides the size instead.
    """

    fps: float = 1.0
    detail: Detail = "default"
    max_long_side_pixel: int | None = None
    min_frames: int = 4
    max_frames: int = _MAX_FRAMES

    def __post_init__(self) -> None:
        check_size_options(self.detail, self.max_long_side_pixel)
        is_number = isinstance(self.fps, int | float) and not isinstance(self.fps, bool)
        if not (is_number and _FPS[0] <= self.fps <= _FPS[1]):
            raise PromptError(f"fps must be a number from {_FPS[0]} to {_FPS[1]:g}, not {self.fps!r}")
        counts = (self.min_frames, self.max_frames)
        if not all(isinstance(count, int) and 1 <= count <= _MAX_FRAMES for count in counts) or counts[0] > counts[1]:
            raise PromptError(f"min_frames and max_frames must be 1 to {_MAX_FRAMES}, in this order, not {counts}")


def read_video(
    source: str | os.PathLike[str] | bytes,
    options: VideoOptions | None = None,
    *,
    limits: MediaLimits | None = None,
) -> Media:
    """A video as the model takes it.

    `source` is a path or the bytes of an MP4, MOV, Matroska (WebM) or AVI file, or of an animated GIF, WEBP or PNG.
    Frames are chosen by the time they are shown, not by number, and turned upright; `Media.seconds` counts from the
    first frame. Of a file that was cut off the part that is there counts. Raises PromptError for anything that is no
    video within `limits`, or of which no frame can be decoded.
    """
    options, limits = options or VideoOptions(), limits or MediaLimits()
    data = read_source(source, limits.video_bytes)
    name = format_of(data)
    if name in ("GIF", "WEBP", "PNG"):
        animation = Animation(data, limits)
        chosen = sampled(animation.seconds, animation.duration, options)
        return _made(animation.frames(chosen), len(chosen), options)
    if name not in VIDEOS:
        raise refusal(data, "a video", VIDEOS)
    # Only here: loading FFmpeg's libraries takes time that users of text and pictures need not spend.
    from openm3.tokens.video_file import VideoFile

    with VideoFile(data, name, limits) as file:
        chosen = sampled(file.seconds, file.duration, options)
        return _made(file.frames(chosen), len(chosen), options)


def video_from_frames(
    frames: NDArray[np.uint8] | Sequence[NDArray[np.uint8]],
    seconds: Sequence[float] | None = None,
    options: VideoOptions | None = None,
) -> Media:
    """A video of frames that are chosen already, [frames, H, W, 3] uint8 in RGB, resized as in `read_video`.

    `seconds` says when each was; without it the model is not told. Of the options only those of size count. Raises
    PromptError for anything else, and for more than 768 frames.
    """
    frames = list(frames)
    if not 1 <= len(frames) <= _MAX_FRAMES:
        raise PromptError(f"a video has 1 to {_MAX_FRAMES} frames, not {len(frames)}")
    shape = np.shape(frames[0])
    if len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise PromptError(f"frames must be [H, W, 3], not {list(shape)}")
    for frame in frames:
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.shape != shape:
            raise PromptError("frames must be arrays of uint8, all of the same shape")
    if seconds is not None:
        seconds = [float(second) for second in seconds]
        if len(seconds) != len(frames) or not all(map(math.isfinite, seconds)) or min(seconds) < 0:
            raise PromptError(f"seconds must be {len(frames)} times from 0 on, one a frame")
        if sorted(seconds) != seconds:
            raise PromptError("seconds must ascend")
    pictures = (Image.fromarray(np.ascontiguousarray(frame)) for frame in frames)
    media = _made(((0.0, picture) for picture in pictures), len(frames), options or VideoOptions())
    times = None if seconds is None else tuple(patch_seconds(seconds))
    return replace(media, seconds=times)


def sampled(seconds: Sequence[float], duration: float, options: VideoOptions) -> list[int]:
    """Which frames the model sees, of frames that appear at these ascending times in a video of this duration.

    For every point of an even grid from 0 the first frame from then on, else the last; none twice. If these are fewer
    than `min_frames`, so many spread evenly over all frames.
    """
    wanted = max(1, math.ceil(duration * options.fps - _EARLY))
    count = min(options.max_frames, wanted)
    step = 1 / options.fps if count == wanted else duration / count
    place_N = np.searchsorted(np.asarray(seconds), np.arange(count) * step - _EARLY)
    chosen = np.unique(np.minimum(place_N, len(seconds) - 1))
    fewest = min(options.min_frames, len(seconds))
    if len(chosen) < fewest:
        chosen = np.arange(fewest) * len(seconds) // fewest
    return [int(i) for i in chosen]


def _made(shown: Iterable[tuple[float, Image.Image]], num_frames: int, options: VideoOptions) -> Media:
    """Media of upright RGB frames with their times; `num_frames` are expected, fewer may come."""
    times: list[float] = []
    given: list[tuple[int, int]] = []

    def resized() -> Iterator[NDArray[np.uint8]]:
        for second, picture in shown:
            if not given:
                given.append((picture.height, picture.width))
                target = target_size(given[0], VIDEO_BUDGETS[options.detail], options.max_long_side_pixel, num_frames)
            times.append(second)
            yield resize(picture, target)

    patch_IC, grids = cut_video(resized())
    return Media.of("video", patch_IC, grids, given[0], patch_seconds(times))
