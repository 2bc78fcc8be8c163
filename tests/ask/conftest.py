"""A model with random weights and a byte tokenizer: what it says is noise, all around it is real."""

from pathlib import Path

import pytest

from openm3.model.model import Model, load

CHECKPOINT = Path(__file__).parents[1] / "golden" / "m3-random-s0" / "model"


@pytest.fixture(scope="session")
def checkpoint() -> str:
    """Its folder, as a command line takes it."""
    return str(CHECKPOINT)


@pytest.fixture(scope="session")
def model() -> Model:
    return load(CHECKPOINT)
