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
    width, height = rng.choice(
        ((56, 56), (56, 56), (84, 56), (84, 84)) if num_frames > 24 else ((56, 56), (84, 84), (112, 112))
    )
    at = rng.randrange(num_frames)
    scene = Scene(painter, width, height)
    plain = scene.image.copy()
    things = _things(painter, scene, kind, num_things)
    name, says, marked = things[0]
    share = rng.choice((0.0, 0.0, 0.1, 0.4))
    others = [plain, *(image for _, _, image in things[1:])]
    images = [rng.choice(others) if rng.random() < share else plain for _ in range(num_frames)]
    images[at] = marked
    flicker = rng.random() < 0.5
    noise = np.random.default_rng(rng.getrandbits(64))
    strength = rng.choice((0.0, 0.0, 2.0, 4.0))
    frames = []
    for image in images:
        drawn = ImageEnhance.Brightness(image).enhance(rng.uniform(0.93, 1.07)) if flicker else image
        pixels = np.array(drawn)
        if strength:
            pixels = np.clip(pixels + noise.standard_normal(pixels.shape, np.float32) * strength, 0, 255).astype(
                np.uint8
            )
        frames.append(pixels)
    return frames, at, name, says


def _things(painter: Painter, scene: Scene, kind: str, num_things: int) -> list[tuple[str, str, Image.Image]]:
    """The thing that shows once, and others that may show more often: name, writing, picture."""
    rng = painter.rng
    plain = scene.image
    if kind == "shape":
        names: list[tuple[str, str]] = []
        for shape in rng.sample(SHAPES, num_things):
            names.append((shape, scene.colour(tuple(c for _, c in names))))
        found = []
        for shape, colour in names:
            scene.image, scene.placed = plain.copy(), []
            side = min(plain.size)
            scene.add(shape, colour, side // 4, side // 2)
            found.append((f"the {colour} {shape}", "", scene.image))
        return found
    found = []
    while len(found) < num_things:
        says = (
            str(rng.randrange(10 ** rng.choice((1, 2, 3))))
            if kind == "number"
            else cased(painter, random_word(painter, 6))
        )
        image = plain.copy()
        face = painter.sources.face(rng)
        size = painter.fitting(says, face, image.width - 6, image.height - 6, 10, 40)
        if size is None or any(says.lower() in f[0].lower() for f in found):
            continue
        mask = painter.letters(says, face, size)
        place = free_place(painter, image.size, mask.size, [], 0)
        if place is None:
            continue
        paste(image, mask, ink(painter, image, (*place, place[0] + mask.width, place[1] + mask.height)), place)
        found.append((f"the number {says}" if kind == "number" else f"the word “{says}”", says, image))
    return found
