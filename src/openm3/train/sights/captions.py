"""Clip art and what it shows, by the names of its files."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from PIL import Image

from openm3.errors import DocumentError
from openm3.train.sights.canvas import Painter
from openm3.train.sights.sight import Sight

CAPTION_QUESTIONS = (
    "What is in the picture?",
    "What is in the picture?",
    "What does the picture show?",
    "What is this?",
)
CAPTION_SIZES = (84, 112, 112, 140)


@lru_cache(maxsize=512)
def _clip(path: Path) -> Image.Image:
    with Image.open(path) as image:
        drawn = image.convert("RGBA")
    drawn = drawn.crop(drawn.getchannel("A").getbbox())
    drawn.thumbnail((128, 128), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return drawn


def caption(painter: Painter) -> Sight:
    """One piece of clip art on a light ground. Raises DocumentError if the machine has no clip art."""
    rng = painter.rng
    if not painter.sources.clip_art:
        raise DocumentError("no clip art was found: docs/sights.md says what to install")
    # Every noun is as likely as any other: a thousand pieces show stars.
    path, noun = rng.choice(painter.sources.nouns[rng.choice(list(painter.sources.nouns))])
    side = rng.choice(CAPTION_SIZES)
    ground = rng.choice(((255, 255, 255), (255, 255, 255), (240, 240, 230), (225, 235, 245), (200, 225, 200)))
    image = Image.new("RGB", (side, side), ground)
    drawn = _clip(path)
    scale = (side - 6) / max(drawn.size) * rng.uniform(0.6, 1.0)
    drawn = drawn.resize((max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale))))
    x, y = rng.randint(2, side - drawn.width - 2), rng.randint(2, side - drawn.height - 2)
    image.paste(drawn, (x, y), drawn)
    article = "an" if noun[0] in "aeio" else "a"
    box = (x, y, x + drawn.width, y + drawn.height)
    return Sight(
        [painter.worn(image, 8)],
        None,
        rng.choice(CAPTION_QUESTIONS),
        f"It shows {article} {noun}.",
        None,
        "caption",
        box,
    )
