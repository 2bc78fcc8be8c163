"""What the tests of training share: some real text, a small vocabulary of its own, and a recipe of seconds."""

from dataclasses import replace

import pytest

from openm3.tokens.tokenizer import Tokenizer, train_bpe
from openm3.train.corpus import Source, standard_library, words
from openm3.train.data import Mixture, SequenceMaker
from openm3.train.recipe import Recipe, Stage, tiny_model

VOCAB_SIZE = 600


@pytest.fixture(scope="session")
def sources() -> list[Source]:
    """A few files of the standard library."""
    return [s for s in standard_library(held_out=True, tests=False) if len(s.text) < 40_000][:40]


@pytest.fixture(scope="session")
def tokenizer(sources: list[Source]) -> Tokenizer:
    return train_bpe([s.text for s in sources[:12]], VOCAB_SIZE)


@pytest.fixture
def maker(tokenizer: Tokenizer, sources: list[Source]) -> SequenceMaker:
    return SequenceMaker(tokenizer, sources, words(sources), seed=0)


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """Two layers of 48 channels that take 2 blocks: dense stages, then one that selects from 257 tokens on."""
    model = replace(
        tiny_model(VOCAB_SIZE, num_layers=2),
        hidden_size=48,
        head_dim=16,
        rotary_dim=8,
        dense_size=48,
        expert_size=16,
        shared_size=16,
        num_experts=4,
        index_dim=16,
        num_selected=2,
    )
    short = Mixture(length=256, tokens=512, max_questions=2)
    stages = (
        Stage("short", 3, short, selected=False),
        Stage("long", 2, replace(short, length=512), selected=False),
        Stage("selected", 1, replace(short, length=512), selected=True),
    )
    return Recipe("test", VOCAB_SIZE, model, stages, warmup_steps=2, index_rows=16)
