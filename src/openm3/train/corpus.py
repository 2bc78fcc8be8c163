"""Text found on any machine: the source and documentation of Python's standard library.

Files are split for good by a hash of their path: about one in eight is held out and never trained on, so evaluations
insert their questions into text the model has not seen.
"""

from __future__ import annotations

import hashlib
import random
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from openm3.errors import DocumentError

HELD_OUT_ONE_IN = 8
DEFINITION = re.compile(r"^[ \t]*((?:async[ ]+def|def|class)[ ]+([A-Za-z_]\w*)\b.*?)[ \t]*$", re.MULTILINE)
"""A line that defines a function or class: group 1 the line without indentation, group 2 the name."""

_WORD = re.compile(r"[A-Za-z][a-z]{2,11}")


@dataclass(frozen=True)
class Source:
    """One text file: its path below the library, with forward slashes, and its text."""

    name: str
    text: str

    @cached_property
    def line_starts(self) -> list[int]:
        return [0, *(m.end() for m in re.finditer("\n", self.text))]


def standard_library(*, held_out: bool, tests: bool = True) -> list[Source]:
    """The Python files of this interpreter's standard library, sorted by path: the held-out part or the training part.

    `tests=False` leaves out the library's own test suites. Raises DocumentError if there is no library to read.
    """
    root = Path(sysconfig.get_path("stdlib"))
    sources = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages/" in name or (not tests and re.search(r"(^|/)(idle_)?tests?/", name)):
            continue
        if is_held_out(name) != held_out:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if len(text) > 400 and "\0" not in text:
            sources.append(Source(name, text))
    if not sources:
        raise DocumentError(f"no Python source under {root}: this interpreter comes without its standard library")
    return sources


def is_held_out(name: str) -> bool:
    """Whether the file is kept from training, by a hash of its path: the same on every machine."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def words(sources: Sequence[Source], limit: int = 20_000) -> list[str]:
    """The distinct words of some sources, sorted: what random names are made of."""
    found: set[str] = set()
    for source in sources:
        found.update(_WORD.findall(source.text))
        if len(found) >= limit:
            break
    return sorted(found)


def outline(source: Source) -> Source:
    """Only the lines that define something and the line after each: as hard a text to look things up in as there is."""
    kept = re.findall(rf"{DEFINITION.pattern}(\n.*)?", source.text, re.MULTILINE)
    return Source(source.name, "".join(f"{line}{after}\n" for line, _, after in kept))


def excerpt(source: Source, num_chars: int, rng: random.Random) -> str:
    """Whole lines from a random place, at least `num_chars` long unless the file ends before."""
    starts = source.line_starts
    last = max(0, len(source.text) - num_chars)
    candidates = [s for s in (rng.choice(starts) for _ in range(8)) if s <= last]
    begin = candidates[0] if candidates else 0
    end = source.text.find("\n", begin + num_chars)
    return source.text[begin : len(source.text) if end < 0 else end + 1]


def gather(sources: Sequence[Source], num_chars: int, rng: random.Random) -> list[Source]:
    """Excerpts of distinct random files, about `num_chars` in all."""
    parts: list[Source] = []
    left = num_chars
    for source in rng.sample(sources, len(sources)):
        text = excerpt(source, left, rng)
        parts.append(Source(source.name, text))
        left -= len(text)
        if left <= 200:
            break
    return parts
