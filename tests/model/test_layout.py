"""The table of parameters: every published tensor once, every parameter filled exactly once."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from openm3.config import ModelConfig
from openm3.model.layout import layout

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIG = ModelConfig.from_file(GOLDEN / "m3-random-s0/model")


def test_layout_names_every_golden_tensor_once() -> None:
    names = [part.name for param in layout(CONFIG) for part in param.parts]
    with safe_open(GOLDEN / "m3-random-s0/model/model.safetensors", framework="pt") as tensors:
        assert sorted(names) == sorted(tensors.keys())


def test_layout_of_m3_has_the_published_number_of_tensors() -> None:
    m3 = ModelConfig.from_file(GOLDEN / "m3-config.json")
    assert sum(len(param.parts) for param in layout(m3)) == 23416


def test_parts_fill_each_parameter_exactly_once() -> None:
    for param in layout(CONFIG):
        filled = torch.zeros(param.shape)
        for part in param.parts:
            assert filled[part.where].shape == part.shape
            filled[part.where] += 1
        assert filled.eq(1).all(), param.name
