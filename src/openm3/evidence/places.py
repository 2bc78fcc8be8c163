"""Which line of which text each token of a prompt belongs to, from the ids alone.

The ids are decoded one by one, so every token gets the character that it begins at; documents and messages are found in
the decoded text whatever the chat template puts around them. Linear in the prompt.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from openm3.tokens.prompt import document_text
from openm3.tokens.tokenizer import StreamDecoder, Tokenizer


class Named(Protocol):
    """A text and what it is called."""

    @property
    def name(self) -> str: ...

    @property
    def text(self) -> str: ...


@dataclass(frozen=True)
class Places:
    """The lines of all texts in a row, and the line of each token.

    `row_T[t]` is the line that token t begins in, -1 outside of the texts. Row i is line `number_L[i]` (from 1) of text
    `document_L[i]`.
    """

    row_T: NDArray[np.int64]
    document_L: NDArray[np.int64]
    number_L: NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        """Tokens that belong to the texts."""
        return int((self.row_T >= 0).sum())


def decoded(decoder: StreamDecoder, ids: Iterable[int]) -> tuple[str, array[int]]:
    """The text of some ids, and the character that each of them begins at; the last entry is the text's length."""
    begins, end = array("I"), 0
    pieces: list[str] = []
    for token in ids:
        begins.append(end)
        pieces.append(decoder.push(token))
        end += len(pieces[-1])
    pieces.append(decoder.finish())
    text = "".join(pieces)
    begins.append(len(text))
    return text, begins


def locate(tokenizer: Tokenizer, ids: Sequence[int], documents: Sequence[Named]) -> Places | None:
    """The places of a prompt's tokens; None if the documents do not stand in it as `user_message` writes them."""
    text, begins = decoded(tokenizer.decoder(), ids)
    written = [document_text(document.name, document.text) for document in documents]
    end = text.find("".join(written))
    if end < 0:
        return None
    spans = []
    for document, whole in zip(documents, written, strict=True):
        header, end = end + len(f"File: {document.name}\n"), end + len(whole)
        # The line that is empty parts documents, and is of none.
        spans.append((header, end - 1))
    return placed(text, begins, spans)


def placed(text: str, begins: array[int], spans: Sequence[tuple[int, int]]) -> Places:
    """The places of tokens in parts of their text, characters `start` to before `stop`, one part after another.

    `begins` are as `decoded` gives them. A line's end is of the line.
    """
    starts: list[int] = []
    document: list[int] = []
    number: list[int] = []
    for i, (start, stop) in enumerate(spans):
        count = 0
        while start < stop:
            count += 1
            starts.append(start)
            document.append(i)
            number.append(count)
            end = text.find("\n", start, stop)
            start = stop if end < 0 else end + 1
    char_T = np.frombuffer(begins, dtype=np.uintc)[:-1].astype(np.int64)
    document_L, number_L = np.array(document, dtype=np.int64), np.array(number, dtype=np.int64)
    row_T = np.searchsorted(np.array(starts, dtype=np.int64), char_T, side="right") - 1
    if starts:
        stop_L = np.array([stop for _, stop in spans])[document_L]
        row_T[char_T >= stop_L[row_T]] = -1
    return Places(row_T, document_L, number_L)
