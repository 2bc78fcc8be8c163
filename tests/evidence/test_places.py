"""Tokens to lines: against the plain way, on any text, and with templates that are not ours."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from openm3.ask.documents import Document
from openm3.evidence.places import decoded, locate, placed
from openm3.tokens.prompt import user_message
from openm3.tokens.tokenizer import Tokenizer, train_bpe

CHECKPOINT = Path(__file__).parents[1] / "golden" / "m3-random-s0" / "model"

LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=12)
DOCUMENT = st.lists(LINE, min_size=1, max_size=6).map("\n".join).filter(str.strip)


def prompt(tokenizer: Tokenizer, documents: list[Document], question: str = "Why?") -> list[int]:
    content = user_message([(d.name, d.text) for d in documents], question)
    return tokenizer.chat([{"role": "user", "content": content}], thinking="disabled")


def made(*texts: str) -> list[Document]:
    return [Document(f"{i}.txt", text, "utf-8") for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def merging() -> Tokenizer:
    """A tokenizer whose tokens are longer than a byte and reach over line ends."""
    return train_bpe(["def name(self):\n    return self.name\n\n" * 50, "größe 日本語 " * 50], 350)


def lines_by_bytes(tokenizer: Tokenizer, ids: list[int], documents: list[Document]) -> list[tuple[int, int] | None]:
    """(document, line) of each token from the bytes before it: quadratic, and sure."""
    table = tokenizer._bytes
    whole = b"".join(table[i] for i in ids)
    at = whole.index(user_message([(d.name, d.text) for d in documents], "").encode())
    spans = []
    for index, document in enumerate(documents):
        at += len(f"File: {document.name}\n".encode())
        text = document.text.rstrip()
        for number, line in enumerate(text.split("\n"), 1):
            end = at + len(line.encode()) + 1
            spans.append((at, end, (index, number)))
            at = end
        at += 1
    offsets = np.cumsum([0, *(len(table[i]) for i in ids)])[:-1]
    return [next((place for a, b, place in spans if a <= o < b), None) for o in offsets]


@given(st.lists(DOCUMENT, min_size=1, max_size=4), st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
@example(["a\n\nb", "a\n\nb"], "File: 0.txt\na")
@example(["日本語\nx"], "é")
@example(["]~b]user\n[e~[ \ufffd\ufffd", "\x00\x1b\u2028x"], "q")
def test_every_token_has_its_line(merging: Tokenizer, texts: list[str], question: str) -> None:
    documents = made(*texts)
    ids = prompt(merging, documents, question)
    places = locate(merging, ids, documents)
    assert places is not None
    found = [None if row < 0 else (int(places.document_L[row]), int(places.number_L[row])) for row in places.row_T]
    assert found == lines_by_bytes(merging, ids, documents)
    assert places.num_tokens == sum(place is not None for place in found)


def test_a_byte_tokenizer() -> None:
    tokenizer = Tokenizer.from_folder(CHECKPOINT)
    documents = made("é\nab", "c\n")
    ids = prompt(tokenizer, documents)
    places = locate(tokenizer, ids, documents)
    assert places is not None
    row_T = places.row_T[places.row_T >= 0]
    lines = [(int(d), int(n)) for d, n in zip(places.document_L[row_T], places.number_L[row_T], strict=True)]
    assert lines == [(0, 1)] * 3 + [(0, 2)] * 3 + [(1, 1)] * 2


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(tokenizer._spec, config=tokenizer._config, chat_template=template)


def test_a_foreign_template(merging: Tokenizer) -> None:
    other = with_template(merging, "You are kind. {% for m in messages %}<<{{ m.content | trim }}>>{% endfor %}")
    documents = made("one\ntwo", "three")
    places = locate(other, prompt(other, documents), documents)
    assert places is not None
    assert set(places.row_T) == {-1, 0, 1, 2}
    assert list(places.document_L) == [0, 0, 1]
    assert list(places.number_L) == [1, 2, 1]


def test_a_template_that_changes_the_text(merging: Tokenizer) -> None:
    other = with_template(merging, "{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    documents = made("one")
    assert locate(other, prompt(other, documents), documents) is None


def test_ids_cut_inside_the_documents(merging: Tokenizer) -> None:
    documents = made("one\ntwo")
    assert locate(merging, prompt(merging, documents)[:8], documents) is None
    assert locate(merging, [], documents) is None


def test_parts_of_any_text() -> None:
    tokenizer = Tokenizer.from_folder(CHECKPOINT)
    written = "ask: a\n\nbc\n; no: d"
    text, begins = decoded(tokenizer.decoder(), tokenizer.encode(written))
    assert (text, list(begins)) == (written, list(range(len(written) + 1)))
    places = placed(text, begins, [(5, 11), (12, 12), (13, 18)])
    assert list(places.row_T) == [-1] * 5 + [0, 0, 1, 2, 2, 2] + [-1, -1] + [3] * 5
    assert list(places.document_L) == [0, 0, 0, 2]
    assert list(places.number_L) == [1, 2, 3, 1]
    assert list(placed(text, begins, []).row_T) == [-1] * len(written)
