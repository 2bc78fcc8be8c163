"""What a context takes, and what memory is free: said before anything is read."""

from __future__ import annotations

import re
from pathlib import Path

from openm3.config import BLOCK, ModelConfig
from openm3.model.cost import index_bytes_per_token, kv_bytes_per_token
from openm3.ops.index import code_bytes

MEMINFO = Path("/proc/meminfo")


def page_bytes(config: ModelConfig, dtype_bytes: int) -> int:
    """Bytes of a page of 128 tokens in every layer: keys, values, index keys and their codes."""
    token = kv_bytes_per_token(config, dtype_bytes) + index_bytes_per_token(config, dtype_bytes)
    return token * BLOCK + config.layer_types.count("sparse") * code_bytes(BLOCK, config.index_dim)


def context_bytes(config: ModelConfig, num_tokens: int, dtype_bytes: int) -> int:
    """Bytes that reading so many tokens takes: their pages, and a working copy of one layer's part of them."""
    cache = -(-num_tokens // BLOCK) * page_bytes(config, dtype_bytes)
    return cache + cache // config.num_layers


def free_bytes() -> int | None:
    """Memory that a process can still get; None where the system does not say."""
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def gib(num_bytes: int) -> str:
    """A number of bytes as people read it."""
    return f"{num_bytes / 2**30:.1f} GiB"
