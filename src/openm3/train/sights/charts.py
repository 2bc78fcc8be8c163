"""Small bar, line and pie charts."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw

from openm3.train.sights.canvas import Box, Colour, Painter
from openm3.train.sights.shapes import COLOURS, random_shade, standing_out
from openm3.train.sights.sight import Sight
from openm3.train.sights.sources import font
from openm3.train.sights.text import random_word

COLOUR_NAMES = tuple(COLOURS)
CHART_SIZES = ((112, 112), (140, 112), (140, 140), (168, 112), (168, 140), (196, 140))
_PAPERS: tuple[tuple[Colour, Colour], ...] = (
    ((255, 255, 255), (0, 0, 0)),
    ((255, 255, 255), (60, 60, 60)),
    ((245, 245, 238), (30, 30, 60)),
    ((28, 30, 36), (235, 235, 235)),
    ((0, 0, 0), (255, 255, 255)),
    ((228, 236, 244), (20, 20, 20)),
)


def chart(painter: Painter) -> Sight:
    """A chart of one of the three sorts."""
    return painter.rng.choice((_bars, _bars, _line, _pie))(painter)


class _Page:
    """Paper with a plain font for labels."""

    def __init__(self, painter: Painter) -> None:
        self.painter = painter
        self.width, self.height = painter.rng.choice(CHART_SIZES)
        self.paper, self.ink = painter.rng.choice(_PAPERS)
        self.image = Image.new("RGB", (self.width, self.height), self.paper)
        self.draw = ImageDraw.Draw(self.image)
        self.face = painter.sources.face(painter.rng)

    def label(self, text: str, x: float, y: float, size: int, anchor: str = "mm") -> Box:
        """Write a text with its anchor at a point; returns its box."""
        chosen = font(self.face, size)
        self.draw.text((x, y), text, font=chosen, fill=self.ink, anchor=anchor)
        left, top, right, bottom = self.draw.textbbox((x, y), text, font=chosen, anchor=anchor)
        return math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)

    def size(self, texts: list[str], width: float, highest: int = 14) -> int | None:
        """A font size with which every text is at most that wide, its capitals 8 pixels high or more."""
        longest = max(texts, key=font(self.face, 40).getlength)
        return self.painter.fitting(longest, self.face, int(width), highest + 8, 8, highest)

    def colours(self, num: int) -> list[str]:
        """Names of colours that stand out from the paper."""
        return self.painter.rng.sample(standing_out(Image.new("RGB", (12, 12), self.paper)), num)

    def sight(self, question: str, answer: str, spelled: str | None, box: Box | None = None) -> Sight:
        return Sight([self.painter.worn(self.image, 7)], None, question, answer, spelled, "chart", box)


def _labels(painter: Painter, num: int) -> list[str]:
    """Names of bars or points: letters, years or short words."""
    style = painter.rng.random()
    if style < 0.25:
        first = painter.rng.randint(1, 60)
        return [str(first + i) for i in range(num)]
    if style < 0.5:
        words = list(dict.fromkeys(random_word(painter, 4) for _ in range(2 * num)))
        if len(words) >= num:
            return words[:num]
    return list("ABCDEFGH"[:num])


def _bars(painter: Painter) -> Sight:
    """Three to six bars with names below and, at times, values above."""
    rng = painter.rng
    while True:
        page = _Page(painter)
        num = rng.randint(3, 6)
        names = _labels(painter, num)
        values = rng.sample(range(1, 10), num)
        unit = rng.choice((1, 1, 5, 10))
        written = [str(v * unit) for v in values]
        step = (page.width - 8) / num
        size = page.size([*names, *written], step - 4)
        if size is not None:
            break
    with_values = rng.random() < 0.6
    one_colour = rng.random() < 0.5
    shades = [random_shade(c, rng) for c in page.colours(6)]
    floor, top = page.height - size * 1.4 - 3, size * 1.4 + 3
    for i, (name, value) in enumerate(zip(names, values, strict=True)):
        left = 4 + i * step
        y = floor - (floor - top) * value / max(values)
        page.draw.rectangle((left + step * 0.15, y, left + step * 0.85, floor), fill=shades[0 if one_colour else i])
        page.label(name, left + step / 2, page.height - 3 - size * 0.25, size, "ms")
        if with_values:
            page.label(written[i], left + step / 2, y - 2, size, "mb")
    page.draw.line((3, floor, page.width - 3, floor), fill=page.ink)
    asked = rng.randrange(num)
    if with_values and rng.random() < 0.5:
        question = rng.choice(("What is the value of {}?", "How high is bar {}?", "Which value has {}?"))
        return page.sight(question.format(names[asked]), f"The value is {written[asked]}.", written[asked])
    return _extreme(page, names, values, rng.choice(("bar", "bar", "column")))


def _extreme(page: _Page, names: list[str], values: list[int], thing: str) -> Sight:
    """Ask for the highest or the lowest."""
    most = page.painter.rng.random() < 0.6
    name = names[values.index(max(values) if most else min(values))]
    word = (
        page.painter.rng.choice(("highest", "tallest") if most else ("lowest", "shortest"))
        if thing != "point"
        else ("highest" if most else "lowest")
    )
    return page.sight(f"Which {thing} is the {word}?", f"It is {name}.", name)


def _line(painter: Painter) -> Sight:
    """A line through four to six named points."""
    rng = painter.rng
    while True:
        page = _Page(painter)
        num = rng.randint(4, 6)
        names = _labels(painter, num)
        step = (page.width - 12) / num
        size = page.size(names, step - 4)
        if size is not None:
            break
    trend = rng.random() < 0.4
    values = rng.sample(range(10), num)
    rises = rng.random() < 0.5
    if trend:
        values.sort(reverse=not rises)
    shade = random_shade(page.colours(1)[0], rng)
    floor, top = page.height - size * 1.4 - 6, 8
    points = [(6 + (i + 0.5) * step, floor - (floor - top) * v / 9) for i, v in enumerate(values)]
    page.draw.line(points, fill=shade, width=rng.choice((1, 2, 3)), joint="curve")
    for (x, y), name in zip(points, names, strict=True):
        if rng.random() < 0.9:
            page.draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=shade)
        page.label(name, x, page.height - 3 - size * 0.25, size, "ms")
    page.draw.line((3, floor + 3, page.width - 3, floor + 3), fill=page.ink)
    if trend:
        question = rng.choice(("Does the line rise or fall?", "Does the line go up or down?"))
        up, down = ("It rises.", "It falls.")
        return page.sight(question, up if rises else down, None)
    return _extreme(page, names, values, "point")


def _pie(painter: Painter) -> Sight:
    """Two to five slices, told apart by colour, no two of like size."""
    rng = painter.rng
    page = _Page(painter)
    num = rng.randint(2, 5)
    names = page.colours(num)
    shares = [s + 0.4 for s in rng.sample(range(1, 8), num)]
    side = min(page.width, page.height) - 2 * rng.randint(4, 14)
    left, top = rng.randint(2, page.width - side - 2), rng.randint(2, page.height - side - 2)
    # Four times as large and reduced: slices have no jagged edges.
    big = Image.new("RGB", (4 * side, 4 * side), page.paper)
    draw = ImageDraw.Draw(big)
    angle = first = rng.uniform(0, 360)
    for name, share in zip(names, shares, strict=True):
        end = angle + 360 * share / sum(shares)
        draw.pieslice(
            (0, 0, 4 * side - 1, 4 * side - 1),
            angle,
            end if name != names[-1] else first + 360,
            fill=random_shade(name, rng),
        )
        angle = end
    page.image.paste(big.reduce(4), (left, top))
    most = rng.random() < 0.6
    name = names[shares.index(max(shares) if most else min(shares))]
    question = rng.choice(("Which slice is the {}?", "Which colour has the {} slice?"))
    return page.sight(
        question.format(rng.choice(("largest", "biggest")) if most else "smallest"), f"It is {name}.", None
    )
