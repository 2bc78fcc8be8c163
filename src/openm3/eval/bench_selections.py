"""Selections for benchmarks that are as alike between neighbouring tokens as those of a trained model.

How fast sparse attention runs depends on what neighbours share: a tile of tokens reads the union of their blocks.
`sharing` measures that, on any selection; `correlated_blocks` draws selections with the sharing that m3-tiny has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from openm3.ops.cases import PackedCase

SHARED, DRIFTING, MEMORY = 0.43, 0.49, 0.97
"""Of a block's score, the parts that all tokens share and that drift from token to token, and how slowly they drift.

Fitted to the last 2,048 tokens of held-out haystacks of 64K (`bench/selections.py`). There m3-tiny's tokens share
64% of their blocks with the next token; 64 neighbours choose 6.4 and 128 neighbours 8.3 times the blocks of one, in the
mean of its layers (2.1 to 17.7 and 2.7 to 22.4 in single ones). Draws share 64%, and choose 6.4 and 9.2 times.
"""


@dataclass(frozen=True)
class Sharing:
    """Mean share of its blocks that a token has in common with the next one, and the blocks of 64 and 128 neighbours.

    Unions are in multiples of what one token selects: 1 where all neighbours choose the same blocks.
    """

    next: float
    union_64: float
    union_128: float


def sharing(block_TGK: Tensor) -> Sharing:
    """Measure a selection of neighbouring tokens of one sequence, at least 128 of them."""
    tokens, groups, _ = block_TGK.shape
    if tokens < 128:
        raise ValueError(f"sharing is measured over tiles of 128 tokens: {tokens} are too few")
    member_TGP = torch.zeros((tokens, groups, int(block_TGK.max()) + 2), dtype=torch.bool)
    member_TGP.scatter_(2, block_TGK.long() + 1, True)
    member_TGP = member_TGP[..., 1:]
    chosen_TG = member_TGP.sum(-1)
    common_TG = (member_TGP[1:] & member_TGP[:-1]).sum(-1)

    def union(tile: int) -> float:
        whole = tokens // tile * tile
        union_tG = member_TGP[:whole].unflatten(0, (-1, tile)).any(1).sum(-1)
        return float((union_tG / chosen_TG[:whole].unflatten(0, (-1, tile)).float().mean(1)).mean())

    return Sharing(float((common_TG / chosen_TG[1:]).mean()), union(64), union(128))


def correlated_blocks(case: PackedCase, generator: torch.Generator) -> Tensor:
    """A valid selection `block_TGK` for a case's tokens, in which neighbours share most of their blocks.

    Blocks have normal scores, the weighted sum of a part that all tokens of the request share, a part that drifts from
    token to token (autoregressive), and a part of the token's own; a token takes its own block and the best before it.
    """
    c = case
    parts = [torch.empty((0, c.num_groups, c.num_selected), dtype=torch.int32)]
    for count, length in zip(c.num_tokens, c.lengths, strict=True):
        shape = (c.num_groups, -(-length // c.block_size))
        shared_GP, drift_GP = (torch.randn(shape, generator=generator) for _ in range(2))
        for position in range(length - count, length):
            own = position // c.block_size
            score_GP = shared_GP * SHARED**0.5 + drift_GP * DRIFTING**0.5
            score_GP += torch.randn(shape, generator=generator) * (1 - SHARED - DRIFTING) ** 0.5
            score_GP[:, own] = torch.inf
            taken = min(c.num_selected, own + 1)
            block_1GK = torch.full((1, c.num_groups, c.num_selected), -1, dtype=torch.int32)
            block_1GK[0, :, :taken] = score_GP[:, : own + 1].topk(taken).indices.sort().values
            parts.append(block_1GK)
            fresh_GP = torch.randn(shape, generator=generator)
            drift_GP = drift_GP * MEMORY + fresh_GP * (1 - MEMORY**2) ** 0.5
    return torch.cat(parts)


def visible_keys(case: PackedCase, block_TGK: Tensor) -> Tensor:
    """How many keys each token sees in each of its blocks, [T, G, K]: all of them but in the block it stands in."""
    ends = [torch.arange(n - count, n) for count, n in zip(case.num_tokens, case.lengths, strict=True)]
    position_T11 = torch.cat([torch.empty(0, dtype=torch.long), *ends])[:, None, None]
    seen_TGK = (position_T11 + 1 - block_TGK.long() * case.block_size).clamp(0, case.block_size)
    return seen_TGK.where(block_TGK >= 0, 0)


def union_keys(case: PackedCase, block_TGK: Tensor) -> int:
    """Keys that have to be read at least once: those of each request and group's distinct blocks."""
    seen_TGK = visible_keys(case, block_TGK)
    total = first = 0
    for count, length in zip(case.num_tokens, case.lengths, strict=True):
        most_GP = torch.zeros((case.num_groups, -(-length // case.block_size) + 1), dtype=torch.long)
        for g in range(case.num_groups):
            blocks = (block_TGK[first : first + count, g].long() + 1).flatten()
            most_GP[g].scatter_reduce_(0, blocks, seen_TGK[first : first + count, g].flatten(), "amax")
        total += int(most_GP[:, 1:].sum())
        first += count
    return total
