"""Attention over selected blocks, as defined: gather the keys, mask, softmax. Pure PyTorch, float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS_AT_ONCE = 1 << 25
"""Gathered key or score values held at a time: nothing here grows with the square of the sequence."""


def sparse_attention(
    q_TNH: Tensor,
    k_MGBH: Tensor,
    v_MGBH: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    block_TGK: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _, groups, block_size, width = k_MGBH.shape
    num_selected = block_TGK.shape[2]
    step = max(1, FLOATS_AT_ONCE // max(1, groups * num_selected * block_size * width))
    group_G1 = torch.arange(groups, device=q_TNH.device)[:, None]
    outs, lses = [], []
    starts, lengths = start_R1.tolist(), length_R.tolist()
    for r, length in enumerate(lengths):
        for first in range(starts[r], starts[r + 1], step):
            tokens = slice(first, min(first + step, starts[r + 1]))
            position_t = torch.arange(tokens.start, tokens.stop, device=q_TNH.device) + length - starts[r + 1]
            block_tGK = block_TGK[tokens].long()
            block_tGK = block_tGK.where(block_tGK * block_size <= position_t[:, None, None], -1)
            page_tGK = page_RP[r][block_tGK.clamp(min=0)].long()
            key_tGSH = k_MGBH[page_tGK, group_G1].flatten(2, 3)
            value_tGSH = v_MGBH[page_tGK, group_G1].flatten(2, 3)
            slot_tGS = (block_tGK[..., None] * block_size + torch.arange(block_size, device=q_TNH.device)).flatten(2)
            seen_tGS = (block_tGK >= 0).repeat_interleave(block_size, 2) & (slot_tGS <= position_t[:, None, None])
            query_tGHH = q_TNH[tokens].unflatten(1, (groups, -1))
            out, lse = _softmax_sum(query_tGHH, key_tGSH, value_tGSH, seen_tGS[:, :, None], scale)
            outs.append(out.flatten(1, 2))
            lses.append(lse.flatten(1, 2))
    return _joined(outs, lses, q_TNH)


def dense_attention(
    q_TNH: Tensor,
    k_MGBH: Tensor,
    v_MGBH: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _, groups, block_size, _ = k_MGBH.shape
    outs, lses = [], []
    starts, lengths = start_R1.tolist(), length_R.tolist()
    for r, length in enumerate(lengths):
        pages = page_RP[r, : -(-length // block_size)].long()
        key_GSH = k_MGBH[pages].transpose(0, 1).flatten(1, 2)
        value_GSH = v_MGBH[pages].transpose(0, 1).flatten(1, 2)
        slot_S = torch.arange(key_GSH.shape[1], device=q_TNH.device)
        step = max(1, FLOATS_AT_ONCE // (q_TNH.shape[1] * max(1, key_GSH.shape[1])))
        for first in range(starts[r], starts[r + 1], step):
            tokens = slice(first, min(first + step, starts[r + 1]))
            position_t = torch.arange(tokens.start, tokens.stop, device=q_TNH.device) + length - starts[r + 1]
            query_GHtH = q_TNH[tokens].unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
            seen_tS = slot_S <= position_t[:, None]
            out, lse = _softmax_sum(query_GHtH, key_GSH[:, None], value_GSH[:, None], seen_tS, scale)
            outs.append(out.permute(2, 0, 1, 3).flatten(1, 2))
            lses.append(lse.permute(2, 0, 1).flatten(1, 2))
    return _joined(outs, lses, q_TNH)


def _softmax_sum(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax over the seen keys and the sum of their values; zeros and -inf where nothing is seen."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    unused = ~seen.any(-2)[..., None]
    key, value = key.to(wide).masked_fill(unused, 0.0), value.to(wide).masked_fill(unused, 0.0)
    score = (query.to(wide) @ key.transpose(-1, -2)) * scale
    score = score.masked_fill(~seen, -torch.inf)
    lse = score.logsumexp(-1)
    weight = (score - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
    return weight @ value, lse


def _joined(outs: list[Tensor], lses: list[Tensor], q_TNH: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q_TNH.dtype == torch.float64 else torch.float32
    if not outs:
        return torch.zeros_like(q_TNH), q_TNH.new_zeros(q_TNH.shape[:2], dtype=wide)
    return torch.cat(outs).to(q_TNH.dtype), torch.cat(lses)
