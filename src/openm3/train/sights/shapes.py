"""Pictures of coloured shapes: their colours, kinds, numbers and places."""

from __future__ import annotations

import colorsys
import math
import random
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from openm3.train.sights.canvas import Box, Colour, Painter, distance, paste
from openm3.train.sights.sight import Sight, point_text
from openm3.train.sights.text import free_place

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "heart", "ring")
COLOURS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-5, 4), (0.85, 1.0), (0.75, 0.95)),
    "orange": ((27, 34), (0.9, 1.0), (0.95, 1.0)),
    "yellow": ((52, 57), (0.75, 1.0), (0.92, 1.0)),
    "green": ((108, 145), (0.65, 1.0), (0.4, 0.75)),
    "blue": ((214, 238), (0.75, 1.0), (0.65, 0.95)),
    "purple": ((272, 286), (0.6, 0.85), (0.45, 0.65)),
    "pink": ((325, 342), (0.3, 0.5), (0.97, 1.0)),
    "brown": ((20, 28), (0.6, 0.75), (0.42, 0.55)),
    "black": ((0, 360), (0.0, 0.1), (0.0, 0.08)),
    "white": ((0, 360), (0.0, 0.03), (0.96, 1.0)),
    "grey": ((0, 360), (0.0, 0.05), (0.42, 0.6)),
}
"""Hue in degrees, saturation and value that each name may have: far enough apart to be told without a neighbour."""

SHAPE_SIZES = ((56, 56), (84, 84), (112, 84), (112, 112), (112, 112), (140, 112), (140, 140), (168, 140), (168, 168))
MIN_DISTANCE = 0.2
"""Of a shape's colour from the background, in OKLab."""

_SUPERSAMPLE = 3


@dataclass(frozen=True)
class Placed:
    """A shape in a picture."""

    shape: str
    colour: str
    box: Box

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


def random_shade(colour: str, rng: random.Random) -> Colour:
    """A shade of the named colour."""
    hue, saturation, value = (rng.uniform(*bounds) for bounds in COLOURS[colour])
    red, green, blue = colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


@lru_cache(maxsize=4096)
def shape_mask(shape: str, size: int, degrees: int) -> Image.Image:
    """The shape as a mask of about `size` pixels either way, cut to what is filled."""
    n = size * _SUPERSAMPLE
    mask = Image.new("L", (n, n))
    draw = ImageDraw.Draw(mask)
    box = (0, 0, n - 1, n - 1)
    if shape == "circle":
        draw.ellipse(box, fill=255)
    elif shape == "square":
        draw.rectangle((n * 0.06, n * 0.06, n * 0.94, n * 0.94), fill=255)
    elif shape == "ring":
        draw.ellipse(box, outline=255, width=max(4, n // 5))
    elif shape == "cross":
        draw.rectangle((n * 0.35, 0, n * 0.65, n), fill=255)
        draw.rectangle((0, n * 0.35, n, n * 0.65), fill=255)
    else:
        draw.polygon([(n * x, n * y) for x, y in _corners(shape)], fill=255)
    if degrees:
        mask = mask.rotate(degrees, Image.Resampling.BILINEAR, expand=True)
    mask = mask.reduce(_SUPERSAMPLE)
    return mask.crop(mask.getbbox())


def _corners(shape: str) -> list[tuple[float, float]]:
    if shape == "triangle":
        return [(0.5, 0.02), (1.0, 0.95), (0.0, 0.95)]
    if shape == "diamond":
        return [(0.5, 0.0), (0.88, 0.5), (0.5, 1.0), (0.12, 0.5)]
    if shape == "heart":
        turns = [i * math.pi / 24 for i in range(48)]
        bumps = [
            (math.sin(a) ** 3, (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16)
            for a in turns
        ]
        return [(0.5 + 0.5 * x, 0.42 - 0.5 * y) for x, y in bumps]
    points = [(i * math.pi / 5, 0.5 if i % 2 == 0 else 0.21) for i in range(10)]
    return [(0.5 + r * math.sin(a), 0.5 - r * math.cos(a)) for a, r in points]


@cache
def _typical_shades() -> NDArray[np.uint8]:
    """A few shades of every colour: [colours, shades, 3]."""
    rng = random.Random(0)
    return np.array([[random_shade(c, rng) for _ in range(6)] for c in COLOURS], np.uint8)


def standing_out(image: Image.Image) -> list[str]:
    """The names of colours whose shades all differ plainly from every part of an image."""
    shades = _typical_shades()
    nearest = distance(image, shades.reshape(-1, 3)).reshape(shades.shape[:2]).min(1)
    return [c for c, d in zip(COLOURS, nearest, strict=True) if d >= MIN_DISTANCE]


class Scene:
    """A background with shapes on it, none touching another."""

    def __init__(self, painter: Painter, width: int, height: int) -> None:
        self.painter = painter
        self.placed: list[Placed] = []
        self.usable: list[str] = []
        while len(self.usable) < 4:
            self.image = painter.background(width, height, photos=0.25, blur=2.0)
            self.usable = standing_out(self.image)

    def colour(self, other_than: tuple[str, ...] = ()) -> str:
        """A colour that stands out from the background."""
        return self.painter.rng.choice([c for c in self.usable if c not in other_than])

    def add(self, shape: str, colour: str, smallest: int, largest: int) -> Placed | None:
        """Put a shape where there is room; None if there is none."""
        rng = self.painter.rng
        for limit in (largest, (smallest + largest) // 2, smallest):
            size = rng.randint(smallest, max(smallest, limit))
            mask = shape_mask(shape, size, rng.choice((0, 0, rng.randint(-10, 10))))
            place = free_place(self.painter, self.image.size, mask.size, [p.box for p in self.placed], 3)
            if place is not None:
                box = paste(self.image, mask, random_shade(colour, rng), place)
                self.placed.append(Placed(shape, colour, box))
                return self.placed[-1]
        return None

    def sight(self, kind: str, question: str, answer: str, box: Box | None = None, spelled: str | None = None) -> Sight:
        """The finished picture."""
        shown = tuple((name, placed.box) for placed in self.placed for name in (placed.colour, placed.shape))
        return Sight([self.painter.worn(self.image, 8)], None, question, answer, spelled, kind, box, shown=shown)


def _scene(painter: Painter) -> Scene:
    return Scene(painter, *painter.rng.choice(SHAPE_SIZES))


def _different(painter: Painter, num: int, smallest: int = 16, largest: int = 48) -> Scene:
    """Up to `num` shapes, all of different kind and colour, at least one."""
    rng = painter.rng
    scene = _scene(painter)
    largest = min(largest, min(scene.image.size) - 6)
    for shape in rng.sample(SHAPES, min(num, len(scene.usable))):
        scene.add(shape, scene.colour(tuple(p.colour for p in scene.placed)), smallest, largest)
    return scene


def colour(painter: Painter) -> Sight:
    """One to four shapes, the colour of one."""
    scene = _different(painter, painter.rng.choice((1, 1, 2, 3, 4)))
    asked = painter.rng.choice(scene.placed)
    question = painter.rng.choice(
        ("What colour is the {}?", "What colour is the {}?", "What colour does the {} have?", "Which colour is the {}?")
    )
    return scene.sight("colour", question.format(asked.shape), f"It is {asked.colour}.", asked.box)


def shape(painter: Painter) -> Sight:
    """One to four shapes, which of them has a colour."""
    scene = _different(painter, painter.rng.choice((1, 1, 2, 3, 4)))
    asked = painter.rng.choice(scene.placed)
    templates = ["What shape is {}?", "Which shape is {}?", "What is the {} shape?"]
    if len(scene.placed) == 1:
        templates += ["What shape is this?", "What shape is in the picture?"]
    question = painter.rng.choice(templates).format(asked.colour)
    return scene.sight("shape", question, f"It is a {asked.shape}.", asked.box)


def count(painter: Painter) -> Sight:
    """One to nine shapes to count, by shape, by colour, by both or all, at times with others between them."""
    rng = painter.rng
    num = rng.randint(1, 9)
    scene = Scene(painter, *rng.choice(SHAPE_SIZES[1 if num < 4 else 3 :]))
    by = rng.choice(("shape", "shape", "colour", "both", "all"))
    shape, colour = rng.choice(SHAPES), scene.colour()
    for _ in range(num):
        same_shape = by in ("shape", "both")
        same_colour = by in ("colour", "both") or (by == "shape" and rng.random() < 0.6)
        scene.add(
            shape if same_shape else rng.choice(SHAPES),
            colour if same_colour else scene.colour(),
            13,
            26 if num > 4 else 40,
        )
    if not scene.placed:
        return count(painter)
    num = len(scene.placed)
    if by != "all":
        for _ in range(rng.choice((0, 0, 1, 2, 3))):
            other_shape = rng.choice([s for s in SHAPES if s != shape] if by != "colour" else SHAPES)
            other_colour = scene.colour((colour,)) if by != "shape" else scene.colour()
            scene.add(other_shape, other_colour, 13, 26)
    plural = {"cross": "crosses"}.get(shape, shape + "s")
    things = {"shape": plural, "colour": f"{colour} shapes", "both": f"{colour} {plural}", "all": "shapes"}[by]
    question = rng.choice(
        ("How many {} are there?", "How many {} are there?", "How many {} do you see?", "Count the {}.")
    )
    return scene.sight("count", question.format(things), f"I count {num}.", None, str(num))


def position(painter: Painter) -> Sight:
    """Two shapes, or more, and on which side of one the other lies."""
    rng = painter.rng
    for _ in range(50):
        scene = _different(painter, rng.choice((2, 2, 3)), 13, 36)
        if len(scene.placed) < 2:
            continue
        one, other = rng.sample(scene.placed, 2)
        side = side_of(one.box, other.box)
        if side is not None:
            break
    else:
        raise AssertionError("two shapes never lay clearly beside each other")
    question = rng.choice(
        (
            "Where is the {} from the {}: left, right, above or below?",
            "Is the {} left of, right of, above or below the {}?",
            "On which side of the {1} is the {0}?",
        )
    ).format(one.name, other.name)
    answers = {
        "left": "It is to the left.",
        "right": "It is to the right.",
        "above": "It is above.",
        "below": "It is below.",
    }
    return scene.sight("position", question, answers[side], one.box)


def side_of(one: Box, other: Box) -> str | None:
    """On which side of `other` the first box lies; None unless it is plain."""
    x = (one[0] + one[2] - other[0] - other[2]) / 2
    y = (one[1] + one[3] - other[1] - other[3]) / 2
    if abs(x) > 2 * abs(y) and (one[2] <= other[0] or other[2] <= one[0]):
        return "left" if x < 0 else "right"
    if abs(y) > 2 * abs(x) and (one[3] <= other[1] or other[3] <= one[1]):
        return "above" if y < 0 else "below"
    return None


def where_shape(painter: Painter) -> Sight:
    """One to five different shapes, one of which to point at."""
    scene = _different(painter, painter.rng.choice((1, 2, 3, 4, 5)), 13)
    asked = painter.rng.choice(scene.placed)
    named = painter.rng.choice((asked.name, asked.name, asked.shape))
    point = point_text(asked.box, *scene.image.size)
    question = painter.rng.choice(
        ("Where is the {}?", "Where is the {}?", "Point at the {}.", "Where do you see the {}?")
    )
    return scene.sight("where", question.format(named), f"At ({point}).", asked.box, point)
