"""What a model sees of held-out pictures and videos: cases with one right answer each, and their scores.

Fonts, photos, clip art and words of the cases are never trained on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from openm3.errors import ConfigError
from openm3.eval.haystack import Counts, HaystackMaker
from openm3.tokens.prompt import user_message
from openm3.tokens.tokenizer import Tokenizer
from openm3.train.corpus import Source
from openm3.train.pictures import Sight, SightMaker
from openm3.train.sights.sources import Sources
from openm3.train.sights.text import NUMBER_QUESTIONS

POINT = re.compile(r"At \((\d\d), (\d\d)\)\.")
SECOND = re.compile(r"At (\d+) seconds?\.")

GOALS = {
    "number": 0.95,
    "word": 0.85,
    "colour": 0.95,
    "shape": 0.95,
    "count": 0.95,
    "where": 0.9,
    "minute": 0.9,
}
"""The share of cases of a kind that the bundled model is to answer right."""


def sight_cases(kind: str, count: int, seed: int = 0, sources: Sources | None = None) -> list[Sight]:
    """`count` held-out cases of a kind, the same every time.

    `sources` replaces what the machine has. Raises ConfigError for a kind that is not known, and DocumentError if the
    machine has too few fonts or photos.
    """
    maker = SightMaker(seed, held_out=True, sources=sources)
    return [maker.make(kind) for _ in range(count)]


def is_right(sight: Sight, answer: str) -> bool:
    """Whether an answer, without the space around it, is right.

    A point is if it lies in the target, a second if it is at most one away, anything else if it is as expected.
    """
    answer = answer.strip()
    if POINT.fullmatch(sight.answer):
        assert sight.target is not None
        point = POINT.fullmatch(answer)
        return point is not None and _inside(sight, int(point[1]), int(point[2]))
    if SECOND.fullmatch(sight.answer):
        assert sight.at is not None
        second = SECOND.fullmatch(answer)
        return second is not None and abs(int(second[1]) - sight.at) <= 1
    return answer == sight.answer


def _inside(sight: Sight, x: int, y: int) -> bool:
    """Whether the middle of a hundredth from the left and from the top lies in the target."""
    assert sight.target is not None
    height, width, _ = sight.frames[0].shape
    left, top, right, bottom = sight.target
    across, down = (x + 0.5) / 100 * width, (y + 0.5) / 100 * height
    return bool(left <= across < right and top <= down < bottom)


@dataclass(frozen=True, eq=False)
class Score:
    """How a kind was answered: how many cases there were, and the wrong answers with their cases."""

    kind: str
    count: int
    wrong: tuple[tuple[Sight, str], ...]

    @property
    def share(self) -> float:
        """Right answers, 0 to 1."""
        return 1 - len(self.wrong) / self.count


@dataclass(frozen=True, eq=False)
class ImageNeedle:
    """A picture of a number amid text: `before`, the picture of `sight`, `after`, which ends with the question.

    `depth` says where the picture stands, 0 at the start of the text and 1 at its end.
    """

    before: str
    sight: Sight
    after: str
    depth: float


class ImageNeedleMaker:
    """Hides pictures in held-out text: by default the files of the standard library that are never trained on."""

    def __init__(
        self, tokenizer: Tokenizer, seed: int, texts: Sequence[Source] | None = None, sources: Sources | None = None
    ) -> None:
        self._texts = HaystackMaker(tokenizer, seed, texts)
        self._seed = seed
        self._sources = sources

    def make(self, length: int, index: int, count: int) -> ImageNeedle:
        """Needle `index` of `count`, the same every time: its depth is in the middle of that part of 0 to 1.

        `length` is the number of tokens before the question, those of the picture not counted, to within the few that
        parting the text may change. Raises ConfigError for an index that is not below `count`, DocumentError for a
        length that no haystack can have.
        """
        if not 0 <= index < count:
            raise ConfigError(f"needle {index} is not one of {count}: give 0 to {count - 1}")
        maker = SightMaker(random.Random(f"{self._seed}-{length}-{index}"), held_out=True, sources=self._sources)
        sight = replace(maker.make("number"), question=NUMBER_QUESTIONS[0])
        haystack = self._texts.make(length, index, Counts(0, 0, 0))
        text = user_message(haystack.documents, "")
        depth = (index + 0.5) / count
        # Between two lines.
        at = text.find("\n", int(depth * len(text))) + 1
        return ImageNeedle(text[:at], sight, text[at:] + sight.question, at / len(text))
