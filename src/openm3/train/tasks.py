"""Long-context tasks with checkable answers: pass keys, quotes and absence, inserted into or taken from real text.

A pass key is a line of its own somewhere in the documents. A quote asks for the line that defines a function or class
of the documents. Absence asks for one of either that is not there; the only right answer says so.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from openm3.train.corpus import DEFINITION, Source

KEY_QUESTIONS = (
    "What is the pass key for {}?",
    "What is the pass key for {}?",
    "What is the pass key for {}?",
    "Tell me the pass key for {}.",
)
QUOTE_QUESTIONS = (
    "Quote the line that defines {}.",
    "Quote the line that defines {}.",
    "Quote the line that defines {}.",
    "Where is {} defined?",
    "Show me the definition of {}.",
)
_KEY_LINE_PREFIXES = ("# ", "# ", "", "// ", "NOTE: ", "    # ")


@dataclass(frozen=True)
class Question:
    """A question, the one right answer, and which task it is: "pass_key", "quote" or "absence"."""

    kind: str
    text: str
    answer: str
    subject: str


def key_line(name: str, key: str) -> str:
    """The sentence that a document must hold for the pass key to be findable."""
    return f"The pass key for {name} is {key}."


def key_question(name: str, key: str | None, template: str = KEY_QUESTIONS[0]) -> Question:
    """Ask for a pass key; `key=None` means that it is not there."""
    answer = f"The pass key for {name} is not there." if key is None else key_line(name, key)
    return Question("absence" if key is None else "pass_key", template.format(name), answer, name)


def quote_question(name: str, line: str | None, template: str = QUOTE_QUESTIONS[0]) -> Question:
    """Ask for the line that defines a name; `line=None` means that nothing defines it."""
    answer = f"The line that defines {name} is {'not there.' if line is None else line}"
    return Question("absence" if line is None else "quote", template.format(name), answer, name)


def random_name(words: Sequence[str], rng: random.Random) -> str:
    """A made-up name: one to three words in one of several spellings, sometimes with a number."""
    parts = [rng.choice(words) for _ in range(rng.choice((1, 2, 2, 2, 3)))]
    style = rng.randrange(5)
    if style == 0:
        name = "-".join(p.lower() for p in parts)
    elif style == 1:
        name = "_".join(p.lower() for p in parts)
    elif style == 2:
        name = "".join(p.capitalize() for p in parts)
    elif style == 3:
        name = " ".join(p.lower() for p in parts)
    else:
        name = "_".join(p.upper() for p in parts)
    return f"{name}{rng.choice('-_ ')}{rng.randrange(100)}" if rng.random() < 0.2 else name


def similar_name(name: str, words: Sequence[str], rng: random.Random) -> str:
    """Another name that shares most of this one: what a careless reader would take for it."""
    pieces = re.split(r"([-_ ])", name)
    if len(pieces) == 1:
        return name + rng.choice(("_", "-")) + rng.choice(words).lower()
    at = rng.randrange(0, len(pieces), 2)
    pieces[at] = str(rng.randrange(100)) if pieces[at].isdigit() else rng.choice(words).lower()
    changed = "".join(pieces)
    return changed if changed != name else name + "2"


def lookalike(name: str, words: Sequence[str], rng: random.Random) -> str:
    """Another identifier with one of this one's parts exchanged: ReadTimeout, SocketTimeout; open_file, open_socket."""
    parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+|[^A-Za-z0-9]+", name)
    at = rng.choice([i for i, part in enumerate(parts) if part[0].isalnum()])
    word = rng.choice(words).lower()
    if parts[at].isupper():
        word = word.upper()
    elif parts[at][0].isupper():
        word = word.capitalize()
    return "".join([*parts[:at], word, *parts[at + 1 :]])


def random_key(rng: random.Random, num_digits: int = 5) -> str:
    """A pass key of that many digits."""
    return "".join(rng.choice("0123456789") for _ in range(num_digits))


def definitions(documents: Sequence[Source], max_chars: int = 100) -> dict[str, str]:
    """Functions and classes that the documents define exactly once, on a line of at most `max_chars`: name -> line."""
    found = [m for d in documents for m in DEFINITION.finditer(d.text)]
    counts = Counter(m.group(2) for m in found)
    return {m.group(2): m.group(1) for m in found if counts[m.group(2)] == 1 and len(m.group(1)) <= max_chars}


def insert_lines(document: Source, lines: Sequence[str], depths: Sequence[float]) -> Source:
    """The document with each line put in at its depth (0 the start, 1 the end), between whole lines."""
    kept = document.text.splitlines(keepends=True)
    if kept and not kept[-1].endswith("\n"):
        kept[-1] += "\n"
    at = sorted(zip((round(d * len(kept)) for d in depths), lines, strict=True), reverse=True)
    for index, line in at:
        kept.insert(index, line + "\n")
    return replace(document, text="".join(kept))


class TaskMaker:
    """Makes documents with questions from sources, all randomness from one generator."""

    def __init__(self, sources: Sequence[Source], words: Sequence[str], rng: random.Random) -> None:
        self.sources = sources
        self.words = words
        self.rng = rng
        self._foreign_names = sorted({m for s in rng.sample(sources, min(60, len(sources))) for m in definitions([s])})

    def make(
        self, documents: list[Source], num_questions: int, num_decoys: int = 2, lookalikes: float = 0.0
    ) -> tuple[list[Source], list[Question]]:
        """Insert pass keys into the documents and ask: about 42% pass keys, 30% quotes, 28% absence.

        Up to `num_decoys` pass keys that nobody asks for go in as well. Of the names that are not there, at least
        `lookalikes` are one part away from a name that is, or used in the documents without being defined there.
        """
        rng = self.rng
        lines = definitions(documents)
        kinds = rng.choices(("pass_key", "quote", "absence"), (0.42, 0.3, 0.28), k=num_questions)
        num_keys = kinds.count("pass_key") + rng.randint(0, num_decoys)
        keys = self._keys(num_keys)
        quotable = rng.sample(sorted(lines), min(len(lines), num_questions))
        documents = self._insert(documents, keys)
        asked = iter(keys)
        questions = []
        for kind in kinds:
            if kind == "pass_key":
                name = next(asked)
                questions.append(key_question(name, keys[name], rng.choice(KEY_QUESTIONS)))
            elif kind == "quote" and quotable:
                name = quotable.pop()
                questions.append(quote_question(name, lines[name], rng.choice(QUOTE_QUESTIONS)))
            elif rng.random() < lookalikes:
                questions.append(self._near_miss(documents, keys, lines))
            else:
                questions.append(self._absence(documents, keys))
        rng.shuffle(questions)
        return documents, questions

    def _keys(self, count: int) -> dict[str, str]:
        rng = self.rng
        keys: dict[str, str] = {}
        while len(keys) < count:
            base = rng.choice(sorted(keys)) if keys and rng.random() < 0.25 else None
            name = similar_name(base, self.words, rng) if base else random_name(self.words, rng)
            keys[name] = random_key(rng, rng.choice((4, 5, 5, 5, 6)))
        return keys

    def _insert(self, documents: list[Source], keys: dict[str, str]) -> list[Source]:
        rng = self.rng
        places: dict[int, list[str]] = {}
        weights = [len(d.text) for d in documents]
        prefix = rng.choice(_KEY_LINE_PREFIXES)
        for name, key in keys.items():
            places.setdefault(rng.choices(range(len(documents)), weights)[0], []).append(prefix + key_line(name, key))
        return [
            insert_lines(d, places[i], [rng.random() for _ in places[i]]) if i in places else d
            for i, d in enumerate(documents)
        ]

    def _near_miss(self, documents: list[Source], keys: dict[str, str], lines: dict[str, str]) -> Question:
        """A name that is not there but could be taken for one that is."""
        rng = self.rng
        text = "".join(d.text for d in documents)
        for _ in range(20):
            kind = rng.random()
            if keys and kind < 0.35:
                name = lookalike(rng.choice(sorted(keys)), self.words, rng)
                if f"pass key for {name} is" not in text:
                    return key_question(name, None, rng.choice(KEY_QUESTIONS))
            used = re.findall(r"\b([A-Za-z_]\w{3,})\(", text) if kind < 0.7 else []
            named = [lookalike(name, self.words, rng) for name in rng.sample(sorted(lines), min(1, len(lines)))]
            name = rng.choice(used or named or self._foreign_names)
            if not re.search(rf"\b(def|class)\s+{re.escape(name)}\b", text):
                return quote_question(name, None, rng.choice(QUOTE_QUESTIONS))
        return self._absence(documents, keys)

    def _absence(self, documents: list[Source], keys: dict[str, str]) -> Question:
        """A name with no pass key or no definition: fresh, like one that is there, or there but not so."""
        rng = self.rng
        text = "".join(d.text for d in documents)
        while True:
            if rng.random() < 0.5:
                base = rng.choice(sorted(keys)) if keys and rng.random() < 0.5 else None
                name = similar_name(base, self.words, rng) if base else random_name(self.words, rng)
                if f"pass key for {name} is" not in text:
                    return key_question(name, None, rng.choice(KEY_QUESTIONS))
            name = rng.choice(self._foreign_names)
            used = re.findall(r"\b([A-Za-z_]\w{3,})\(", text)
            if used and rng.random() < 0.4:
                name = rng.choice(used)
            if not re.search(rf"\b(def|class)\s+{re.escape(name)}\b", text):
                return quote_question(name, None, rng.choice(QUOTE_QUESTIONS))
