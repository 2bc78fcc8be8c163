"""Questions that m3-tiny can answer, with what it says to them when nobody stands between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openm3
from openm3.model.model import Model

SOURCE = Path(openm3.__file__).with_name("errors.py")

NAMES = ("OpenM3Error", "ConfigError", "DocumentError", "BusyError")


@dataclass(frozen=True)
class Question:
    """A conversation, its ids without thinking, and the model's likeliest reply with the end token."""

    messages: Any
    ids: list[int]
    reply: list[int]
    answer: str


def asked(model: Model, names: Sequence[str] = NAMES) -> list[Question]:
    """For each name a question about the line that defines it."""
    tokenizer = model.tokenizer
    questions = []
    for name in names:
        text = f"{SOURCE.read_text()}\n\nQuote the line that defines {name}."
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.chat(messages, thinking="disabled")
        reply = list(model.generate(ids, max_new_tokens=64, stop_ids=[tokenizer.eos_id]))
        questions.append(Question(messages, ids, [*reply, tokenizer.eos_id], tokenizer.decode(reply)))
    return questions
