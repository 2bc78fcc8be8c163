"""`openm3 bench ops --headline`: one layer at a million tokens, sparse attention against dense attention.

Sparse is M3's layer: select blocks, attend to them (64 query heads, 4 KV groups). Dense is the layer of M3's
predecessor: 48 query heads and 8 KV groups, every key. Both in bfloat16, on this project's own operators; beside them
PyTorch's scaled_dot_product_attention on the dense layer. It takes 15 GiB of memory and some minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from openm3.errors import ConfigError
from openm3.eval.bench_ops import Case, M, behind, prepare, require_memory
from openm3.eval.bench_peaks import Work, medians
from openm3.eval.report import progress
from openm3.ops import native

CHUNK = 2048
PART = 8
"""PyTorch's attention runs on this part of a chunk's tokens, and its time is multiplied: it is proportional to them."""

_MEMORY = 15 << 30


@dataclass(frozen=True)
class Headline:
    """Seconds of one layer for so many tokens behind a million: sparse, dense, and dense on PyTorch's attention."""

    name: str
    sparse: float
    dense: float
    plain: float
    work: Work
    dense_work: Work


def measure(*, budget: float, context: int = M, chunk: int = CHUNK) -> list[Headline]:
    """Time one decoded token and one chunk. Raises ConfigError without the native operators or the memory."""
    if (reason := native.missing()) is not None:
        raise ConfigError(f"the headline compares the native operators, and they are missing: {reason}")
    require_memory("the headline", _MEMORY * context // M)
    results = []
    with progress() as bar:
        task = bar.add_task("headline", total=2)
        for name, count in (("headline_decode", 1), ("headline_prefill", chunk)):
            bar.update(task, description=name)
            results.append(_measure(name, count, context, budget))
            bar.advance(task)
    return results


def _measure(name: str, count: int, context: int, budget: float) -> Headline:
    generator = torch.Generator().manual_seed(0)
    shape = behind(name, count, context)
    select, select_work = prepare(Case("select", shape), generator)
    attend, attend_work = prepare(Case("sparse", shape), generator)
    before = replace(shape, num_groups=8, heads_per_group=6)
    dense, before_work = prepare(Case("dense", before), generator)
    part = max(1, count // PART)
    plain = _plain(part, context, before.num_groups, before.heads_per_group, before.head_dim)
    calls: dict[str, Callable[[], object]] = {"sparse": lambda: (select(), attend()), "dense": dense, "plain": plain}
    times = medians(calls, budget)
    flops, nbytes = select_work.flops + attend_work.flops, select_work.nbytes + attend_work.nbytes
    work = Work(flops, nbytes, select_work.limit)
    return Headline(name, times["sparse"], times["dense"], times["plain"] * count / part, work, before_work)


def _plain(count: int, context: int, groups: int, heads: int, width: int) -> Callable[[], object]:
    """PyTorch's attention of some tokens over the context before them; a group's heads stand in a row of queries."""
    query_1GqH = torch.randn(1, groups, heads * count, width).bfloat16()
    key_1GSH, value_1GSH = (torch.randn(1, 1, 1, width).bfloat16().repeat(1, groups, context, 1) for _ in range(2))
    return lambda: F.scaled_dot_product_attention(query_1GqH, key_1GSH, value_1GSH)
