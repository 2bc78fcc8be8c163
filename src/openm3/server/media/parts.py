"""Content parts that are pictures or videos, in every spelling that clients have for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openm3.errors import PromptError
from openm3.server.errors import RequestError
from openm3.tokens.media import Kind, Media
from openm3.tokens.pictures import ImageOptions
from openm3.tokens.video import VideoOptions

MOST = {"image": 200, "video": 10}
"""How many of each kind a request may show."""

TYPES: dict[str, Kind | None] = {
    "image_url": "image",
    "image": "image",
    "input_image": "image",
    "computer_screenshot": "image",
    "video_url": "video",
    "video": "video",
    "input_video": "video",
    "file": None,
    "input_file": None,
}
"""Types of content parts that hold a picture, a video, or a file that is one of them."""

_SOUND = ("input_audio", "audio", "audio_url")
_FIELDS = ("image_url", "video_url", "source", "file", "image", "video")


@dataclass(frozen=True)
class Wanted:
    """A picture or video that a request shows; of kind None until its bytes say which it is.

    `url` is a data URI, `mm_file://FILE_ID` or a web address; `where` is the part's place in the request.
    """

    kind: Kind | None
    url: str
    image: ImageOptions
    video: VideoOptions
    where: str


def media_part(part: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """A content part for `Call.messages` if this one is a picture or video, else None.

    Raises RequestError, naming `where`, for one that says nothing of where its bytes are, or for options that are not
    allowed.
    """
    name = part.get("type")
    if name in _SOUND:
        raise RequestError(f"{where}: {name} is not supported: this model hears nothing", param=where)
    if not isinstance(name, str) or name not in TYPES:
        return None
    given = next((part[field] for field in _FIELDS if part.get(field) is not None), part)
    fields = {**part, **given} if isinstance(given, Mapping) else dict(part)
    url = given if isinstance(given, str) else _url(fields)
    if not url:
        raise RequestError(
            f"{where}: a part of type {name} needs a url (data:, mm_file:// or https://), data or a file_id",
            param=where,
        )
    detail = fields.get("detail")
    size: dict[str, Any] = {"max_long_side_pixel": fields.get("max_long_side_pixel")}
    if detail is not None:
        # OpenAI's name for the largest tier.
        size["detail"] = "high" if detail == "original" else str(detail)
    fps = fields.get("fps")
    try:
        image, video = ImageOptions(**size), VideoOptions(**size, **({} if fps is None else {"fps": fps}))
    except PromptError as error:
        raise RequestError(f"{where}: {error}", param=where) from None
    kind = TYPES[name]
    return {"type": kind or "file", "media": Wanted(kind, url, image, video, where)}


def with_media(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages in OpenAI's format with the pictures and videos among their parts as `Call.messages` has them."""
    found = []
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list):
            parts = [_replaced(part, f"messages[{i}].content[{k}]") for k, part in enumerate(content)]
            message = {**message, "content": parts}
        found.append(message)
    return found  # type: ignore[return-value]  # what is no object is refused with the rest of the conversation


def content_of(parts: Iterable[str | dict[str, Any]], between: str) -> str | list[dict[str, Any]]:
    """A message's content: texts, joined by `between`, and the media parts among them. Without any, one text."""
    content: list[dict[str, Any]] = []
    for part in parts:
        if not isinstance(part, str):
            content.append(part)
        elif content and content[-1]["type"] == "text":
            content[-1] = {"type": "text", "text": f"{content[-1]['text']}{between}{part}"}
        else:
            content.append({"type": "text", "text": part})
    if not content or (len(content) == 1 and content[0]["type"] == "text"):
        return "".join(part["text"] for part in content)
    return content


def wanted(messages: Sequence[Mapping[str, Any]]) -> list[Wanted]:
    """What a call's messages show, in order. Raises RequestError for more than a request may."""
    found = [part["media"] for part in _parts(messages)]
    for kind, most in MOST.items():
        count = sum(one.kind == kind for one in found)
        if count > most:
            raise RequestError(f"the request shows {count} {kind}s: at most {most} are allowed", param="messages")
    if len(found) > sum(MOST.values()):
        raise RequestError(f"the request shows {len(found)} pictures and videos, more than are allowed")
    return found


def settled(messages: Sequence[Mapping[str, Any]], media: Sequence[Media]) -> list[dict[str, Any]]:
    """The messages with nothing left of what they show but its kind, as chat templates want it."""
    kinds = iter(media)
    return [
        {**message, "content": [{"type": next(kinds).kind} if _is_media(part) else part for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else dict(message)
        for message in messages
    ]


def _replaced(part: object, where: str) -> object:
    return part if not isinstance(part, Mapping) else media_part(part, where) or part


def _parts(messages: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for message in messages:
        content = message.get("content")
        yield from (part for part in content if _is_media(part)) if isinstance(content, list) else ()


def _is_media(part: object) -> bool:
    return isinstance(part, dict) and isinstance(part.get("media"), Wanted)


def _url(fields: Mapping[str, Any]) -> str | None:
    """Where the bytes are, as an address, however it is said."""
    url, number = fields.get("url"), fields.get("file_id")
    data = fields.get("data") or fields.get("file_data")
    if isinstance(url, str):
        return url
    if isinstance(data, str):
        return data if data[:5].lower() == "data:" else f"data:;base64,{data}"
    return f"mm_file://{number}" if isinstance(number, str) and number else None
