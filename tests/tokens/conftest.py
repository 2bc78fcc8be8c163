"""Media that tests make: clips whose frames say their own number, written with PyAV."""

import io
from collections.abc import Callable, Sequence
from fractions import Fraction

import av
import numpy as np
import pytest
from numpy.typing import NDArray

ClipMaker = Callable[..., bytes]


def numbered_frame(number: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Grey that grows with the number, a red top left and a blue top right quarter."""
    height, width = size
    frame_HWC = np.full((height, width, 3), 20 + 3 * number, np.uint8)
    frame_HWC[: height // 2, : width // 2] = (255, 0, 0)
    frame_HWC[: height // 2, width // 2 :] = (0, 0, 255)
    return frame_HWC


def number_of(frame_HWC: NDArray[np.uint8]) -> int:
    """The number of a decoded `numbered_frame`, from its lower half."""
    return round((float(frame_HWC[-frame_HWC.shape[0] // 4 :].mean()) - 20) / 3)


@pytest.fixture(scope="session")
def make_clip() -> ClipMaker:
    """Makes the bytes of a clip with frames at these milliseconds."""

    def make(
        milliseconds: Sequence[int],
        *,
        container: str = "mp4",
        codec: str = "libx264",
        size: tuple[int, int] = (48, 64),
        rotation: int = 0,
        options: dict[str, str] | None = None,
    ) -> bytes:
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

    return make
