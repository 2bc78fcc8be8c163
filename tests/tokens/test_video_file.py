"""Decoding: sparse, on one thread, within limits, and from the file itself alone."""

import io
import struct
from pathlib import Path

import av
import numpy as np
import pytest

from openm3.errors import PromptError
from openm3.tokens.sources import MediaLimits
from openm3.tokens.video_file import VideoFile
from tests.tokens.clips import make_clip


def steady(num_frames: int) -> list[int]:
    return [100 * i for i in range(num_frames)]


def test_times_are_known_before_anything_is_decoded() -> None:
    with VideoFile(make_clip(steady(12)), "MP4", MediaLimits()) as file:
        assert file.seconds == pytest.approx([i / 10 for i in range(12)])
        assert file.duration == pytest.approx(1.2)


def test_only_what_is_needed_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = make_clip(steady(100), options={"g": "10", "keyint_min": "10", "bf": "0", "sc_threshold": "0"})
    fed: list[int] = []
    original = VideoFile._needed

    def counted(self: VideoFile, wanted: set[int]) -> list[bool]:
        needed = original(self, wanted)
        fed.append(sum(needed))
        return needed

    monkeypatch.setattr(VideoFile, "_needed", counted)
    with VideoFile(clip, "MP4", MediaLimits()) as file:
        shown = [second for second, _ in file.frames([0, 32, 34, 95])]
    assert shown == pytest.approx([0, 3.2, 3.4, 9.5])
    # Keyframes stand at 0, 10, ..: 0; 30 to 34; 90 to 95.
    assert fed == [1 + 5 + 6]


def test_frames_that_do_not_decode_are_left_out() -> None:
    clip = bytearray(make_clip(steady(40), container="matroska", codec="mjpeg"))
    starts = [i for i in range(len(clip)) if clip.startswith(b"\xff\xd8\xff", i)]
    assert len(starts) == 40
    for number in (10, 11):
        clip[starts[number] : starts[number] + 200] = bytes(200)
    with VideoFile(bytes(clip), "Matroska", MediaLimits()) as file:
        shown = [round(second, 3) for second, _ in file.frames([0, 10, 20, 30])]
    assert shown == [0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("limits", "word"),
    [
        ({"frame_pixels": 48 * 64 - 1}, "is 64x48 pixels, more than 3,071 together"),
        ({"video_frames": 19}, "20 frames, more than 19"),
        ({"video_seconds": 1.5}, "lasts 2 s, more than 2 s"),
    ],
)
@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_limits(container: str, limits: dict[str, int], word: str) -> None:
    name = "MP4" if container == "mp4" else "Matroska"
    with pytest.raises(PromptError, match=word if container == "mp4" else word.replace("20 frames, ", "")):
        VideoFile(make_clip(steady(20), container=container), name, MediaLimits(**limits))


def test_a_claim_of_a_billion_frames_is_refused_at_once() -> None:
    clip = bytearray(make_clip(steady(20)))
    sizes, times = clip.index(b"stsz"), clip.index(b"stts")
    clip[sizes + 8 : sizes + 16] = struct.pack(">II", 1, 10**9)
    clip[times + 12 : times + 16] = struct.pack(">I", 10**9)
    with pytest.raises(PromptError, match=r"claims 1,000,000,00\d frames, more than 1,000,000"):
        VideoFile(bytes(clip), "MP4", MediaLimits())


def test_a_frame_larger_than_its_header_says_is_not_decoded() -> None:
    clip = bytearray(make_clip(steady(4), container="avi", codec="mjpeg"))
    start = clip.index(b"\xff\xc0")
    while start >= 0:
        clip[start + 5 : start + 9] = struct.pack(">HH", 65_500, 65_500)
        start = clip.find(b"\xff\xc0", start + 9)
    with pytest.raises(PromptError), VideoFile(bytes(clip), "AVI", MediaLimits()) as file:
        list(file.frames([0]))


def test_sound_alone_is_no_video() -> None:
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=8_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8_000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    with pytest.raises(PromptError, match="holds no video, only sound or pictures"):
        VideoFile(target.getvalue(), "MP4", MediaLimits())


def test_other_files_are_never_opened(tmp_path: Path) -> None:
    """A data reference of a MOV may name another file that holds the samples."""
    secret = tmp_path / "secret.mov"
    secret.write_bytes(make_clip(steady(20), container="mov", codec="mpeg4"))
    clip = secret.read_bytes()
    reference = clip.index(b"dref")
    # One entry "url " with the flag "in this file": take the flag away and name a file.
    entry = clip.index(b"url ", reference)
    path = str(secret).encode() + b"\0"
    named = clip[: entry - 4] + struct.pack(">I", 12 + len(path)) + b"url \0\0\0\0" + path + clip[entry + 8 :]
    try:
        with VideoFile(named, "MOV", MediaLimits()) as file:
            shown = list(file.frames([0]))
    except PromptError:
        return
    assert shown, "the samples are those of the file itself"
