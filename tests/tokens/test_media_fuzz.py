"""Whatever bytes come, a picture or video is read or refused with PromptError, and nothing else happens."""

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from openm3 import Media, MediaLimits, read_image, read_video
from openm3.errors import PromptError
from tests.tokens.clips import make_clip

LIMITS = MediaLimits(image_pixels=1_000_000, frame_pixels=1_000_000, video_frames=10_000)
"""Small, so that what a damaged header claims costs no time."""

MARKS = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0", struct.pack(">I", 10**9), b"\0\0\0\1"]


def encoded(form: str, mode: str = "RGB", num_frames: int = 1) -> bytes:
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8)).resize((35, 28)) for _ in range(num_frames)]
    frames = [frame.convert("I").convert(mode) if mode == "I;16" else frame.convert(mode) for frame in frames]
    target = io.BytesIO()
    options = {"save_all": True, "append_images": frames[1:], "duration": 300} if num_frames > 1 else {}
    frames[0].save(target, form, **options)
    return target.getvalue()


def clip(container: str, codec: str) -> bytes:
    options = {"libx265": {"x265-params": "log-level=none"}}.get(codec, {"g": "5"})
    return make_clip([100 * i for i in range(12)], container=container, codec=codec, options=options)


SEEDS: dict[str, Callable[[], bytes]] = {
    **{form: lambda form=form: encoded(form) for form in ("JPEG", "PNG", "GIF", "WEBP", "BMP")},
    **{f"PNG {mode}": lambda mode=mode: encoded("PNG", mode) for mode in ("P", "1", "LA", "RGBA", "I;16")},
    "JPEG CMYK": lambda: encoded("JPEG", "CMYK"),
    **{f"animated {form}": lambda form=form: encoded(form, num_frames=4) for form in ("GIF", "WEBP", "PNG")},
    "MP4 H.264": lambda: clip("mp4", "libx264"),
    "MP4 HEVC": lambda: clip("mp4", "libx265"),
    "MOV": lambda: clip("mov", "mpeg4"),
    "Matroska": lambda: clip("matroska", "libx264"),
    "WebM": lambda: clip("webm", "libvpx-vp9"),
    "AVI": lambda: clip("avi", "mpeg4"),
    "AVI MJPEG": lambda: clip("avi", "mjpeg"),
}


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Cut off, bytes changed, a number made extreme, a part said twice; checksums of a PNG put right half the time."""
    changed = bytearray(data)
    kind = chance.randrange(5)
    if kind == 0:
        del changed[chance.randrange(1, len(changed)) :]
    elif kind == 1:
        for _ in range(chance.randrange(1, 8)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
    elif kind < 4:
        start = chance.randrange(len(changed) - 4 if kind == 2 else min(len(changed) - 4, 1_000))
        changed[start : start + 4] = chance.choice(MARKS)
    else:
        start, stop = sorted(chance.sample(range(len(changed)), 2))
        place = chance.randrange(len(changed))
        changed[place:place] = changed[start:stop]
    if changed.startswith(b"\x89PNG") and chance.random() < 0.5:
        place = 8
        while (end := place + 8 + int.from_bytes(changed[place : place + 4], "big")) + 4 <= len(changed):
            changed[end : end + 4] = struct.pack(">I", zlib.crc32(changed[place + 4 : end]))
            place = end + 4
    return bytes(changed)


def outcome(data: bytes) -> str:
    for read in (read_image, read_video):
        try:
            media: Media = read(data, limits=LIMITS)
        except PromptError as error:
            assert str(error)
            continue
        assert media.patch_IC.shape == (4 * media.num_tokens, 1176)
        assert len(media.digest) == 32
        return "read"
    return "refused"


def fuzz(seed: str, times: int) -> None:
    data = SEEDS[seed]()
    assert outcome(data) == "read"
    chance = random.Random(seed)
    found = {outcome(mutated(data, chance)) for _ in range(times)}
    assert "refused" in found


@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_files(seed: str) -> None:
    fuzz(seed, 25)


@pytest.mark.e2e
@pytest.mark.parametrize("seed", SEEDS)
def test_many_mutated_files(seed: str) -> None:
    fuzz(seed, 500)


def test_noise_behind_every_magic_number() -> None:
    chance = random.Random(0)
    magics = [SEEDS[seed]()[:16] for seed in SEEDS]
    for _ in range(300):
        outcome(chance.choice(magics)[: chance.randrange(17)] + chance.randbytes(chance.randrange(1, 2_000)))
