"""What every test shares: one thread a worker, seeded generators, and hypothesis without clocks or a database."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("openm3", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("openm3")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
