"""Attention of short sequences with their scores in memory, through torch.compile: what training runs.

Scores of [N, T, S] fit in cache for the lengths that a small model trains on; the products then run at matrix speed and
everything between them is one fused pass, forward and backward. Opt-in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from openm3.ops.dispatch import compile_late, missing_compiler

MAX_LENGTH = 8192


def sparse_attention(
    q_TNH: Tensor,
    k_MGBH: Tensor,
    v_MGBH: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    block_TGK: Tensor,
    scale: float,
) -> Tensor:
    block_size = k_MGBH.shape[2]
    starts = start_R1.tolist()
    outs = []
    for r, length in enumerate(length_R.tolist()):
        tokens = slice(starts[r], starts[r + 1])
        if tokens.start == tokens.stop:
            continue
        pages = page_RP[r, : -(-length // block_size)].long()
        own_t = _positions(tokens, length) // block_size
        chosen_GtK = block_TGK[tokens].transpose(0, 1).long()
        visible_GtK = (chosen_GtK >= 0) & (chosen_GtK <= own_t[:, None])
        member_GtP = torch.zeros((*chosen_GtK.shape[:2], pages.shape[0] + 1), dtype=torch.bool)
        member_GtP.scatter_(2, chosen_GtK.where(visible_GtK, pages.shape[0]), True)
        seen_GtS = member_GtP[..., :-1].repeat_interleave(block_size, -1)[..., :length] & _causal(tokens, length)
        out_GhtH = _attend(q_TNH[tokens], k_MGBH[pages], v_MGBH[pages], seen_GtS, scale)
        out_GhtH = out_GhtH.where(visible_GtK.any(-1)[:, None, :, None], 0.0)
        outs.append(out_GhtH.permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(outs).to(q_TNH.dtype) if outs else torch.zeros_like(q_TNH)


def dense_attention(
    q_TNH: Tensor,
    k_MGBH: Tensor,
    v_MGBH: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    scale: float,
) -> Tensor:
    block_size = k_MGBH.shape[2]
    starts = start_R1.tolist()
    outs = []
    for r, length in enumerate(length_R.tolist()):
        tokens = slice(starts[r], starts[r + 1])
        if tokens.start == tokens.stop:
            continue
        pages = page_RP[r, : -(-length // block_size)].long()
        out_GhtH = _attend(q_TNH[tokens], k_MGBH[pages], v_MGBH[pages], _causal(tokens, length)[None], scale)
        outs.append(out_GhtH.permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(outs).to(q_TNH.dtype) if outs else torch.zeros_like(q_TNH)


def supports(q_TNH: Tensor, k_MGBH: Tensor, v_MGBH: Tensor, page_RP: Tensor, *_rest: object) -> str | None:
    if q_TNH.device.type != "cpu":
        return f"needs CPU tensors, not {q_TNH.device.type}"
    if q_TNH.dtype == torch.float64:
        return "computes in float32, not float64"
    length = page_RP.shape[1] * k_MGBH.shape[2]
    if length > MAX_LENGTH:
        return f"keeps all scores in memory: at most {MAX_LENGTH} tokens a sequence, not {length}"
    return missing_compiler()


def _positions(tokens: slice, length: int) -> Tensor:
    return torch.arange(length - (tokens.stop - tokens.start), length)


def _causal(tokens: slice, length: int) -> Tensor:
    return torch.arange(length) <= _positions(tokens, length)[:, None]


def _attend(q_tNH: Tensor, k_PGBH: Tensor, v_PGBH: Tensor, seen_GtS: Tensor, scale: float) -> Tensor:
    """The heads' outputs [G, N/G, t, H], float32, over the first S keys of the pages."""
    groups, length = k_PGBH.shape[1], seen_GtS.shape[2]
    key_GSH = k_PGBH.transpose(0, 1).flatten(1, 2)[:, :length].float()
    value_GSH = v_PGBH.transpose(0, 1).flatten(1, 2)[:, :length].float()
    query_GhtH = q_tNH.float().unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
    score_GhtS = (query_GhtH.flatten(1, 2) @ key_GSH.mT).view(*query_GhtH.shape[:3], length)
    weight_GhtS = _masked_softmax(score_GhtS, seen_GtS, scale)
    out_GhtH: Tensor = (weight_GhtS.flatten(1, 2) @ value_GSH).view(query_GhtH.shape)
    return out_GhtH


@compile_late
def _masked_softmax(score_GhtS: Tensor, seen_GtS: Tensor, scale: float) -> Tensor:
    return torch.where(seen_GtS[:, None], score_GhtS * scale, -1e9).softmax(-1)
