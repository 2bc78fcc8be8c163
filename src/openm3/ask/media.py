"""Pictures and videos that a question is about, from paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openm3.ask.documents import Document, shown_name
from openm3.errors import PromptError
from openm3.tokens.media import Kind, Media
from openm3.tokens.pictures import read_image
from openm3.tokens.prompt import user_message
from openm3.tokens.video import read_video


@dataclass(frozen=True)
class Shown:
    """A picture or video and what it is called."""

    name: str
    media: Media

    def report(self) -> dict[str, Any]:
        """For programs. `seconds` is the time of the last frames that are seen of a video."""
        seconds = self.media.seconds
        return {
            "name": self.name,
            "kind": self.media.kind,
            "size": self.media.size,
            "tokens": self.media.num_tokens,
            **({"seconds": seconds[-1]} if seconds else {}),
        }

    def line(self) -> str:
        """For people."""
        height, width = self.media.size
        frames = sum(t for t, _, _ in self.media.grids)
        length = f", {2 * frames} frames" if self.media.kind == "video" else ""
        return f"{self.name}: {self.media.kind} of {width}x{height} pixels{length}, {self.media.num_tokens:,} tokens"


def look(path: str, kind: Kind) -> Shown:
    """Read one. Raises PromptError, naming the path, for a file that is none or cannot be read."""
    try:
        return Shown(shown_name(path), read_image(path) if kind == "image" else read_video(path))
    except PromptError as error:
        raise PromptError(f"{shown_name(path)}: {error}") from None


def content(shown: Sequence[Shown], documents: Sequence[Document], question: str) -> str | list[dict[str, str]]:
    """A user message's content: pictures and videos first, then the documents, then the question."""
    text = user_message([(document.name, document.text) for document in documents], question)
    if not shown:
        return text
    return [*({"type": str(one.media.kind)} for one in shown), {"type": "text", "text": text}]
