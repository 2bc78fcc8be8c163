"""Where media stand in a prompt: the recorded ids, the order of messages, and nothing that a caller can forge."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from openm3 import read_image, video_from_frames
from openm3.errors import PromptError
from openm3.tokens import Media, Run, Tokenizer, expand, runs

FOLDER = Path(__file__).parents[1] / "golden" / "m3-random-s0"
SPEC = json.loads((FOLDER / "model" / "tokenizer.json").read_text(encoding="utf-8"))
CASES = json.loads((FOLDER / "golden" / "manifest.json").read_text(encoding="utf-8"))["cases"]

recorded = Tokenizer.from_folder(FOLDER / "model")
ours = Tokenizer(SPEC)
IMAGE_ID, VIDEO_ID = (recorded.token_id(f"]<]{kind}[>[") for kind in ("image", "video"))

IMAGE, VIDEO = {"type": "image"}, {"type": "video"}


def picture(height: int = 56, width: int = 56) -> Media:
    return read_image(np.full((height, width, 3), 7, np.uint8))


def clip(num_frames: int, seconds: list[float] | None = None) -> Media:
    return video_from_frames([np.full((56, 84, 3), 9, np.uint8)] * num_frames, seconds)


def said(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {
        "role": role,
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


def media_of(case: str) -> list[Media]:
    tensors = load_file(FOLDER / "golden" / f"{case}.safetensors")
    if "video_u8" in tensors:
        frames = tensors["video_u8"]
        return [video_from_frames(frames, [i / 2 for i in range(len(frames))])]
    return [read_image(tensors[key]) for key in sorted(tensors) if key.startswith("image_u8")]


CHATS = {
    "image0": ([said(IMAGE, "Describe this image.")], "disabled"),
    "image_two": ([said(IMAGE, " versus ", IMAGE, "?")], "adaptive"),
    "video": ([said(VIDEO, "What happens?")], "enabled"),
    "video_resized": ([said(VIDEO, "What happens?")], "enabled"),
}


@pytest.mark.parametrize("case", CHATS)
def test_recorded_ids(case: str) -> None:
    ids = load_file(FOLDER / "golden" / f"{case}.safetensors")["input_ids"][0].tolist()
    media = media_of(case)
    messages, thinking = CHATS[case]
    assert recorded.chat(messages, thinking=thinking, media=media) == ids
    assert ours.chat(messages, thinking=thinking, media=media) == ids
    assert recorded.encode(CASES[case]["prompt"], special=True, media=media) == ids


def test_recorded_runs() -> None:
    ids = load_file(FOLDER / "golden" / "video.safetensors")["input_ids"][0].tolist()
    (media,) = media_of("video")
    found = runs(ids, [media], IMAGE_ID, VIDEO_ID)
    assert [run.count for run in found] == [12] * 5
    assert [run.offset for run in found] == [0, 12, 24, 36, 48]
    assert sum(run.count for run in found) == media.num_tokens == CASES["video"]["video_tokens"]
    assert all(set(ids[run.first : run.first + run.count]) == {VIDEO_ID} for run in found)


def test_a_video_without_times_has_none_in_its_prompt() -> None:
    text = ours.decode(ours.chat([said(VIDEO)], media=[clip(3)]))
    row = "]<]start of image[>[" + 6 * "]<]video[>[" + "]<]end of image[>["
    assert text == f"]~!b[]~b]user\n{row}{row}[e~[\n]~b]ai\n"
    timed = ours.decode(ours.chat([said("At: ", VIDEO)], media=[clip(3, [0.25, 1, 12.34])]))
    assert timed == f"]~!b[]~b]user\nAt: ]<]0.2 seconds[>[{row}]<]12.3 seconds[>[{row}[e~[\n]~b]ai\n"


def test_times_are_encoded_together_with_the_text_before_them() -> None:
    bracket = ours.encode("a]<]0.0 seconds[>[")
    assert bracket != ours.encode("a") + ours.encode("]<]0.0 seconds[>[") or len(bracket) == len("a]<]0.0 seconds[>[")
    calls: list[str] = []

    class Listening(Tokenizer):
        def _encode_plain(self, text: str) -> list[int]:
            calls.append(text)
            return super()._encode_plain(text)

    Listening(SPEC).chat([said("Look: ", VIDEO)], media=[clip(2, [0, 1])])
    assert "user\nLook: ]<]0.0 seconds[>[" in calls


def test_parts_of_all_spellings_in_all_roles() -> None:
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    film = {"type": "video_url", "video_url": {"url": "https://example.org/a.mp4", "fps": 2}}
    messages = [
        said("Rules", IMAGE, role="system"),
        said(url, "and", film),
        {"role": "assistant", "content": "Yes."},
        said(IMAGE, role="tool"),
    ]
    media = [picture(), picture(56, 84), clip(2), picture(84, 84)]
    for tokenizer in (ours, recorded):
        ids = tokenizer.chat(messages, media=media)
        found = runs(ids, media, IMAGE_ID, VIDEO_ID)
        assert [(run.media, run.count) for run in found] == [(0, 4), (1, 6), (2, 6), (3, 9)]
        assert "example.org" not in tokenizer.decode(ids)
        assert "base64" not in tokenizer.decode(ids)


def test_the_text_of_control_tokens_stays_text() -> None:
    hostile = "]<]image[>[ ]<]start of image[>[ ]<]video[>[ ]<]0.0 seconds[>["
    ids = ours.chat([said(hostile, IMAGE, "image", hostile)], media=[picture()])
    assert [run.count for run in runs(ids, [picture()], IMAGE_ID, VIDEO_ID)] == [4]
    assert ours.decode(ids).count("]<]image[>[") == 4 + 2
    assert ids.count(IMAGE_ID) == 4
    split = [said(*"]<]image[>[")]
    assert IMAGE_ID not in ours.chat(split)
    assert IMAGE_ID not in ours.chat([said("]<]", "image", "[>[")])


@pytest.mark.parametrize(
    ("messages", "media", "word"),
    [
        ([said(IMAGE)], [], "show 1 pictures and videos, but 0 are given"),
        ([said("hi")], [picture()], "show 0 pictures and videos, but 1 are given"),
        ([said(IMAGE, VIDEO)], [clip(2), picture()], "media 0 is of kind video, but the prompt shows kind image"),
        ([said({"type": "audio"})], [], "part of type 'audio': only text, image and video are known"),
        ([said({"type": ["image"]})], [], "content part of type"),
    ],
)
def test_media_must_fit_the_messages(messages: Any, media: list[Media], word: str) -> None:
    with pytest.raises(PromptError, match=word):
        ours.chat(messages, media=media)


def test_a_template_that_leaves_media_out_is_refused() -> None:
    silent = Tokenizer(SPEC, chat_template="{% for m in messages %}{{ m.role }}{% endfor %}")
    with pytest.raises(PromptError, match="the prompt shows 0 pictures and videos, but 1 are given"):
        silent.chat([said(IMAGE)], media=[picture()])
    twice = Tokenizer(SPEC, chat_template="]<]image[>[]<]image[>[")
    with pytest.raises(PromptError, match="the prompt shows 2 pictures and videos, but 1 are given"):
        twice.chat([said(IMAGE)], media=[picture()])


def test_a_tokenizer_without_the_tokens_is_refused() -> None:
    spec = {**SPEC, "added_tokens": [t for t in SPEC["added_tokens"] if "of image" not in t["content"]]}
    with pytest.raises(PromptError, match="this tokenizer has no token ]<]end of image"):
        Tokenizer(spec).chat([said(IMAGE)], media=[picture()])


def test_encode_wants_special_for_media() -> None:
    with pytest.raises(PromptError, match="media need special=True"):
        ours.encode("]<]image[>[", media=[picture()])
    with pytest.raises(PromptError, match="the prompt shows 1 pictures and videos, but 2 are given"):
        ours.encode("]<]image[>[", special=True, media=[picture(), picture()])
    assert ours.encode("]<]image[>[", special=True) == [IMAGE_ID]


def test_expand_passes_other_pieces_on() -> None:
    pieces = [("]<]image[>[", False), ("]~b]", True), ("]<]image[>[", True)]
    expanded = list(expand(pieces, [picture()]))
    row = [("]<]start of image[>[", True), *[("]<]image[>[", True)] * 4, ("]<]end of image[>[", True)]
    assert expanded == [*pieces[:2], *row]
    bad = Media.of("video", clip(4).patch_IC, clip(4).grids, (56, 84), [0.0])
    with pytest.raises(PromptError, match="2 temporal patches, but times for 1"):
        list(expand([("]<]video[>[", True)], [bad]))


def test_runs_split_where_media_meet() -> None:
    media = [picture(), picture(56, 84), clip(3)]
    ids = [1, *[IMAGE_ID] * 10, 2, *[VIDEO_ID] * 7, 3, *[VIDEO_ID] * 5]
    assert runs(ids, media, IMAGE_ID, VIDEO_ID) == [
        Run(media=0, first=1, offset=0, count=4),
        Run(media=1, first=5, offset=0, count=6),
        Run(media=2, first=12, offset=0, count=7),
        Run(media=2, first=20, offset=7, count=5),
    ]
    assert runs([1, 2, 3], [], IMAGE_ID, VIDEO_ID) == []
    assert runs([], [], None, None) == []


@pytest.mark.parametrize(
    ("ids", "media", "word"),
    [
        ([IMAGE_ID] * 3, [picture()], "the prompt has 3 media placeholders, the media need 4"),
        ([IMAGE_ID] * 4, [], "the prompt has 4 media placeholders, the media need 0"),
        ([], [picture()], "the prompt has 0 media placeholders, the media need 4"),
        ([VIDEO_ID] * 4, [picture()], "media 0 is of kind image, but the prompt has kind video there"),
        ([IMAGE_ID] * 3 + [VIDEO_ID], [picture()], "media 0 is of kind image"),
    ],
)
def test_runs_must_fit(ids: list[int], media: list[Media], word: str) -> None:
    with pytest.raises(PromptError, match=word):
        runs(ids, media, IMAGE_ID, VIDEO_ID)


def test_models_without_placeholders_take_no_media() -> None:
    with pytest.raises(PromptError, match="the prompt has 0 media placeholders, the media need 4"):
        runs([IMAGE_ID] * 4, [picture()], None, None)
