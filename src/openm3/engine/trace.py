"""Which blocks the tokens that are drawn in a step came from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from openm3.config import ModelConfig
from openm3.model.attention import Heads, Observer
from openm3.model.batch import Batch


class Trace:
    """An observer of one step that keeps what `rows` of its tokens selected.

    `block_SLGK` has, for each row, layer and group, the logical blocks in ascending order (int32, -1 at the tail);
    dense layers select none.
    """

    def __init__(self, config: ModelConfig, rows: Sequence[int], device: torch.device) -> None:
        self._row_S = torch.tensor(rows, device=device)
        shape = (len(rows), config.num_layers, config.num_groups, config.num_selected)
        self.block_SLGK = torch.full(shape, -1, dtype=torch.int32, device=device)

    def __call__(self, layer: int, heads: Heads, batch: Batch) -> None:
        if heads.block_TGK is not None:
            self.block_SLGK[:, layer] = heads.block_TGK[self._row_S]


def together(observers: Sequence[Observer]) -> Observer | None:
    """Some observers as one; None where there are none."""

    def observe(layer: int, heads: Heads, batch: Batch) -> None:
        for observer in observers:
            observer(layer, heads, batch)

    return observe if observers else None
