"""Attention block by block: the queries that chose a block meet its keys in one product, partial results are merged.

Each choice (a token, a group, one of its K blocks) is a row. Rows are sorted by group and block and cut into runs that
share one block, so that its keys are read once a run instead of once a token, and no product sees a key that was not
chosen. It pays where neighbouring tokens choose different blocks. Not differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RUN = 32
"""Choices in a run. Few choices of a block waste rows of its last run; short runs waste the product."""

RUNS_AT_ONCE = 512


@dataclass(frozen=True)
class _Runs:
    """Choices in runs: U runs of RUN rows, some of them unused. A choice c stands for (group, token, slot)."""

    group_U: Tensor
    block_U: Tensor
    token_UR: Tensor
    choice_UR: Tensor


def attend(
    q_tNH: Tensor,
    k_MGBH: Tensor,
    v_MGBH: Tensor,
    pages: Tensor,
    position_t: Tensor,
    block_tGK: Tensor,
    scale: float,
) -> Tensor:
    """Attention of the last tokens of one sequence over their blocks, in float32; zeros where nothing is visible."""
    count, groups, slots = block_tGK.shape
    block_size, length = k_MGBH.shape[2], int(position_t[-1]) + 1
    query_GthH = (q_tNH.unflatten(1, (groups, -1)).float() * scale).transpose(0, 1)
    heads, width = query_GthH.shape[2:]
    runs = _sorted(block_tGK, pages.shape[0])
    out_ChH = q_tNH.new_zeros((groups * count * slots, heads, width), dtype=torch.float32)
    top_Ch = out_ChH.new_full(out_ChH.shape[:2], -torch.inf)
    sum_Ch = out_ChH.new_zeros(out_ChH.shape[:2])
    offset_B = torch.arange(block_size)
    for lo in range(0, runs.block_U.shape[0], RUNS_AT_ONCE):
        part = slice(lo, lo + RUNS_AT_ONCE)
        group_U, block_U, token_UR = runs.group_U[part], runs.block_U[part], runs.token_UR[part]
        key_UBH = k_MGBH[pages[block_U], group_U].float()
        value_UBH = v_MGBH[pages[block_U], group_U].float()
        query_UrH = query_GthH[group_U[:, None], token_UR].flatten(1, 2)
        score_URhB = (query_UrH @ key_UBH.mT).unflatten(1, (RUN, heads))
        late = ((block_U + 1) * block_size > int(position_t[0])).nonzero()[:, 0]
        if late.numel():
            slot_LB = block_U[late, None] * block_size + offset_B
            unseen_LRB = slot_LB[:, None] > position_t[token_UR[late]][..., None]
            score_URhB[late] = score_URhB[late].masked_fill(unseen_LRB[:, :, None], -torch.inf)
            value_UBH[late] = value_UBH[late].masked_fill((slot_LB >= length)[..., None], 0.0)
        top_URh = score_URhB.amax(-1)
        weight_URhB = score_URhB.sub_(top_URh.clamp(min=-1e30)[..., None]).exp_()
        used = runs.choice_UR[part] >= 0
        choice = runs.choice_UR[part][used]
        top_Ch[choice] = top_URh[used]
        sum_Ch[choice] = weight_URhB.sum(-1)[used]
        out_ChH[choice] = (weight_URhB.flatten(1, 2) @ value_UBH).unflatten(1, (RUN, heads))[used]
    merged_GthH = _merge(*(x.unflatten(0, (groups, count, slots)) for x in (out_ChH, top_Ch, sum_Ch)))
    return merged_GthH.transpose(0, 1).flatten(1, 2).to(q_tNH.dtype)


def _sorted(block_tGK: Tensor, num_blocks: int) -> _Runs:
    count, groups, slots = block_tGK.shape
    chosen_GC = block_tGK.transpose(0, 1).flatten(1).long()
    unused = groups * num_blocks
    bucket_GC = chosen_GC + torch.arange(groups)[:, None] * num_blocks
    inside = (chosen_GC >= 0) & (chosen_GC < num_blocks)
    bucket_C, choice_C = bucket_GC.where(inside, unused).flatten().sort(stable=True)
    count_S = torch.bincount(bucket_C, minlength=unused + 1)[:-1]
    valid = int(count_S.sum())
    bucket_C, choice_C = bucket_C[:valid], choice_C[:valid]
    runs_S = -(-count_S // RUN)
    bucket_U = torch.repeat_interleave(torch.arange(unused), runs_S)
    rank_C = torch.arange(valid) - (count_S.cumsum(0) - count_S)[bucket_C]
    place_C = (runs_S.cumsum(0) - runs_S)[bucket_C] * RUN + rank_C
    choice = torch.full((bucket_U.shape[0] * RUN,), -1).index_copy(0, place_C, choice_C).view(-1, RUN)
    token_UR = choice.clamp(min=0) % (count * slots) // slots
    return _Runs(bucket_U // num_blocks, bucket_U % num_blocks, token_UR, choice)


def _merge(out_GtKhH: Tensor, top_GtKh: Tensor, sum_GtKh: Tensor) -> Tensor:
    """One softmax out of those of the single blocks."""
    share_GtKh = (top_GtKh - top_GtKh.amax(2, keepdim=True).clamp(min=-1e30)).exp()
    total_Gth = (sum_GtKh * share_GtKh).sum(2).clamp(min=1e-30)
    return (out_GtKhH * share_GtKh[..., None]).sum(2) / total_Gth[..., None]
