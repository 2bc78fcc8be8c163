"""Block selection in PyTorch at a usable speed: key tiles that stay in cache, one top-k for the threshold.

Equal to the reference by construction: the K-th largest score is a value, everything above it is taken, and blocks that
tie with it are taken from the smallest on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from openm3.ops.index import IndexCodes

TILE_TOKENS = 256
TILE_SCORES = 1 << 20
"""Scores in one tile: 4 MB in float32, so that the block maximum reads what the product has just written."""


def select_blocks(
    index_q_TGJ: Tensor,
    index_k_MBJ: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    num_selected: int,
    num_local: int,
    codes: IndexCodes | None = None,
) -> Tensor:
    block_size = index_k_MBJ.shape[1]
    block_TGK = index_q_TGJ.new_full((*index_q_TGJ.shape[:2], num_selected), -1, dtype=torch.int32)
    starts, lengths = start_R1.tolist(), length_R.tolist()
    for r, length in enumerate(lengths):
        if starts[r] == starts[r + 1]:
            continue
        num_blocks = -(-length // block_size)
        key_SJ = None
        for first in range(starts[r], starts[r + 1], TILE_TOKENS):
            tokens = slice(first, min(first + TILE_TOKENS, starts[r + 1]))
            position_t = torch.arange(tokens.start, tokens.stop) + length - starts[r + 1]
            visible = int(position_t[-1]) // block_size + 1
            if visible <= num_selected:
                block_P = torch.arange(visible, dtype=torch.int32)
                shown_tP = block_P <= (position_t // block_size)[:, None]
                block_TGK[tokens, :, :visible] = torch.where(shown_tP, block_P, -1)[:, None]
                continue
            if num_local == num_selected:
                newest_tK = (position_t // block_size)[:, None] + torch.arange(1 - num_selected, 1)
                block_TGK[tokens] = _ascending(newest_tK.where(newest_tK >= 0, visible), visible)[:, None]
                continue
            if key_SJ is None:
                key_SJ = index_k_MBJ[page_RP[r, :num_blocks].long()].flatten(0, 1).float()
            score_tGP = _tile_scores(index_q_TGJ[tokens].float(), key_SJ, position_t, visible, block_size)
            block_TGK[tokens] = _take(score_tGP, position_t // block_size, num_selected, num_local)
    return block_TGK


def _tile_scores(q_tGJ: Tensor, key_SJ: Tensor, position_t: Tensor, visible: int, block_size: int) -> Tensor:
    """Block maxima [t, G, visible] of a tile, key span by key span; only the last blocks need the causal mask."""
    rows, groups = q_tGJ.shape[:2]
    flat = q_tGJ.flatten(0, 1)
    span = max(1, TILE_SCORES // (rows * groups * block_size)) * block_size
    end = visible * block_size
    score_tGP = q_tGJ.new_empty((rows, groups, visible))
    for lo in range(0, end, span):
        hi = min(lo + span, end)
        score = (flat @ key_SJ[lo:hi].T).view(rows, groups, hi - lo)
        if hi > int(position_t[0]) + 1:
            slot = torch.arange(lo, hi)
            score.masked_fill_((slot > position_t[:, None])[:, None], -torch.inf)
        best = score.view(rows, groups, -1, block_size).amax(-1)
        if best.isnan().any():
            score.masked_fill_(score.isnan(), -torch.inf)
            best = score.view(rows, groups, -1, block_size).amax(-1)
        score_tGP[..., lo // block_size : hi // block_size] = best
    return score_tGP


def _take(score_tGP: Tensor, own_t: Tensor, num_selected: int, num_local: int) -> Tensor:
    """The K blocks of the total order, ascending with -1 at the tail. More than K blocks are given."""
    num_blocks = score_tGP.shape[-1]
    block_P = torch.arange(num_blocks)
    hidden_tP = block_P > own_t[:, None]
    forced_tP = ~hidden_tP & (block_P > own_t[:, None] - num_local)
    free_t1 = (num_selected - forced_tP.sum(-1))[:, None, None]
    open_tGP = (~hidden_tP & ~forced_tP)[:, None].expand_as(score_tGP)
    score_tGP = score_tGP.masked_fill(~open_tGP, -torch.inf)
    best_tGK = score_tGP.topk(num_selected, dim=-1, sorted=True).values
    rank = (free_t1 - 1).clamp(min=0).expand(-1, score_tGP.shape[1], 1)
    threshold_tG1 = best_tGK.gather(-1, rank)
    above = score_tGP > threshold_tG1
    equal = (score_tGP == threshold_tG1) & open_tGP
    room = free_t1 - above.sum(-1, keepdim=True)
    taken = (above | (equal & (equal.cumsum(-1) <= room))) & (free_t1 > 0) | forced_tP[:, None]
    best = torch.where(taken, block_P, num_blocks).topk(num_selected, dim=-1, largest=False, sorted=False).values
    return _ascending(best, num_blocks)


def _ascending(block: Tensor, none: int) -> Tensor:
    """Blocks in ascending order, `none` as -1 at the tail."""
    block = block.sort(-1).values
    return block.masked_fill(block == none, -1).to(torch.int32)


def supports(
    index_q_TGJ: Tensor,
    index_k_MBJ: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    num_selected: int,
    num_local: int,
    codes: IndexCodes | None = None,
) -> str | None:
    if index_q_TGJ.device.type != "cpu":
        return f"needs CPU tensors, not {index_q_TGJ.device.type}"
    if index_q_TGJ.dtype == torch.float64:
        return "computes in float32, not float64"
    return None
