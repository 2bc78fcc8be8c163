"""Whether a context fits in memory, said before it is read."""

from __future__ import annotations

import re
from pathlib import Path

from openm3.config import BLOCK, ModelConfig
from openm3.errors import PromptError
from openm3.model.cost import index_bytes_per_token, kv_bytes_per_token
from openm3.ops.index import code_bytes

MEMINFO = Path("/proc/meminfo")


def context_bytes(config: ModelConfig, num_tokens: int, dtype_bytes: int) -> int:
    """Bytes that reading takes: the cache, and a working copy of one layer's part of it."""
    cache = (kv_bytes_per_token(config, dtype_bytes) + index_bytes_per_token(config, dtype_bytes)) * num_tokens
    num_pages = -(-num_tokens // BLOCK) * config.layer_types.count("sparse")
    cache += num_pages * code_bytes(BLOCK, config.index_dim)
    return cache + cache // config.num_layers


def free_bytes() -> int | None:
    """Memory that a process can still get; None where the system does not say."""
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def check_memory(config: ModelConfig, num_tokens: int, dtype_bytes: int) -> None:
    """Raise PromptError if a context of `num_tokens` cannot fit."""
    needed, free = context_bytes(config, num_tokens, dtype_bytes), free_bytes()
    if free is not None and needed > free:
        raise PromptError(
            f"a context of {num_tokens:,} tokens needs {_gib(needed)} of memory, but only {_gib(free)} is free: "
            "ask about fewer documents"
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
