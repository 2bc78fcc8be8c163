"""Documents in conversations: written into messages as `openm3 ask` writes them, and found again in a prompt's text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from openm3.server.errors import RequestError
from openm3.tokens.prompt import document_text

_HEADER = re.compile(r"File: ([^\n]+)\n")
_LATER_HEADER = re.compile(r"(?<=\n\n)File: [^\n]+\n")


def _lines(text: str) -> str:
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise PydanticCustomError("blank", "must hold more than white space")
    return text


class Document(BaseModel):
    """A text to be read, its lines ended by any newline, and the name that evidence calls it by."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: str = Field(pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]+$", validation_alias=AliasChoices("name", "title"))
    text: Annotated[str, AfterValidator(_lines)]


Documents = Annotated[list[Document] | None, Field(description="to be read before the first words of the user")]


@dataclass(frozen=True)
class Part:
    """Characters `start` to before `stop` of a prompt's text; a document's own text begins at `body`."""

    role: str
    source: str | None
    start: int
    stop: int
    body: int


def with_documents(messages: Sequence[dict[str, Any]], documents: Sequence[Document] | None) -> list[dict[str, Any]]:
    """The messages with the documents before the first words of the user's.

    There they stand whatever is asked next, so that they are read once. Each is a part of its own: nobody has to guess
    where it ends. Raises RequestError where no message is the user's.
    """
    if not documents:
        return list(messages)
    written = [{"type": "text", "text": document_text(document.name, document.text)} for document in documents]
    for i, message in enumerate(messages):
        if message.get("role") == "user":
            content = message.get("content")
            text = [{"type": "text", "text": content}] if isinstance(content, str) else [content] if content else []
            own = content if isinstance(content, list) else text
            return [*messages[:i], {**message, "content": [*written, *own]}, *messages[i + 1 :]]
    raise RequestError("documents need a message of role user to stand in", param="documents")


def located(messages: Sequence[Mapping[str, Any]], text: str) -> Iterator[Part]:
    """Where the messages' texts stand in the prompt, whatever the chat template puts around them."""
    end = 0
    for message in messages:
        for piece in _pieces(message.get("content")):
            core = piece.strip()
            start = text.find(core, end)
            if not core or start < 0:
                continue
            end = start + len(core)
            header = _HEADER.match(core)
            source, length = (header[1], header.end()) if header else (None, 0)
            yield Part(str(message.get("role")), source, start, end, start + length)


def _pieces(content: object) -> list[str]:
    """A content's documents and what is no document. In several parts, each is one; a lone text is cut at headers."""
    if isinstance(content, str):
        return _cut(content)
    texts = [part["text"] for part in content if part.get("type") == "text"] if isinstance(content, list) else []
    return texts if len(texts) > 1 else [piece for text in texts for piece in _cut(text)]


def _cut(text: str) -> list[str]:
    """What follows the last empty line behind the last header is the question."""
    if not _HEADER.match(text):
        return [text]
    cuts = [0, *(match.start() for match in _LATER_HEADER.finditer(text))]
    question = text.rfind("\n\n", cuts[-1])
    cuts += [question + 2] if question >= 0 else []
    return [text[i:k] for i, k in pairwise([*cuts, len(text)])]
