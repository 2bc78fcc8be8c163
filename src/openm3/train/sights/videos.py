"""Short videos at one frame a second in which something shows in one frame alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from openm3.train.sights.canvas import Painter, paste
from openm3.train.sights.shapes import SHAPES, Scene
from openm3.train.sights.sight import Sight
from openm3.train.sights.text import cased, free_place, ink, random_word

MIN_FRAMES, MAX_FRAMES = 8, 60
"""Of a video; that is also its length in seconds."""
SHORT_SIZES = ((56, 56), (84, 84), (112, 112))
LONG_SIZES = ((56, 56), (56, 56), (84, 56), (84, 84))
"""Of frames: smaller where there are more than 24."""

WHEN_QUESTIONS = (
    "At which second does {} appear?",
    "At which second does {} appear?",
    "At which second do you see {}?",
    "When does {} appear?",
)
READ_QUESTIONS = ("What number appears in the video?", "Which number does the video show?")


def video(painter: Painter, num_frames: int | None = None) -> Sight:
    """When a number, word or shape shows, among frames without anything or with other things."""
    rng = painter.rng
    num_frames = num_frames or rng.randint(MIN_FRAMES, MAX_FRAMES)
    frames, at, name, _ = _frames(painter, num_frames, rng.choice(("number", "number", "word", "shape", "shape")), 3)
    question = rng.choice(WHEN_QUESTIONS).format(name)
    return Sight(frames, _seconds(num_frames), question, when_text(at), str(at), "video", at=float(at))


def minute(painter: Painter) -> Sight:
    """The same in a video of 60 seconds."""
    return replace(video(painter, MAX_FRAMES), kind="minute")


def video_number(painter: Painter) -> Sight:
    """Which number shows in the one frame that has one."""
    rng = painter.rng
    num_frames = rng.randint(MIN_FRAMES, 24)
    frames, at, _, digits = _frames(painter, num_frames, "number", 1)
    answer = f"The number is {digits}."
    return Sight(frames, _seconds(num_frames), rng.choice(READ_QUESTIONS), answer, digits, "video_number", at=float(at))


def when_text(second: int) -> str:
    """The answer to the question at which second something shows."""
    return f"At {second} second{'' if second == 1 else 's'}."


def _seconds(num_frames: int) -> list[float]:
    return [float(i) for i in range(num_frames)]


def _frames(
    painter: Painter, num_frames: int, kind: str, num_things: int
) -> tuple[list[NDArray[np.uint8]], int, str, str]:
    """The frames, the second at which a thing of that kind shows, what to call it and what it says.

    At times the other `num_things - 1` things of the kind show in other frames.
    """
    rng = painter.rng
    size = rng.choice(LONG_SIZES if num_frames > 24 else SHORT_SIZES)
    at = rng.randrange(num_frames)
    scene = Scene(painter, *size)
    plain = scene.image
    things = _shapes(scene, num_things) if kind == "shape" else _writing(painter, plain, kind, num_things)
    name, says, marked = things[0]
    share = rng.choice((0.0, 0.0, 0.1, 0.4))
    others = [plain, *(image for _, _, image in things[1:])]
    images = [rng.choice(others) if rng.random() < share else plain for _ in range(num_frames)]
    images[at] = marked
    return _filmed(painter, images), at, name, says


def _filmed(painter: Painter, images: list[Image.Image]) -> list[NDArray[np.uint8]]:
    """The pixels of the frames, which at times flicker or are noisy."""
    rng = painter.rng
    flicker = 0.07 if rng.random() < 0.5 else 0.0
    strength = rng.choice((0.0, 0.0, 2.0, 4.0))
    noise = np.random.default_rng(rng.getrandbits(64))
    frames = []
    for image in images:
        pixels = np.array(ImageEnhance.Brightness(image).enhance(rng.uniform(1 - flicker, 1 + flicker)))
        if strength:
            noisy = pixels + strength * noise.standard_normal(pixels.shape, np.float32)
            pixels = np.clip(noisy, 0, 255).astype(np.uint8)
        frames.append(pixels)
    return frames


Thing = tuple[str, str, Image.Image]
"""What to call a thing, what it says, and the frame in which it shows."""


def _shapes(scene: Scene, num: int) -> list[Thing]:
    """Frames with a shape each, all of other kinds and colours."""
    plain, side = scene.image, min(scene.image.size)
    colours: list[str] = []
    things = []
    for shape in scene.painter.rng.sample(SHAPES, num):
        colours.append(scene.colour(tuple(colours)))
        scene.image, scene.placed = plain.copy(), []
        scene.add(shape, colours[-1], side // 4, side // 2)
        things.append((f"the {colours[-1]} {shape}", "", scene.image))
    return things


def _writing(painter: Painter, plain: Image.Image, kind: str, num: int) -> list[Thing]:
    """Frames with a number or a word each, none part of another."""
    rng = painter.rng
    things: list[Thing] = []
    while len(things) < num:
        says = str(rng.randrange(10 ** rng.randint(1, 3))) if kind == "number" else random_word(painter, 6)
        if kind == "word":
            says = cased(painter, says)
        face = painter.sources.face(rng)
        size = painter.fitting(says, face, plain.width - 6, plain.height - 6, 10, 40)
        if size is None or any(says.lower() in t[1].lower() or t[1].lower() in says.lower() for t in things):
            continue
        mask = painter.letters(says, face, size)
        place = free_place(painter, plain.size, mask.size, [], 0)
        if place is None:
            continue
        image = plain.copy()
        box = (*place, place[0] + mask.width, place[1] + mask.height)
        paste(image, mask, ink(painter, image, box), place)
        things.append((f"the number {says}" if kind == "number" else f"the word “{says}”", says, image))
    return things
