"""What `bench/peers.py` compares: one model, and the face that every engine shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from openm3.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=32_768,
    hidden_size=512,
    num_heads=16,
    num_kv_heads=2,
    head_dim=128,
    rotary_dim=64,
    layer_types=("full", *("sparse",) * 7),
    mlp_types=("dense", *("moe",) * 7),
    dense_size=1024,
    expert_size=512,
    shared_size=512,
    num_experts=8,
    num_active=2,
)
ROOM = 520
"""Tokens that an engine can read after the context."""


class Engine(Protocol):
    """One implementation with the weights of `random_network(CONFIG)`."""

    def fill(self, length: int) -> None:
        """Hold a context of so many tokens, and nothing after it."""

    def read(self, ids: Sequence[int]) -> None:
        """Append tokens, and compute the logits after the last."""

    def logits(self) -> list[float]:
        """The logits after the last token read."""

    def rewind(self) -> None:
        """Forget what was read after the context."""
