"""Pictures of every kind become the right pixels; anything else is refused with a sentence."""

import io
import json
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file

import openm3
from openm3 import ImageOptions, Media, MediaLimits, read_image
from openm3.errors import PromptError
from openm3.tokens.pictures import Animation
from openm3.tokens.pixels import resize, smart_resize

GOLDEN = Path(__file__).parents[1] / "golden" / "m3-random-s0" / "golden"
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
WHITE, RED, GREEN, BLUE = (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    target = io.BytesIO()
    picture.save(target, form, **options)
    return target.getvalue()


def pixels(media: Media) -> NDArray[np.uint8]:
    """The picture [H, W, 3] back from its patches."""
    ((t, h, w),) = media.grids
    assert (media.kind, t, media.seconds) == ("image", 1, None)
    patch = media.patch_IC.reshape(h // 2, w // 2, 2, 2, 3, 2, 14, 14)
    assert np.array_equal(patch[:, :, :, :, :, 0], patch[:, :, :, :, :, 1]), "the frame stands twice"
    return patch[:, :, :, :, :, 0].transpose(0, 2, 5, 1, 3, 6, 4).reshape(14 * h, 14 * w, 3)


def quarters(top_left: Any, top_right: Any, bottom_left: Any, bottom_right: Any, mode: str = "RGB") -> Image.Image:
    """A picture of 84x112 pixels, which is not resized, in four colours."""
    picture = Image.new(mode, (112, 84))
    for colour, corner in zip(
        (top_left, top_right, bottom_left, bottom_right), ((0, 0), (56, 0), (0, 42), (56, 42)), strict=True
    ):
        picture.paste(colour, (*corner, corner[0] + 56, corner[1] + 42))
    return picture


def corners(media: Media) -> list[tuple[int, ...]]:
    picture = pixels(media)
    return [tuple(map(int, picture[y, x])) for y in (3, -3) for x in (3, -3)]


def png(height: int, width: int, bits: int, kind: int, data: bytes) -> bytes:
    """A PNG of these chunks, whatever they claim."""
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    written = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(written)


def noise(height: int = 84, width: int = 112) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("case", ["image0", "image_two"])
def test_recorded_pixel_values(case: str) -> None:
    recorded = load_file(GOLDEN / f"{case}.safetensors")
    pictures = [recorded[key] for key in sorted(recorded) if key.startswith("image_u8")]
    media = [read_image(picture) for picture in pictures]
    assert [grid for item in media for grid in item.grids] == [
        tuple(row) for row in recorded["image_grid_thw"].tolist()
    ]
    scaled = recorded["pixel_values"].reshape(-1, 3, 392) * np.array(STD)[:, None] + np.array(MEAN)[:, None]
    difference = np.abs(np.concatenate([item.patch_IC for item in media]) / 255 - scaled.reshape(-1, 1176))
    assert difference.max() < 2.001 / 255
    assert difference.mean() < 1e-4


def test_a_recorded_file_is_its_recorded_picture() -> None:
    from_file, from_array = (
        read_image(source) for source in (GOLDEN / "image0.png", load_file(GOLDEN / "image0.safetensors")["image_u8"])
    )
    assert from_file.size == (203, 317)
    assert from_file.grids == ((1, 14, 22),)
    assert from_file.num_tokens == 77
    assert from_file.digest == from_array.digest


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_keep_every_pixel(form: str, options: dict[str, Any], tmp_path: Path) -> None:
    picture = noise()
    data = encoded(Image.fromarray(picture), form, **options)
    file = tmp_path / "picture.txt"
    file.write_bytes(data)
    for source in (data, file, str(file), Image.fromarray(picture), picture):
        assert np.array_equal(pixels(read_image(source)), picture)


@pytest.mark.parametrize(("form", "options"), [("JPEG", {"quality": 95}), ("JPEG", {"progressive": True}), ("GIF", {})])
def test_lossy_formats_are_close(form: str, options: dict[str, Any]) -> None:
    media = read_image(encoded(quarters(RED, GREEN, BLUE, WHITE), form, **options))
    assert np.abs(np.array(corners(media)) - np.array([RED, GREEN, BLUE, WHITE])).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation(form: str, orientation: int) -> None:
    upright = quarters(RED, GREEN, BLUE, WHITE)
    # What a camera stores so that this orientation turns it upright.
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.rotate(180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    media = read_image(encoded(stored, form, exif=exif.tobytes()))
    assert media.size == (84, 112)
    assert np.abs(np.array(corners(media)) - np.array([RED, GREEN, BLUE, WHITE])).max() <= 8


def test_broken_exif_spoils_no_picture() -> None:
    data = encoded(Image.fromarray(noise()), exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert np.array_equal(pixels(read_image(data)), noise())


def test_what_is_transparent_becomes_white() -> None:
    layer = quarters((*RED, 255), (*RED, 0), (*BLUE, 128), (0, 0, 0, 0), "RGBA")
    expected = [RED, WHITE, (127, 127, 255), WHITE]
    assert corners(read_image(encoded(layer))) == expected
    assert corners(read_image(encoded(layer, "WEBP", lossless=True, exact=True))) == expected
    assert corners(read_image(np.asarray(layer))) == expected
    grey = quarters((9, 255), (9, 0), (0, 128), (0, 0), "LA")
    assert corners(read_image(encoded(grey))) == [(9, 9, 9), WHITE, (127, 127, 127), WHITE]


def test_palettes() -> None:
    picture = quarters(0, 1, 2, 3, "P")
    picture.putpalette([*RED, *GREEN, *BLUE, 10, 20, 30])
    assert corners(read_image(encoded(picture))) == [RED, GREEN, BLUE, (10, 20, 30)]
    assert corners(read_image(encoded(picture, transparency=1))) == [RED, WHITE, BLUE, (10, 20, 30)]
    assert corners(read_image(encoded(picture, transparency=bytes([255, 0, 128])))) == [
        RED,
        WHITE,
        (127, 127, 255),
        (10, 20, 30),
    ]
    assert corners(read_image(encoded(picture, "GIF", transparency=2))) == [RED, GREEN, WHITE, (10, 20, 30)]


def test_a_transparent_colour() -> None:
    picture = quarters(RED, GREEN, BLUE, RED)
    assert corners(read_image(encoded(picture, transparency=RED))) == [WHITE, GREEN, BLUE, WHITE]


def test_grey_and_one_bit_pictures() -> None:
    grey = [0, 9, 128, 255]
    expected = [(value,) * 3 for value in grey]
    assert corners(read_image(encoded(quarters(*grey, "L")))) == expected
    assert corners(read_image(np.asarray(quarters(*grey, "L")))) == expected
    assert corners(read_image(encoded(quarters(0, 255, 255, 0, "1")))) == [(0,) * 3, WHITE, WHITE, (0,) * 3]


def test_sixteen_bits() -> None:
    values = [0, 257 * 9, 257 * 128 + 100, 65_535]
    expected = [(0,) * 3, (9,) * 3, (128,) * 3, WHITE]
    grey = np.kron(np.array(values, np.uint16).reshape(2, 2), np.ones((42, 56), np.uint16))
    assert corners(read_image(encoded(Image.fromarray(grey)))) == expected
    assert corners(read_image(Image.fromarray(grey.astype(np.int32)))) == expected
    row = b"\0" + 56 * struct.pack(">HHH", 257 * 9, 0, 65_535)
    colour = png(56, 56, 16, 2, zlib.compress(56 * row))
    assert corners(read_image(colour)) == [(9, 0, 255)] * 4


def test_cmyk() -> None:
    picture = quarters((0, 255, 255, 0), (255, 0, 255, 0), (255, 255, 0, 0), (0, 0, 0, 0), "CMYK")
    found = corners(read_image(encoded(picture, "JPEG", quality=95)))
    assert np.abs(np.array(found) - np.array([RED, GREEN, BLUE, WHITE])).max() <= 6


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_counts(form: str) -> None:
    frames = [Image.new("RGB", (56, 56), colour) for colour in (RED, GREEN, BLUE)]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=100)
    assert np.abs(np.array(corners(read_image(data))) - np.array(RED)).max() <= 2


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animations_know_their_times(form: str) -> None:
    frames = [Image.new("RGB", (56, 56), colour) for colour in (RED, GREEN, BLUE, WHITE)]
    data = encoded(
        frames[0], form, save_all=True, append_images=frames[1:], duration=[100, 400, 250, 50], lossless=True
    )
    animation = Animation(data, MediaLimits())
    assert animation.seconds == pytest.approx([0, 0.1, 0.5, 0.75])
    assert animation.duration == pytest.approx(0.8)
    shown = list(animation.frames([1, 3]))
    assert [second for second, _ in shown] == pytest.approx([0.1, 0.75])
    assert [frame.getpixel((30, 30)) for _, frame in shown] == [GREEN, WHITE]


def test_frames_without_a_time_stay_for_a_tenth_of_a_second() -> None:
    frames = [Image.new("RGB", (56, 56), colour) for colour in (RED, GREEN, BLUE)]
    animation = Animation(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=0), MediaLimits())
    assert animation.seconds == pytest.approx([0, 0.1, 0.2])


def test_options_decide_the_size() -> None:
    picture = noise(1000, 1000)
    assert read_image(picture).num_tokens == 576
    assert read_image(picture, ImageOptions(detail="low")).num_tokens == 361
    assert read_image(picture, ImageOptions(detail="high")).num_tokens == 36 * 36
    media = read_image(picture, ImageOptions(detail="low", max_long_side_pixel=252))
    assert media.num_tokens == 81
    assert media.size == (1000, 1000)
    assert np.array_equal(pixels(media), resize(Image.fromarray(picture), (252, 252)))
    with pytest.raises(PromptError, match="detail must be one of"):
        ImageOptions(detail="tiny")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="max_long_side_pixel must be"):
        ImageOptions(max_long_side_pixel=100)


def test_media_travels_between_processes() -> None:
    media = read_image(noise())
    copy = pickle.loads(pickle.dumps(media))
    assert np.array_equal(copy.patch_IC, media.patch_IC)
    assert (copy.digest, copy.grids, copy.size) == (media.digest, media.grids, media.size)


def test_the_digest_is_of_what_the_model_sees() -> None:
    picture = noise()
    changed = picture.copy()
    changed[-1, -1, -1] ^= 1
    assert read_image(picture).digest == read_image(encoded(Image.fromarray(picture))).digest
    assert read_image(picture).digest != read_image(changed).digest
    grey = np.zeros((112, 56), np.uint8)
    assert read_image(grey).digest != read_image(grey.T).digest


HUGE = encoded(Image.new("1", (9_000, 9_000)))


@pytest.mark.parametrize(
    ("source", "limits", "word"),
    [
        (HUGE, {}, "has 9000x9000 pixels, more than 67,108,864 together"),
        (png(100_000, 100_000, 8, 2, zlib.compress(b"")), {}, "more than 67,108,864 pixels"),
        (HUGE, {"image_bytes": 1_000}, "larger than 1,000 bytes"),
        (noise(), {"image_pixels": 1_000}, "112x84 pixels, more than 1,000 together"),
        (b"<!doctype html><html>", {}, "the file is HTML, not a picture"),
        (b"<svg/>", {}, "the file is SVG, not a picture"),
        (b"\0\0\0\x18ftypmp42", {}, "a video \\(MP4\\), not a picture"),
        (b"\x89PNG\r\n\x1a\n", {}, "the PNG picture is damaged or cut off: its header cannot be read"),
        (encoded(Image.fromarray(noise()))[:-2_000], {}, "damaged or cut off"),
        (encoded(Image.fromarray(noise()), "JPEG")[:-2_000], {}, "damaged or cut off"),
        (encoded(Image.fromarray(noise()), "WEBP")[:-2_000], {}, "damaged or cut off"),
        (encoded(Image.new("L", (1, 201))), {}, "1x201 pixels is too long"),
        (noise().astype(np.float32), {}, "must be uint8 .* not float32"),
        (noise()[:, :, :2], {}, "must be uint8"),
        (noise()[:0], {}, "must not be empty"),
        (3, {}, "not as int"),
    ],
)
def test_bad_pictures_are_refused(source: Any, limits: dict[str, int], word: str) -> None:
    with pytest.raises(PromptError, match=word):
        read_image(source, limits=MediaLimits(**limits))


def test_animations_have_limits() -> None:
    frames = [Image.new("L", (100, 100), i) for i in range(12)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(PromptError, match="too many frames: 12 of 100x100"):
        Animation(data, MediaLimits(image_pixels=10_000))
    with pytest.raises(PromptError, match="too many frames"):
        Animation(data, MediaLimits(video_frames=11))
    assert len(Animation(data, MediaLimits(video_frames=12)).seconds) == 12


def test_the_published_sizes_of_the_recorded_pictures() -> None:
    manifest = json.loads((GOLDEN / "manifest.json").read_text(encoding="utf-8"))["cases"]
    assert manifest["image1"]["grid_thw"] == [[1, *(side // 14 for side in smart_resize(280, 420))]]
    assert openm3.read_image is read_image
