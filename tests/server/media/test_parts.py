"""Every spelling of a picture or video becomes one thing; what says nothing is refused by its place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from openm3 import ImageOptions, Media, VideoOptions
from openm3.server.errors import RequestError
from openm3.server.media.parts import Wanted, content_of, media_part, settled, wanted, with_media

URL = "data:image/png;base64,AAAA"


def read(part: dict[str, Any]) -> Wanted:
    found = media_part(part, "here")
    assert found is not None and isinstance(found["media"], Wanted)
    assert found["media"].where == "here"
    return found["media"]


@pytest.mark.parametrize(
    ("part", "kind", "url"),
    [
        ({"type": "image_url", "image_url": {"url": URL}}, "image", URL),
        ({"type": "image_url", "image_url": URL}, "image", URL),
        ({"type": "input_image", "image_url": URL, "detail": "auto"}, "image", URL),
        ({"type": "input_image", "image_url": None, "file_id": "file-1"}, "image", "mm_file://file-1"),
        ({"type": "image", "source": {"type": "url", "url": "https://x.org/a"}}, "image", "https://x.org/a"),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}, "image", None),
        ({"type": "image", "source": {"type": "file", "file_id": "file-1"}}, "image", "mm_file://file-1"),
        ({"type": "video_url", "video_url": {"url": "mm_file://file-1"}}, "video", "mm_file://file-1"),
        ({"type": "input_video", "video_url": "mm_file://file-1"}, "video", "mm_file://file-1"),
        ({"type": "video", "source": {"type": "url", "url": "mm_file://1"}, "fps": 2}, "video", "mm_file://1"),
        ({"type": "file", "file": {"file_id": "file-1"}}, None, "mm_file://file-1"),
        ({"type": "file", "file": {"file_data": URL, "filename": "a.png"}}, None, URL),
        ({"type": "input_file", "file_data": URL}, None, URL),
        ({"type": "input_file", "file_id": "file-1"}, None, "mm_file://file-1"),
    ],
)
def test_spellings(part: dict[str, Any], kind: str | None, url: str | None) -> None:
    found = read(part)
    assert (found.kind, found.url) == (kind, url or "data:;base64,AAAA")
    assert found.image == ImageOptions(detail="auto") if "detail" in part else ImageOptions()
    assert found.video.fps == part.get("fps", 1)


@pytest.mark.parametrize("part", [{"type": "text", "text": "x"}, {"type": 5}, {"type": "thinking"}, {}])
def test_other_parts_are_none_of_these(part: dict[str, Any]) -> None:
    assert media_part(part, "here") is None


def test_options() -> None:
    found = read({"type": "video_url", "video_url": {"url": URL, "fps": 0.5, "detail": "low"}})
    assert found.video == VideoOptions(fps=0.5, detail="low")
    assert read({"type": "image_url", "image_url": {"url": URL, "detail": "original"}}).image.detail == "high"
    assert read({"type": "image_url", "image_url": {"url": URL, "max_long_side_pixel": 504}}).image == ImageOptions(
        max_long_side_pixel=504
    )
    assert read({"type": "image_url", "image_url": {"url": URL, "detail": None}}).image == ImageOptions()


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image_url"}, "needs a url"),
        ({"type": "image_url", "image_url": {}}, "needs a url"),
        ({"type": "image_url", "image_url": {"url": 5}}, "needs a url"),
        ({"type": "image_url", "image_url": ""}, "needs a url"),
        ({"type": "image_url", "image_url": {"url": URL, "detail": "huge"}}, "detail must be one of"),
        ({"type": "image_url", "image_url": {"url": URL, "detail": ["low"]}}, "detail must be one of"),
        ({"type": "image_url", "image_url": {"url": URL, "max_long_side_pixel": 149}}, "150 to 3,?584"),
        ({"type": "video_url", "video_url": {"url": URL, "fps": 100}}, "fps must be a number from 0.2 to 5, not 100"),
        ({"type": "video_url", "video_url": {"url": URL, "fps": "1"}}, "fps must be"),
        ({"type": "video_url", "video_url": {"url": URL, "fps": float("nan")}}, "fps must be"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA"}}, "this model hears nothing"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(part: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        media_part(part, "messages[1].content[0]")
    assert caught.value.param == "messages[1].content[0]"
    assert caught.value.message.startswith("messages[1].content[0]: ")


def test_messages_and_back() -> None:
    image = {"type": "image_url", "image_url": {"url": URL}}
    file = {"type": "file", "file": {"file_id": "file-1"}}
    messages = [
        {"role": "system", "content": [image]},
        {"role": "user", "content": [{"type": "text", "text": "and"}, file]},
        {"role": "assistant", "content": "text"},
    ]
    found = with_media(messages)
    assert [one.where for one in wanted(found)] == ["messages[0].content[0]", "messages[1].content[1]"]
    media = [Media.of(kind, np.zeros((4, 1176), np.uint8), [(1, 2, 2)], (28, 28)) for kind in ("image", "video")]
    assert settled(found, media) == [
        {"role": "system", "content": [{"type": "image"}]},
        {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "video"}]},
        {"role": "assistant", "content": "text"},
    ]


def test_counts() -> None:
    image = {"type": "image_url", "image_url": {"url": URL}}
    video = {"type": "video_url", "video_url": {"url": URL}}
    assert len(wanted(with_media([{"role": "user", "content": [image] * 200 + [video] * 10}]))) == 210
    with pytest.raises(RequestError, match="shows 201 images: at most 200"):
        wanted(with_media([{"role": "user", "content": [image]}, {"role": "user", "content": [image] * 200}]))
    with pytest.raises(RequestError, match="shows 11 videos: at most 10"):
        wanted(with_media([{"role": "user", "content": [video] * 11}]))
    with pytest.raises(RequestError, match="211 pictures and videos"):
        wanted(with_media([{"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}] * 211}]))


def test_texts_among_media_stay_apart() -> None:
    image = {"type": "image"}
    assert content_of(["a", "b"], "\n") == "a\nb"
    assert content_of([], "\n") == ""
    assert content_of(["a", "b", image, "c"], "\n") == [
        {"type": "text", "text": "a\nb"},
        image,
        {"type": "text", "text": "c"},
    ]
    assert content_of([image], "") == [image]
