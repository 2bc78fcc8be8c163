"""A small random model of the bundled one's form, with a tokenizer of its own, and text for it to read."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openm3.model import checkpoint
from openm3.model.model import Model, load
from openm3.model.network import Network
from openm3.tokens.tokenizer import train_bpe
from openm3.train.corpus import Source, standard_library
from openm3.train.recipe import tiny_model


@pytest.fixture(scope="session")
def sources() -> list[Source]:
    """A few files of the standard library."""
    return [s for s in standard_library(held_out=True, tests=False) if len(s.text) < 40_000][:40]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, sources: list[Source]) -> Path:
    """A checkpoint whose two sparse layers take 2 blocks: it selects from 257 tokens on."""
    folder = tmp_path_factory.mktemp("random")
    tokenizer = train_bpe([s.text for s in sources[:8]], 512)
    config = replace(
        tiny_model(tokenizer.vocab_size),
        hidden_size=32,
        head_dim=16,
        rotary_dim=8,
        index_dim=16,
        num_selected=2,
        layer_types=("sparse",) * 2,
        mlp_types=("moe",) * 2,
    )
    generator = torch.Generator().manual_seed(0)
    network = Network(config)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1, generator=generator)
    checkpoint.write(folder, config, network.state_dict())
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def model(folder: Path) -> Model:
    return load(folder)
