"""What every test shares: one thread a worker, seeded generators, and hypothesis without clocks or a database."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")


import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image, ImageDraw, ImageFont

from openm3.train.sights.sources import Face, Sources

settings.register_profile("openm3", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("openm3")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def drawing_sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """What pictures can be made of on any machine: Pillow's own font, smooth noise for photos, a disc, some words."""
    folder = tmp_path_factory.mktemp("sights")
    random = np.random.default_rng(0)
    photos = [folder / f"photo{i}.png" for i in range(3)]
    for path in photos:
        coarse = Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        coarse.resize((400, 300), Image.Resampling.BICUBIC).save(path)
    disc = Image.new("RGBA", (80, 60))
    ImageDraw.Draw(disc).ellipse((10, 10, 50, 50), fill=(200, 30, 30, 255))
    disc.save(folder / "ball.png")
    words = [
        "exit",
        "hello",
        "table",
        "garden",
        "yellow",
        "quick",
        "river",
        "stone",
        "paper",
        "light",
        "at",
        "bed",
        "ten",
    ]
    return Sources([[Face("built-in", ImageFont.load_default)]], photos, [(folder / "ball.png", "ball")], words)
