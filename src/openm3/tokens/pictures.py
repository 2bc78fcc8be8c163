"""Picture files to patches: decoded with Pillow, turned upright, made RGB over white, resized."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, WebPImagePlugin

from openm3.errors import PromptError
from openm3.tokens.media import Media
from openm3.tokens.pixels import IMAGE_BUDGETS, Detail, check_size_options, cut, resize, target_size
from openm3.tokens.sources import PICTURES, VIDEOS, MediaLimits, format_of, read_source, refusal

assert WebPImagePlugin.SUPPORTED, "this build of Pillow reads no WEBP"

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAX_ANIMATION = 10
"""An animation's frames together may have this many times the pixels of the largest picture."""


@dataclass(frozen=True)
class ImageOptions:
    """How large the model sees a picture. Raises PromptError for values that are not allowed.

    `detail` "low" gives at most 384 tokens, "default" 576 (the published processor's rule), "high" 16,384; a small
    picture is not enlarged for them. `max_long_side_pixel` (150 to 3,584), if given, decides instead.
    """

    detail: Detail = "default"
    max_long_side_pixel: int | None = None

    def __post_init__(self) -> None:
        check_size_options(self.detail, self.max_long_side_pixel)


def read_image(
    source: str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8],
    options: ImageOptions | None = None,
    *,
    limits: MediaLimits | None = None,
) -> Media:
    """A picture as the model takes it.

    `source` is a path or the bytes of a JPEG, PNG, GIF, WEBP or BMP file, a Pillow image, or an array [H, W], [H, W, 3]
    or [H, W, 4] of uint8 in RGB(A). EXIF rotation is applied, what is transparent becomes white, and of an animation
    the first frame counts (`read_video` takes all). Raises PromptError for anything that is not a whole picture within
    `limits`.
    """
    options, limits = options or ImageOptions(), limits or MediaLimits()
    if isinstance(source, np.ndarray):
        picture = _of_array(source)
    elif isinstance(source, Image.Image):
        picture = source
    else:
        picture = _opened(read_source(source, limits.image_bytes), limits)
    picture = _decoded(picture, limits)
    size = (picture.height, picture.width)
    height, width = target_size(size, IMAGE_BUDGETS[options.detail], options.max_long_side_pixel)
    frame_HWC = resize(picture, (height, width))
    return Media.of("image", cut(frame_HWC, frame_HWC), [(1, height // 14, width // 14)], size)


class Animation:
    """The frames of an animated GIF, WEBP or PNG: `seconds` when each appears, and the frames themselves.

    Raises PromptError, also while iterating, for a file that is damaged or exceeds `limits`.
    """

    def __init__(self, data: bytes, limits: MediaLimits) -> None:
        self._limits = limits
        self._data = data
        try:
            picture = _opened(data, limits)
            count = getattr(picture, "n_frames", 1)
            if count < 2:
                raise refusal(data, "a video", VIDEOS)
            pixels = count * picture.width * picture.height
            if count > limits.video_frames or pixels > _MAX_ANIMATION * limits.image_pixels:
                size = f"{picture.width}x{picture.height}"
                raise PromptError(f"the animation has too many frames: {count:,} of {size} pixels")
            self.seconds: list[float] = []
            self.duration = 0.0
            for i in range(count):
                picture.seek(i)
                if picture.format == "WEBP":
                    # Only then does Pillow know how long the frame stays.
                    picture.load()
                self.seconds.append(self.duration)
                # Browsers show frames that claim no time for a tenth of a second.
                self.duration += (picture.info.get("duration") or 100.0) / 1000
        except PromptError:
            raise
        except Exception as error:  # a decoder can fail in any way on such bytes
            raise _damaged(error) from None

    def frames(self, chosen: Sequence[int]) -> Iterator[tuple[float, Image.Image]]:
        """The chosen frames in ascending order with their times."""
        picture = _opened(self._data, self._limits)
        for i in chosen:
            try:
                picture.seek(i)
                picture.load()
                # A copy, since the next frame is drawn over this one.
                frame = _rgb(picture.copy())
            except Exception as error:
                raise _damaged(error) from None
            yield self.seconds[i], frame


def _opened(data: bytes, limits: MediaLimits) -> Image.Image:
    """The picture in `data`, its header read and within the limits, its pixels not yet decoded."""
    name = format_of(data)
    if name not in PICTURES:
        raise refusal(data, "a picture", PICTURES)
    try:
        picture = Image.open(io.BytesIO(data), formats=(name,))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PromptError(f"the picture has more than {limits.image_pixels:,} pixels") from None
    except UnidentifiedImageError:
        raise PromptError(f"the {name} picture is damaged or cut off: its header cannot be read") from None
    except Exception as error:
        raise _damaged(error) from None
    _check_pixels(picture, limits)
    return picture


def _decoded(picture: Image.Image, limits: MediaLimits) -> Image.Image:
    """The picture upright and in RGB."""
    _check_pixels(picture, limits)
    try:
        picture.load()
        rgb = _rgb(picture)
        # After `load`, since a PNG's EXIF may follow its pixels.
        turn = _UPRIGHT.get(_orientation(picture))
        return rgb if turn is None else rgb.transpose(turn)
    except Exception as error:
        raise _damaged(error) from None


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        # Grey of 16 bits, which Pillow would clip: scaled instead.
        grey = np.clip(np.asarray(picture).astype(np.int64), 0, 65_535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        white.alpha_composite(layer)
        return white.convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _orientation(picture: Image.Image) -> int:
    try:
        value = picture.getexif().get(_EXIF_ORIENTATION, 1)
        return value if isinstance(value, int) else 1
    except Exception:  # broken metadata spoils no picture
        return 1


def _of_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise PromptError(
            f"an array of a picture must be uint8 [H, W], [H, W, 3] or [H, W, 4], not {array.dtype} {list(array.shape)}"
        )
    if not array.size:
        raise PromptError("an array of a picture must not be empty")
    return Image.fromarray(np.ascontiguousarray(array))


def _check_pixels(picture: Image.Image, limits: MediaLimits) -> None:
    if picture.width * picture.height > limits.image_pixels:
        size = f"{picture.width}x{picture.height}"
        raise PromptError(f"the picture has {size} pixels, more than {limits.image_pixels:,} together")


def _damaged(error: Exception) -> PromptError:
    return PromptError(f"the picture is damaged or cut off: {error or type(error).__name__}")
