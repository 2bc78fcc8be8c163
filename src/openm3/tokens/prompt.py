"""How documents and a question become one user message: training, `openm3 ask` and the evaluations share the form."""

from __future__ import annotations

from collections.abc import Iterable


def document_text(name: str, text: str) -> str:
    """One document as the model reads it: a line that names it, its text, and an empty line."""
    return f"File: {name}\n{text.rstrip()}\n\n"


def user_message(documents: Iterable[tuple[str, str]], question: str) -> str:
    """The whole user message: every (name, text) document, then the question."""
    return "".join(document_text(name, text) for name, text in documents) + question
