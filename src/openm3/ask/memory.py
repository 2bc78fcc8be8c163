"""Whether a context fits in memory, said before it is read."""

from __future__ import annotations

from openm3.config import ModelConfig
from openm3.errors import PromptError
from openm3.model.memory import context_bytes, free_bytes, gib

TOLD_FROM = 1 << 30
"""Bytes that a context has to take to be spoken of."""


def forecast(config: ModelConfig, num_tokens: int, dtype_bytes: int) -> str | None:
    """What a large context will take, in one line; None for one that nobody will notice."""
    needed, free = context_bytes(config, num_tokens, dtype_bytes), free_bytes()
    if needed < TOLD_FROM:
        return None
    return f"{num_tokens:,} tokens need {gib(needed)} of memory" + ("" if free is None else f", {gib(free)} is free")


def check_memory(config: ModelConfig, num_tokens: int, dtype_bytes: int) -> None:
    """Raise PromptError if a context of `num_tokens` cannot fit."""
    needed, free = context_bytes(config, num_tokens, dtype_bytes), free_bytes()
    if free is not None and needed > free:
        raise PromptError(
            f"a context of {num_tokens:,} tokens needs {gib(needed)} of memory, but only {gib(free)} is free: "
            "ask about fewer documents"
        )
