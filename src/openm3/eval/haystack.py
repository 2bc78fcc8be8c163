"""Haystacks: held-out source files of an exact length in tokens, pass keys hidden in them, and questions about them.

Everything is drawn from one seed, so that the same haystack can be read again by another model or another run.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from openm3.errors import DocumentError
from openm3.tokens.prompt import document_text, user_message
from openm3.tokens.tokenizer import Tokenizer
from openm3.train.corpus import DEFINITION, Source, standard_library, words
from openm3.train.tasks import (
    Question,
    definitions,
    insert_lines,
    key_line,
    key_question,
    quote_question,
    random_key,
    random_name,
    similar_name,
)

MIN_LENGTH = 512
"""The shortest haystack, in tokens, that has room for its needles."""


@dataclass(frozen=True)
class Asked:
    """A question, and where its answer stands: depth (0 the start, 1 the end) and file, None if absent."""

    question: Question
    depth: float | None
    file: str | None


@dataclass(frozen=True)
class Counts:
    """How many questions of each kind to ask of one haystack."""

    pass_keys: int
    quotes: int
    absences: int


@dataclass(frozen=True)
class Haystack:
    """Documents, (name, text) in order, and the questions about them."""

    documents: tuple[tuple[str, str], ...]
    asked: tuple[Asked, ...]

    def prompt(self, tokenizer: Tokenizer, question: str) -> list[int]:
        """Ids of the documents and one question, up to where the answer begins."""
        return tokenizer.chat(
            [{"role": "user", "content": user_message(self.documents, question)}], thinking="disabled"
        )

    def conversation(self, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """Ids of all questions, each with its answer, and the positions whose next token is of an answer or ends it."""
        messages: list[dict[str, str]] = []
        positions: list[int] = []
        for i, asked in enumerate(self.asked):
            text = asked.question.text if i else user_message(self.documents, asked.question.text)
            messages.append({"role": "user", "content": text})
            begin = len(tokenizer.chat(messages, thinking="disabled"))
            messages.append({"role": "assistant", "content": asked.question.answer})
            count = len(tokenizer.encode(asked.question.answer)) + 1
            positions += range(begin - 1, begin - 1 + count)
        return tokenizer.chat(messages, add_generation_prompt=False), positions


class HaystackMaker:
    """Makes haystacks from text that models were not trained on: by default the held-out standard library."""

    def __init__(self, tokenizer: Tokenizer, seed: int, sources: Sequence[Source] | None = None) -> None:
        self.sources = standard_library(held_out=True) if sources is None else sources
        self.words = words(self.sources)
        self.seed = seed
        a, b = (tokenizer.chat([{"role": "user", "content": text}]) for text in ("x", "y"))
        self._head = common_prefix(a, b)
        self._encode = tokenizer.encode
        self._count = lru_cache(maxsize=4096)(self._count_document)

    def make(self, length: int, index: int, counts: Counts) -> Haystack:
        """Haystack number `index`, the same every time: exactly `length` tokens come before the question."""
        if length < MIN_LENGTH:
            raise DocumentError(f"a haystack takes at least {MIN_LENGTH} tokens, not {length}")
        rng = random.Random(f"{self.seed}-{length}-{index}")
        keys: dict[str, str] = {}
        while len(keys) < counts.pass_keys:
            keys[random_name(self.words, rng)] = random_key(rng)
        needles = [(rng.random(), "# " + key_line(name, key)) for name, key in keys.items()]
        documents = self._documents(length, needles, rng)
        asked = [_where(documents, key_question(name, key), key_line(name, key)) for name, key in keys.items()]
        lines = definitions(documents)
        for name in rng.sample(sorted(lines), min(len(lines), counts.quotes)):
            asked.append(_where(documents, quote_question(name, lines[name]), None))
        for i in range(counts.absences):
            question = self._absent_key(documents, keys, rng) if i % 2 else self._absent_quote(documents, rng)
            asked.append(Asked(question, None, None))
        return Haystack(tuple((d.name, d.text) for d in documents), tuple(asked))

    def _documents(self, length: int, needles: list[tuple[float, str]], rng: random.Random) -> list[Source]:
        """Files in random order, the last one cut so that the tokens are exactly enough with the needles in them."""
        target = length - self._head
        for _ in range(20):
            files: list[Source] = []
            total = 0
            for source in rng.sample(self.sources, len(self.sources)):
                files.append(source)
                total += self._count(source.name, source.text)
                if total >= target:
                    break
            if total < target:
                raise DocumentError(f"the held-out files hold only {total} tokens: not enough for {length}")
            kept = self._kept(files, needles, target)
            if kept is not None:
                return _hide(_cut(files, kept), needles)
        raise DocumentError(f"found no files that can be cut to exactly {length} tokens")

    def _kept(self, files: list[Source], needles: list[tuple[float, str]], target: int) -> int | None:
        """How many characters of the files make exactly `target` tokens with the needles; None if no cut does."""
        whole = sum(len(f.text) for f in files)

        def count(kept: int) -> int:
            return sum(self._count(d.name, d.text) for d in _hide(_cut(files, kept), needles))

        kept, found = whole, count(whole)
        characters_per_token = whole / found
        for _ in range(40):
            if abs(found - target) <= 2:
                break
            kept = max(1, min(whole, kept - round((found - target) * characters_per_token)))
            found = count(kept)
        near = (kept + sign * step for step in range(100) for sign in (1, -1))
        return next((n for n in near if 0 < n <= whole and count(n) == target), None)

    def _count_document(self, name: str, text: str) -> int:
        return len(self._encode(document_text(name, text)))

    def _absent_key(self, documents: list[Source], keys: dict[str, str], rng: random.Random) -> Question:
        """A pass key that no document names: half of them like one that is there."""
        text = "".join(d.text for d in documents)
        while True:
            base = rng.choice(sorted(keys)) if keys and rng.random() < 0.5 else None
            name = similar_name(base, self.words, rng) if base else random_name(self.words, rng)
            if f"pass key for {name} is" not in text:
                return key_question(name, None)

    def _absent_quote(self, documents: list[Source], rng: random.Random) -> Question:
        """A name that no document defines: defined in another file, or called here but defined elsewhere."""
        text = "".join(d.text for d in documents)
        called = sorted(set(re.findall(r"\b([A-Za-z_]\w{3,})\(", text)))
        while True:
            elsewhere = sorted(definitions([rng.choice(self.sources)]))
            names = called if called and rng.random() < 0.4 else elsewhere
            if names and not re.search(rf"\b(def|class)\s+{re.escape(name := rng.choice(names))}\b", text):
                return quote_question(name, None)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _cut(files: Sequence[Source], kept: int) -> list[Source]:
    """The first `kept` characters of all files; every text ends with its last line, as prompts show it."""
    documents = []
    for file in files:
        text = file.text[:kept].rstrip()
        kept -= len(file.text)
        if text:
            documents.append(replace(file, text=text + "\n"))
        if kept <= 0:
            break
    return documents


def _hide(documents: list[Source], needles: Sequence[tuple[float, str]]) -> list[Source]:
    """The documents with every (depth, line) put in, depth counted over all their characters."""
    total = sum(len(d.text) for d in documents)
    hidden = []
    first = 0
    for i, document in enumerate(documents):
        end = first + len(document.text)
        last = i + 1 == len(documents)
        inside = [(d, line) for d, line in needles if first <= d * total and (last or d * total < end)]
        depths = [min(1.0, (d * total - first) / len(document.text)) for d, _ in inside]
        hidden.append(insert_lines(document, [line for _, line in inside], depths))
        first = end
    return hidden


def _where(documents: Sequence[Source], question: Question, sentence: str | None) -> Asked:
    """The question with the place of its answer: of a sentence, or else of the line that defines the subject."""
    total = sum(len(d.text) for d in documents)
    first = 0
    for document in documents:
        if sentence is not None:
            at = document.text.find(sentence)
        else:
            found = DEFINITION.finditer(document.text)
            at = next((m.start(1) for m in found if m.group(2) == question.subject), -1)
        if at >= 0:
            return Asked(question, (first + at) / total, document.name)
        first += len(document.text)
    raise AssertionError(f"no document answers {question.text!r}")
