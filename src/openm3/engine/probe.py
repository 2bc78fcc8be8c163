"""How sparse attention behaves on what an engine serves, from a look at some of its steps.

A look costs a second selection in each layer, so one step in many is looked at, and the one after it, to see what
changes between steps. On the next a clock runs around each operator: nobody looks at it, so it may be a replayed one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import Tensor

from openm3.engine.scheduler import Plan
from openm3.model.attention import Heads, Observer
from openm3.model.batch import Batch
from openm3.ops.dispatch import timed
from openm3.ops.index import native

EVERY = 64
"""Of so many steps two are looked at and one is timed."""

LOOKS = 2
"""Steps in a row that are looked at."""

PARTS = {
    "index": ("select_blocks", "encode_pages"),
    "attention": ("sparse_attention", "dense_attention"),
    "experts": ("experts", "mixture", "route", "swiglu"),
}
"""Operators by the part of a step that they belong to; all other time is the rest."""


class Probe:
    """Sums over the steps that were looked at; `report` makes ratios of them."""

    def __init__(self, every: int = EVERY) -> None:
        self.every = every
        self._step = 0
        self._plan = Plan()
        self._last: dict[tuple[int, int], Tensor] = {}
        self._sums: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    @contextmanager
    def looking(self, plan: Plan) -> Iterator[Observer | None]:
        """Around one step: who is to observe the network, if anybody is; times its operators where that is due."""
        self._step += 1
        turn = self._step % self.every
        if turn < LOOKS:
            self._plan = plan
            yield self
            return
        self._last.clear()
        if turn > LOOKS:
            yield None
            return
        begin = perf_counter()
        with timed() as seconds:
            yield None
        seconds["step"] = perf_counter() - begin
        for name, spent in seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def __call__(self, layer: int, heads: Heads, batch: Batch) -> None:
        """See one layer's selection."""
        if heads.block_TGK is None or heads.index_q_TGJ is None:
            return
        block_TGK = heads.block_TGK
        self._add("selected", float((block_TGK >= 0).sum()), block_TGK.shape[0] * block_TGK.shape[1])
        for row, work in enumerate(self._plan.works):
            start, stop = int(batch.start_R1[row]), int(batch.start_R1[row + 1])
            own_TGK = block_TGK[start:stop]
            before_GK = self._last.get((layer, work.request.id))
            if stop - start == 1 and before_GK is not None:
                self._add("kept", *common(before_GK[None], own_TGK))
            if stop - start > 1:
                self._add("shared", *common(own_TGK[:-1], own_TGK[1:]))
            self._last[layer, work.request.id] = own_TGK[-1].clone()
        self._count(heads, batch)

    def report(self) -> dict[str, float]:
        """Ratios by name; those of which nothing was seen are left out.

        `blocks_selected` a token and group; `overlap_steps` and `overlap_neighbours`, the part of a token's blocks that
        the token before it chose too; `blocks_rescored`, of those that the index scan looked at; `time_*`, the parts
        of a step.
        """
        names = {
            "blocks_selected": "selected",
            "overlap_steps": "kept",
            "overlap_neighbours": "shared",
            "blocks_rescored": "rescored",
        }
        found = {
            name: self._sums[key] / self._sums[f"{key} of"]
            for name, key in names.items()
            if self._sums.get(f"{key} of")
        }
        if whole := self._seconds.get("step"):
            parts = {part: sum(self._seconds.get(name, 0.0) for name in names) for part, names in PARTS.items()}
            found |= {f"time_{part}": seconds / whole for part, seconds in parts.items()}
            found["time_rest"] = max(0.0, 1 - sum(parts.values()) / whole)
        return found

    def _count(self, heads: Heads, batch: Batch) -> None:
        """What the certified scan rescored, where there is one that counts."""
        assert heads.index_q_TGJ is not None and heads.pool.index_k_MBJ is not None and heads.block_TGK is not None
        where = batch.page_RP, batch.start_R1, batch.length_R
        call = heads.index_q_TGJ, heads.pool.index_k_MBJ, *where, heads.block_TGK.shape[2], 1, heads.pool.codes
        if heads.pool.codes is not None and native.supports(*call) is None:
            _, statistics = native.counted(*call)
            self._add("rescored", statistics.rescored_blocks, statistics.scanned_blocks)

    def _add(self, name: str, part: float, whole: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + part
        self._sums[f"{name} of"] = self._sums.get(f"{name} of", 0.0) + whole


def common(a_TGK: Tensor, b_TGK: Tensor) -> tuple[float, float]:
    """How many blocks of b are in a as well, token by token and group by group, and how many there are in b."""
    there = b_TGK >= 0
    both = (b_TGK[..., :, None] == a_TGK[..., None, :]).any(-1) & there
    return float(both.sum()), float(torch.count_nonzero(there))
