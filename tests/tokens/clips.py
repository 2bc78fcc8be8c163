"""Clips whose frames say their own number, written with PyAV."""

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray


def numbered_frame(number: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """A red top left and a blue top right quarter; below, the number in eight black or white bars."""
    height, width = size
    frame_HWC = np.zeros((height, width, 3), np.uint8)
    frame_HWC[: height // 2, : width // 2] = (255, 0, 0)
    frame_HWC[: height // 2, width // 2 :] = (0, 0, 255)
    for bit in range(8):
        frame_HWC[height // 2 :, bit * width // 8 : (bit + 1) * width // 8] = 255 * (number >> bit & 1)
    return frame_HWC


def make_clip(
    milliseconds: Sequence[int],
    *,
    container: str = "mp4",
    codec: str = "libx264",
    size: tuple[int, int] = (48, 64),
    rotation: int = 0,
    options: dict[str, str] | None = None,
) -> bytes:
    """A clip with frames at these milliseconds."""
    target = io.BytesIO()
    with av.open(target, "w", format=container) as file:
        # AVI has no times, only a rate.
        constant = container == "avi"
        rate = Fraction(1000, milliseconds[1] - milliseconds[0]) if constant else Fraction(1000)
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        for number, millisecond in enumerate(milliseconds):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, size), format="rgb24")
            frame.pts, frame.time_base = (number, 1 / rate) if constant else (millisecond, Fraction(1, 1000))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return target.getvalue()
