"""Block selection, as defined: every score, then two stable sorts. Pure PyTorch, float32 or float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from openm3.ops.index import IndexCodes

SCORES_AT_ONCE = 1 << 24
"""Token scores held at a time, so that no [T, G, S] exists at length."""


def block_scores(
    index_q_TGJ: Tensor, index_k_MBJ: Tensor, page_RP: Tensor, start_R1: Tensor, length_R: Tensor
) -> Tensor:
    wide = torch.float64 if index_q_TGJ.dtype == torch.float64 else torch.float32
    score_TGP = index_q_TGJ.new_full((*index_q_TGJ.shape[:2], page_RP.shape[1]), -torch.inf, dtype=wide)
    for tokens, score_tGP in _chunks(index_q_TGJ, index_k_MBJ, page_RP, start_R1, length_R):
        score_TGP[tokens, :, : score_tGP.shape[2]] = score_tGP
    return score_TGP


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
    for tokens, score_tGP in _chunks(index_q_TGJ, index_k_MBJ, page_RP, start_R1, length_R):
        position_T = token_positions(start_R1, length_R)[tokens]
        own_t = position_T.to(score_tGP.device) // block_size
        block_P = torch.arange(score_tGP.shape[2], device=score_tGP.device)
        hidden_tP = block_P > own_t[:, None]
        forced_tP = ~hidden_tP & (block_P > own_t[:, None] - num_local)
        rank_tGP = torch.where(hidden_tP, 2, torch.where(forced_tP, 0, 1))[:, None].expand_as(score_tGP)
        by_score = score_tGP.sort(dim=-1, descending=True, stable=True).indices
        by_rank = rank_tGP.gather(-1, by_score).sort(dim=-1, stable=True)
        best = by_score.gather(-1, by_rank.indices)[..., :num_selected]
        best = best.masked_fill(by_rank.values[..., :num_selected] == 2, block_P.numel()).sort(dim=-1).values
        block_TGK[tokens, :, : best.shape[-1]] = best.masked_fill(best == block_P.numel(), -1).to(torch.int32)
    return block_TGK


def token_positions(start_R1: Tensor, length_R: Tensor) -> Tensor:
    """Position of each packed token in its own sequence: a request's tokens are the last ones of its keys."""
    count_R = start_R1[1:] - start_R1[:-1]
    first_R = (length_R - count_R - start_R1[:-1]).long()
    return torch.repeat_interleave(first_R, count_R.long()) + torch.arange(int(start_R1[-1]), device=start_R1.device)


def _chunks(
    index_q_TGJ: Tensor, index_k_MBJ: Tensor, page_RP: Tensor, start_R1: Tensor, length_R: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (tokens, score_tGP): the block scores of a few tokens of one request, over the blocks it holds."""
    block_size = index_k_MBJ.shape[1]
    wide = torch.float64 if index_q_TGJ.dtype == torch.float64 else torch.float32
    starts, lengths = start_R1.tolist(), length_R.tolist()
    for r, length in enumerate(lengths):
        if starts[r] == starts[r + 1]:
            continue
        num_blocks = -(-length // block_size)
        key_SJ = index_k_MBJ[page_RP[r, :num_blocks].long()].flatten(0, 1).to(wide)
        # Slots after the last key may hold NaN, which a masked score would still pass to the gradient of the query.
        key_SJ[length:] = 0.0
        slot_S = torch.arange(key_SJ.shape[0], device=key_SJ.device)
        step = max(1, SCORES_AT_ONCE // (key_SJ.shape[0] * index_q_TGJ.shape[1]))
        for first in range(starts[r], starts[r + 1], step):
            tokens = slice(first, min(first + step, starts[r + 1]))
            position_t = torch.arange(tokens.start, tokens.stop, device=slot_S.device) + length - starts[r + 1]
            score_tGS = index_q_TGJ[tokens].to(wide) @ key_SJ.T
            score_tGS = score_tGS.masked_fill(score_tGS.isnan(), -torch.inf)
            score_tGS = score_tGS.masked_fill((slot_S > position_t[:, None])[:, None], -torch.inf)
            yield tokens, score_tGS.unflatten(-1, (num_blocks, block_size)).amax(-1)


def encode_pages(index_k_MBJ: Tensor, slot_T: Tensor, codes: IndexCodes) -> None:
    """Nothing is known of the pages: infinite bounds, so that whoever scans codes looks at every key itself."""
    page_T = slot_T.long() // index_k_MBJ.shape[1]
    codes.bound_M3[page_T] = 0.0
    codes.bound_M3[page_T, 1] = torch.inf
