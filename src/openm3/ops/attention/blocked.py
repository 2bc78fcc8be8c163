"""Attention in PyTorch at a usable speed, three ways.

A few tokens gather their own blocks. Tiles of neighbouring tokens share the keys of the union of their blocks, in one
scaled-dot-product call with a membership mask. In long sequences, where unions grow with the context, the tokens that
chose a block share its keys instead.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from openm3.ops.attention import block_major

TILE_TOKENS = 64
FEW_TOKENS = 4
"""Up to here each token gathers its own blocks."""

MASK_AT_ONCE = 1 << 24
WHOLE_LENGTH = 4096
"""Up to this many keys a whole sequence runs as one masked call: many short sequences are what training has."""


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
    starts, lengths = start_R1.tolist(), length_R.tolist()
    outs = []
    for r, length in enumerate(lengths):
        tokens = slice(starts[r], starts[r + 1])
        count = starts[r + 1] - starts[r]
        if count == 0:
            continue
        q_tNH, block_tGK = q_TNH[tokens], block_TGK[tokens]
        pages = page_RP[r, : -(-length // block_size)].long()
        position_t = torch.arange(length - count, length)
        if count <= FEW_TOKENS:
            outs.append(_gathered(q_tNH, k_MGBH, v_MGBH, pages, position_t, block_tGK, scale))
            continue
        differentiable = torch.is_grad_enabled() and (
            q_TNH.requires_grad or k_MGBH.requires_grad or v_MGBH.requires_grad
        )
        if length > WHOLE_LENGTH and not differentiable:
            outs.append(block_major.attend(q_tNH, k_MGBH, v_MGBH, pages, position_t, block_tGK, scale))
            continue
        step = count if length <= WHOLE_LENGTH else TILE_TOKENS
        for first in range(0, count, step):
            tile = slice(first, min(first + step, count))
            outs.append(_union(q_tNH[tile], k_MGBH, v_MGBH, pages, position_t[tile], block_tGK[tile], scale))
    return torch.cat(outs) if outs else torch.zeros_like(q_TNH)


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
    starts, lengths = start_R1.tolist(), length_R.tolist()
    outs = []
    for r, length in enumerate(lengths):
        count = starts[r + 1] - starts[r]
        if count == 0:
            continue
        q_tNH = q_TNH[starts[r] : starts[r + 1]]
        pages = page_RP[r, : -(-length // block_size)].long()
        key_GSH = k_MGBH[pages].transpose(0, 1).flatten(1, 2)[:, :length]
        value_GSH = v_MGBH[pages].transpose(0, 1).flatten(1, 2)[:, :length]
        if count == length:
            outs.append(_attend(q_tNH, key_GSH, value_GSH, None, scale, causal=True))
            continue
        step = max(1, MASK_AT_ONCE // length)
        for first in range(0, count, step):
            position_t = torch.arange(length - count + first, length - count + min(first + step, count))
            seen_tS = torch.arange(length) <= position_t[:, None]
            tile = q_tNH[first : first + step]
            outs.append(_attend(tile, key_GSH, value_GSH, seen_tS, scale))
    return torch.cat(outs) if outs else torch.zeros_like(q_TNH)


def _attend(
    q_tNH: Tensor, key_GSH: Tensor, value_GSH: Tensor, seen: Tensor | None, scale: float, causal: bool = False
) -> Tensor:
    """Attention of t tokens over one set of keys a group, in float32; `seen` broadcasts to [G, N/G, t, S]."""
    groups = key_GSH.shape[0]
    query_GhtH = q_tNH.float().unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
    shape = (groups, query_GhtH.shape[1], *key_GSH.shape[1:])
    key_GhSH, value_GhSH = key_GSH.float()[:, None].expand(shape), value_GSH.float()[:, None].expand(shape)
    out = F.scaled_dot_product_attention(query_GhtH, key_GhSH, value_GhSH, seen, is_causal=causal, scale=scale)
    return out.permute(2, 0, 1, 3).flatten(1, 2).to(q_tNH.dtype)


def _union(
    q_tNH: Tensor,
    k_MGBH: Tensor,
    v_MGBH: Tensor,
    pages: Tensor,
    position_t: Tensor,
    block_tGK: Tensor,
    scale: float,
) -> Tensor:
    """One masked call a group over the union of the tile's blocks."""
    groups, block_size = k_MGBH.shape[1], k_MGBH.shape[2]
    outs = []
    for g in range(groups):
        chosen_tK = block_tGK[:, g].long()
        member_tP = torch.zeros((chosen_tK.shape[0], pages.shape[0] + 1), dtype=torch.bool)
        inside = (chosen_tK >= 0) & (chosen_tK < pages.shape[0])
        member_tP.scatter_(1, chosen_tK.where(inside, pages.shape[0]), True)
        member_tP = member_tP[:, :-1]
        union_U = member_tP.any(0).nonzero()[:, 0]
        heads = slice(g * q_tNH.shape[1] // groups, (g + 1) * q_tNH.shape[1] // groups)
        if union_U.numel() == 0:
            outs.append(torch.zeros_like(q_tNH[:, heads]))
            continue
        slot_US = union_U[:, None] * block_size + torch.arange(block_size)
        seen_tS = (member_tP[:, union_U, None] & (slot_US <= position_t[:, None, None])).flatten(1)
        key_SH = k_MGBH[pages[union_U], g].flatten(0, 1)
        value_SH = v_MGBH[pages[union_U], g].flatten(0, 1)
        used = seen_tS.any(0)[:, None]
        out = _attend(
            q_tNH[:, heads], key_SH.where(used, 0)[None], value_SH.where(used, 0)[None], seen_tS[None, None], scale
        )
        outs.append(out.where(seen_tS.any(1)[:, None, None], 0.0))
    return torch.cat(outs, dim=1)


def _gathered(
    q_tNH: Tensor,
    k_MGBH: Tensor,
    v_MGBH: Tensor,
    pages: Tensor,
    position_t: Tensor,
    block_tGK: Tensor,
    scale: float,
) -> Tensor:
    """Token by token over its own blocks, all query heads of a group together."""
    groups, block_size = k_MGBH.shape[1], k_MGBH.shape[2]
    group_G1 = torch.arange(groups)[:, None]
    outs = []
    for q_NH, position, block_GK in zip(q_tNH, position_t, block_tGK.long(), strict=True):
        page_GK = pages[block_GK.clamp(0, pages.shape[0] - 1)]
        key_GSH = k_MGBH[page_GK, group_G1].flatten(1, 2)
        value_GSH = v_MGBH[page_GK, group_G1].flatten(1, 2)
        slot_GS = (block_GK[..., None] * block_size + torch.arange(block_size)).flatten(1)
        seen_GS = (block_GK >= 0).repeat_interleave(block_size, 1) & (slot_GS <= position)
        used = seen_GS[..., None]
        out = _attend(q_NH[None], key_GSH.where(used, 0), value_GSH.where(used, 0), seen_GS[:, None, None], scale)
        out = out.unflatten(1, (groups, -1)).where(seen_GS.any(1)[None, :, None, None], 0.0)
        outs.append(out.flatten(1, 2))
    return torch.cat(outs)


def supports(q_TNH: Tensor, *_args: object) -> str | None:
    if q_TNH.device.type != "cpu":
        return f"needs CPU tensors, not {q_TNH.device.type}"
    if q_TNH.dtype == torch.float64:
        return "computes in float32, not float64"
    return None
