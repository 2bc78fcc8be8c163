"""Which line of which document each token of a prompt belongs to, from the ids alone.

The ids are decoded one by one, so every token gets the character that it begins at; the documents' part of the prompt
is one string, found in the decoded text whatever the chat template puts around it. Linear in the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openm3.ask.documents import Document
from openm3.tokens.prompt import document_text
from openm3.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Places:
    """The lines of all documents in a row, and the line of each token.

    `row_T[t]` is the line that token t begins in, -1 outside of the documents' text. Row i is line `number_L[i]`
    (from 1) of document `document_L[i]`.
    """

    row_T: NDArray[np.int64]
    document_L: NDArray[np.int64]
    number_L: NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        """Tokens that belong to the documents' text."""
        return int((self.row_T >= 0).sum())


def locate(tokenizer: Tokenizer, ids: Sequence[int], documents: Sequence[Document]) -> Places | None:
    """The places of a prompt's tokens; None if the documents do not stand in it as `user_message` writes them."""
    decoder = tokenizer.decoder()
    char_T = np.empty(len(ids), dtype=np.int64)
    parts: list[str] = []
    end = 0
    for t, token in enumerate(ids):
        char_T[t] = end
        parts.append(decoder.push(token))
        end += len(parts[-1])
    parts.append(decoder.finish())
    written = [document_text(d.name, d.text) for d in documents]
    section = "".join(written)
    start = "".join(parts).find(section)
    if start < 0:
        return None
    return _places(char_T - start, written, len(section))


def _places(char_T: NDArray[np.int64], written: Sequence[str], length: int) -> Places:
    """`char_T` counts from the start of the section, which is all of `written`, joined."""
    begins: list[int] = []
    document: list[int] = []
    number: list[int] = []
    offset = 0
    for i, text in enumerate(written):
        # The first line is the name, the last the empty one that parts documents: neither is of the document.
        lines = text.split("\n")
        last = len(lines) - 2
        for k, line in enumerate(lines[:-1]):
            begins.append(offset)
            document.append(i)
            number.append(k if k < last else 0)
            offset += len(line) + 1
    number_L = np.array(number, dtype=np.int64)
    row_T = np.searchsorted(np.array(begins), char_T, side="right") - 1
    outside = (char_T < 0) | (char_T >= length) | (number_L[row_T.clip(min=0)] == 0)
    return Places(np.where(outside, -1, row_T), np.array(document, dtype=np.int64), number_L)
