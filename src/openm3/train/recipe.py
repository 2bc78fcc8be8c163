"""What is trained and how: the recipes that `openm3 train` knows by name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from openm3.config import ModelConfig, VisionConfig
from openm3.tokens.tokenizer import SPECIALS
from openm3.train.data import Mixture


@dataclass(frozen=True)
class Stage:
    """A part of training: its data, its length in steps, and whether the index branch already selects.

    `rate` is the share of the learning rates at its first step and after its last, linear between. In the warm-up
    (`selected=False`) the index loss compares over every visible token; afterwards over the selected blocks. Sequences
    of up to 2,048 tokens attend to everything either way: 16 blocks are all there is. What is exported is the mean of
    the weights at the ends of stages, each counted `kept` times (the last weights if none is).
    """

    name: str
    steps: int
    mixture: Mixture
    selected: bool
    rate: tuple[float, float] = (1.0, 1.0)
    kept: int = 0


@dataclass(frozen=True)
class Recipe:
    """A whole training run: vocabulary, model, stages and optimiser."""

    name: str
    vocab_size: int
    model: ModelConfig
    stages: tuple[Stage, ...]
    matrix_lr: float = 0.01
    vector_lr: float = 4e-3
    warmup_steps: int = 50
    text_weight: float = 0.5
    loss_share: float = 0.4
    index_weight: float = 1.0
    sight_weight: float = 1.0
    index_rows: int = 96
    seed: int = 0
    checkpoint_minutes: float = 3.0

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


def tiny_model(vocab_size: int, num_layers: int = 6, vision: VisionConfig | None = None) -> ModelConfig:
    """The shape of m3-tiny: every layer sparse and a mixture of experts, as in M3.1-Flash."""
    first_control = vocab_size - len(SPECIALS)
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        rotary_dim=32,
        layer_types=("sparse",) * num_layers,
        mlp_types=("moe",) * num_layers,
        dense_size=192,
        expert_size=96,
        shared_size=96,
        num_experts=8,
        num_active=2,
        index_dim=64,
        bos_id=first_control + SPECIALS.index("]~!b["),
        eos_id=first_control + SPECIALS.index("[e~["),
        image_id=None if vision is None else first_control + SPECIALS.index("]<]image[>["),
        video_id=None if vision is None else first_control + SPECIALS.index("]<]video[>["),
        vision=vision,
    )


TINY_VISION = VisionConfig(
    hidden_size=256, intermediate_size=1024, num_layers=6, num_heads=4, projector_hidden_size=384
)
"""The eyes of m3-tiny: as many weights as the rest of it."""


_LETTERS = Mixture(length=512, tokens=1024, max_questions=6, echo_share=0.1, shown=8192)
_GLIMPSES = replace(_LETTERS, pictured=4096, inserted_share=0.2, shown=2048)
_PAGES = Mixture(length=2048, tokens=4096, max_questions=12, pictured=4096, inserted_share=0.3, shown=2048)
_CROWDS = Mixture(
    length=2048, tokens=4096, max_questions=16, crowd_share=0.6, pictured=4096, inserted_share=0.3, shown=2048
)
_SELECTED = Mixture(length=4096, tokens=8192, max_questions=24, crowd_share=0.6, pictured=8192, inserted_share=0.3)
_LOOKALIKES = replace(_CROWDS, crowd_share=0.7, lookalike_share=0.7)
_SELECTED_LOOKALIKES = replace(_SELECTED, crowd_share=0.7, lookalike_share=0.7)

RECIPES = {
    "m3-tiny": Recipe(
        name="m3-tiny",
        vocab_size=4096,
        model=tiny_model(4096, vision=TINY_VISION),
        stages=(
            Stage("letters", 1500, _LETTERS, selected=False),
            Stage("glimpses", 2000, _GLIMPSES, selected=False),
            Stage("pages", 250, _PAGES, selected=False),
            Stage("crowds", 700, _CROWDS, selected=False, rate=(1.0, 0.2)),
            Stage("selected", 80, _SELECTED, selected=True, rate=(0.2, 0.03), kept=1),
            Stage("lookalikes", 300, _LOOKALIKES, selected=False, rate=(0.5, 0.1)),
            Stage("selected lookalikes", 30, _SELECTED_LOOKALIKES, selected=True, rate=(0.1, 0.02), kept=1),
        ),
    ),
}
"""Recipes by name. m3-tiny: what glyphs and shapes look like, beside short texts; then questions about pictures, and
longer texts beside them, in a dense warm-up; at last 4,096 tokens of which 2,048 are selected, twice."""
