"""All kinds of sights and how often each is made."""

from __future__ import annotations

import random
from collections.abc import Callable

from openm3.errors import ConfigError
from openm3.train.sights import captions, charts, screens, shapes, text, videos
from openm3.train.sights.canvas import Painter
from openm3.train.sights.sight import Sight
from openm3.train.sights.sources import Sources, find_sources

KINDS: dict[str, tuple[float, Callable[[Painter], Sight]]] = {
    "number": (14, text.number),
    "word": (22, text.word),
    "text": (7, text.text),
    "colour": (6, shapes.colour),
    "shape": (5, shapes.shape),
    "count": (7, shapes.count),
    "position": (5, shapes.position),
    "where": (12, lambda painter: painter.rng.choice((shapes.where_shape, text.where_word))(painter)),
    "chart": (6, charts.chart),
    "screen": (7, screens.screen),
    "video": (4, videos.video),
    "minute": (1, videos.minute),
    "video_number": (1, videos.video_number),
    "caption": (4, captions.caption),
}
"""Every kind: its weight, and what makes one."""

WRITING = "writing"
"""The kind that asks nothing: pictures full of words."""


class SightMaker:
    """Endless pictures and short videos with questions, all randomness from one seed.

    `held_out=True` draws from the fonts, photos, clip art and words that are never trained on. `sources` replaces what
    the machine has. Raises DocumentError if the machine has too few fonts or photos.
    """

    def __init__(self, seed: int | random.Random, held_out: bool, sources: Sources | None = None) -> None:
        rng = seed if isinstance(seed, random.Random) else random.Random(seed)
        self._painter = Painter(sources or find_sources(held_out=held_out), rng)
        self._kinds = [k for k in KINDS if k != "caption" or self._painter.sources.clip_art]
        self._weights = [KINDS[k][0] for k in self._kinds]

    def make(self, kind: str | None = None) -> Sight:
        """One sight, of any kind by weight or of the one given. Raises ConfigError for a kind that is not known."""
        if kind == WRITING:
            return text.writing(self._painter)
        if kind is None:
            kind = self._painter.rng.choices(self._kinds, self._weights)[0]
        if kind not in KINDS:
            raise ConfigError(f"there is no kind of sight {kind!r}: it is one of {', '.join(KINDS)}")
        return KINDS[kind][1](self._painter)
