"""Painting: backgrounds, inks that stand out from them, letters, and the wear of real pictures."""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from openm3.train.sights.sources import PHOTO_SIDE, Face, Sources, cap_height, font, photo

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]

MIN_CONTRAST = 3.0
"""Of ink to the background behind it, by the WCAG formula."""

_SRGB = np.arange(256) / 255
_LINEAR = np.where(_SRGB <= 0.04045, _SRGB / 12.92, ((_SRGB + 0.055) / 1.055) ** 2.4)
_RULER = ImageDraw.Draw(Image.new("L", (1, 1)))
_TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.793617785, -0.0040720468],
        [1.9779984951, -2.428592205, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.808675766],
    ]
)
_RGB_LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def luminance(colour: Colour) -> float:
    """Relative luminance of an sRGB colour, 0 black to 1 white."""
    return float(_LINEAR[list(colour)] @ _RGB_LUMINANCE)


def contrast(a: float, b: float) -> float:
    """The WCAG contrast ratio of two luminances, 1 to 21."""
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


def luminance_range(image: Image.Image, box: Box | None = None) -> tuple[float, float]:
    """The darkest and the lightest luminance inside a box, the most extreme 3% left out on either side."""
    part = image if box is None else image.crop(box)
    grey = np.sort(np.asarray(part.convert("L")), axis=None)
    cut = len(grey) * 3 // 100
    return float(_LINEAR[grey[cut]]), float(_LINEAR[grey[-1 - cut]])


def random_colour(rng: random.Random) -> Colour:
    """Any of the 16 million."""
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def _oklab(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """sRGB pixels [..., 3] as OKLab, in which distances are about what eyes see."""
    cones: NDArray[np.float64] = np.cbrt(_LINEAR[pixels] @ _TO_CONES.T)
    lab: NDArray[np.float64] = cones @ _TO_LAB.T
    return lab


def distance(image: Image.Image, colours: NDArray[np.uint8]) -> NDArray[np.float64]:
    """How far each colour [N, 3] is from the most similar part of an image in OKLab, where black to white is 1."""
    pixels = _oklab(np.asarray(image.resize((12, 12), Image.Resampling.BOX)).reshape(-1, 3))
    apart: NDArray[np.float64] = np.linalg.norm(_oklab(colours)[:, None] - pixels[None], axis=-1)
    nearest: NDArray[np.float64] = apart.min(1)
    return nearest


def ink_for(darkest: float, lightest: float, rng: random.Random, wanted: float = MIN_CONTRAST) -> Colour:
    """A random colour that stands out from both luminances; black or white if no other is found."""
    if rng.random() < 0.7:
        for _ in range(10):
            colour = random_colour(rng)
            own = luminance(colour)
            if min(contrast(own, darkest), contrast(own, lightest)) >= wanted and not darkest < own < lightest:
                return colour
    return (0, 0, 0) if contrast(0, darkest) > contrast(1, lightest) else (255, 255, 255)


@dataclass(frozen=True)
class Painter:
    """Draws with the fonts and photos of `sources`, all randomness from one generator."""

    sources: Sources
    rng: random.Random

    def background(
        self, width: int, height: int, *, photos: float = 0.35, gradients: float = 0.2, blur: float = 0.0
    ) -> Image.Image:
        """A plain colour, a gradient, or part of a photo made dark or light enough for ink to stand out."""
        chance = self.rng.random()
        if chance < photos:
            return self._photo(width, height).filter(ImageFilter.GaussianBlur(blur))
        if chance < photos + gradients:
            return self._gradient(width, height)
        return Image.new("RGB", (width, height), self._plain())

    def _plain(self) -> Colour:
        """White, black or a greyish tone at times, else any colour."""
        rng = self.rng
        if rng.random() < 0.3:
            return rng.choice(((255, 255, 255), (255, 255, 255), (0, 0, 0), (250, 250, 245), (30, 30, 34)))
        return random_colour(rng)

    def _photo(self, width: int, height: int) -> Image.Image:
        rng = self.rng
        whole = photo(rng.choice(self.sources.photos))
        scale = rng.uniform(max(width, height) / PHOTO_SIDE, 1.0) if max(width, height) < PHOTO_SIDE else 1.0
        w, h = min(whole.width, round(width / scale)), min(whole.height, round(height / scale))
        x, y = rng.randint(0, whole.width - w), rng.randint(0, whole.height - h)
        part = whole.resize((width, height), Image.Resampling.BILINEAR, box=(x, y, x + w, y + h))
        strength = rng.uniform(0.3, 0.55)
        if rng.random() < 0.5:
            return part.point([round(v * strength) for v in range(256)] * 3)
        return part.point([round(255 - (255 - v) * strength) for v in range(256)] * 3)

    def _gradient(self, width: int, height: int) -> Image.Image:
        rng = self.rng
        first = random_colour(rng)
        second = first
        for _ in range(20):
            second = random_colour(rng)
            if contrast(luminance(first), luminance(second)) < 1.8:
                break
        else:
            second = first
        angle = rng.uniform(0, 2 * math.pi)
        ramp = np.add.outer(
            np.linspace(-1, 1, height, dtype=np.float32) * math.sin(angle),
            np.linspace(-1, 1, width, dtype=np.float32) * math.cos(angle),
        )
        share = (ramp / (2 * np.abs(ramp).max() + 1e-6) + 0.5)[..., None]
        pixels = np.array(first) * (1 - share) + np.array(second) * share
        return Image.fromarray(pixels.astype(np.uint8))

    def letters(self, text: str, face: Face, size: int, degrees: float = 0.0) -> Image.Image:
        """The text as a mask, cut to its ink."""
        chosen = font(face, size)
        left, top, right, bottom = map(math.floor, _RULER.textbbox((0, 0), text, font=chosen))
        mask = Image.new("L", (right - left + 5, bottom - top + 5))
        ImageDraw.Draw(mask).text((2 - left, 2 - top), text, font=chosen, fill=255)
        if degrees:
            mask = mask.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
        return mask.crop(mask.getbbox())

    def fitting(self, text: str, face: Face, width: int, height: int, lowest: int, highest: int) -> int | None:
        """A random size whose capitals are `lowest` to `highest` pixels high and whose text fits; None if none does."""
        share = cap_height(face)
        left, top, right, bottom = _RULER.textbbox((0, 0), text, font=font(face, 40))
        most = min(highest / share, 40 * width / max(1, right - left), 40 * height / max(1, bottom - top))
        least = lowest / share
        if most < least:
            return None
        # Small writing is the harder part: more of it.
        return max(1, int(least + (most - least) * self.rng.random() ** 1.3))

    def degrees(self) -> float:
        """How far to turn writing: mostly not at all, else up to 8 degrees."""
        return self.rng.uniform(-8, 8) if self.rng.random() < 0.35 else 0.0

    def worn(self, image: Image.Image, finest: float) -> NDArray[np.uint8]:
        """The picture's pixels, at times blurred, noisy or with JPEG artefacts; `finest` is the smallest cap height."""
        rng = self.rng
        chance = rng.random()
        if chance < 0.12:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.3 + finest / 25)))
        elif chance < 0.3:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=rng.randint(45, 92))
            image = Image.open(buffer).convert("RGB")
        pixels = np.array(image)
        if 0.3 <= chance < 0.42:
            noise = np.random.default_rng(rng.getrandbits(64)).standard_normal(pixels.shape, np.float32)
            pixels = np.clip(pixels + noise * rng.uniform(2, 4 + finest / 2), 0, 255).astype(np.uint8)
        return pixels


def paste(image: Image.Image, mask: Image.Image, colour: Colour, at: tuple[int, int]) -> Box:
    """Colour the image through a mask whose top left corner lies at `at`; returns the box that is covered."""
    image.paste(colour, at, mask)
    return at[0], at[1], at[0] + mask.width, at[1] + mask.height
