"""Attention of requests of a few tokens (decode, verify) in Triton: their blocks are split over programs, and merged.

A token's keys are cut into parts. What a few parts give is folded into one in their order, either by the program that
reads them or, where more programs are wanted to fill the machine, by the one that merges: both round alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from openm3.ops.attention.triton_call import WORKSPACE, Call, Tile, shape, strides
from openm3.ops.attention.triton_softmax import fold, part


@dataclass(frozen=True)
class Split:
    """How a token's parts of `tile.keys` keys are shared out over programs.

    `splits` programs take `parts` parts each; the merge folds the results of `folded` programs before it adds them up.
    In dense layers a program takes at least `parts`, more if the token's keys make more for all programs.
    """

    tile: Tile
    parts: int
    splits: int
    folded: int


def launch(call: Call, split: Split, few: int) -> None:
    """Requests of up to `few` tokens; if the batch has no longer ones, also zeros where no request is."""
    (num_tokens, heads, width), groups = call.q_TNH.shape, call.k_MGBH.shape[1]
    num_requests, block_TGK, device = call.length_R.shape[0], call.block_TGK, call.q_TNH.device
    dense = block_TGK is None
    # A place is a token of the batch, or one of the first `few` of a request where that makes less of them.
    by_token = num_tokens <= num_requests * few
    places = num_tokens if by_token else num_requests * few
    at_once = max(1, WORKSPACE // (split.splits * heads * (width + 2) * 4))
    acc = torch.empty((min(places, at_once), split.splits, heads, width), dtype=torch.float32, device=device)
    top, total = torch.empty((2, *acc.shape[:3]), dtype=torch.float32, device=device)
    for first in range(0, places, at_once):
        common = {
            **call.where(),
            "p_top": top,
            "p_total": total,
            "p_acc": acc,
            "first": first,
            "few": few,
            "splits": split.splits,
            "num_selected": 0 if dense else block_TGK.shape[2],
            "BLOCK": call.k_MGBH.shape[2],
            "USED_WIDTH": width,
            "KEYS": split.tile.keys,
            "WIDTH": split.tile.width,
            "SHARE": split.parts,
            "BY_TOKEN": by_token,
            "DENSE": dense,
        }
        now = min(at_once, places - first)
        _attend_split[(now, split.splits, groups)](
            **(call.pools() | common | shape(split.tile)),
            **strides("block", "tgk", call.page_RP[None] if dense else block_TGK),
            p_block=block_TGK,
        )
        _merge[(now, heads)](
            **common,
            p_out=call.out_TNH,
            p_lse=call.lse_TN,
            FOLDED=split.folded,
            CHUNK=16 if dense else 4,
            num_warps=4,
        )


@triton.jit
def _find(place, p_start, p_length, num_requests, num_tokens, few, BY_TOKEN: tl.constexpr):
    """Request and token of a place, the token's position, and whether there is such a token in a request of a few."""
    if BY_TOKEN:
        token = place
        # In decode all requests have one token, in verify all have the same number: bisection begins with that guess.
        low = (token.to(tl.int64) * num_requests // num_tokens).to(tl.int32)
        high = low + 1
        if (tl.load(p_start + low) > token) | (tl.load(p_start + high) <= token):
            low = 0
            high = num_requests
        while high - low > 1:
            middle = (low + high) // 2
            if tl.load(p_start + middle) <= token:
                low = middle
            else:
                high = middle
        r = low
        start = tl.load(p_start + r).to(tl.int32)
    else:
        r = place // few
        start = tl.load(p_start + r).to(tl.int32)
        token = start + place % few
    stop = tl.load(p_start + r + 1).to(tl.int32)
    position = tl.load(p_length + r).to(tl.int32) - stop + token
    return r, token, position, (token < stop) & (stop - start <= few)


@triton.jit
def _share(
    position, num_selected, splits, BLOCK: tl.constexpr, KEYS: tl.constexpr, SHARE: tl.constexpr, DENSE: tl.constexpr
):
    """A token's number of parts, and how many of them a program takes."""
    if DENSE:
        parts = position // KEYS + 1
        return parts, tl.maximum(SHARE, (parts + splits - 1) // splits)
    return num_selected * (BLOCK // KEYS), SHARE


@triton.jit
def _block(p_block, p_page, slot, own, stride_block_k, stride_page_p, DENSE: tl.constexpr):
    """The block of a slot, -1 if the token does not see it, and its page."""
    block = slot
    if not DENSE:
        block = tl.load(p_block + slot * stride_block_k)
        block = tl.where(block <= own, block, -1).to(tl.int32)
    return block, tl.load(p_page + block * stride_page_p, mask=block >= 0, other=0).to(tl.int64)


@triton.jit(do_not_specialize=["num_requests", "num_tokens", "first", "few", "splits", "num_selected"])
def _attend_split(
    p_q,
    p_k,
    p_v,
    p_page,
    p_start,
    p_length,
    p_block,
    p_top,
    p_total,
    p_acc,
    scale,
    num_requests,
    num_tokens,
    first,
    few,
    splits,
    num_selected,
    stride_q_t,
    stride_q_n,
    stride_q_h,
    stride_k_m,
    stride_k_g,
    stride_k_b,
    stride_k_h,
    stride_v_m,
    stride_v_g,
    stride_v_b,
    stride_v_h,
    stride_page_r,
    stride_page_p,
    stride_block_t,
    stride_block_g,
    stride_block_k,
    USED_HEADS: tl.constexpr,
    USED_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    SHARE: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    DENSE: tl.constexpr,
):
    """One token, all heads of a group, over a share of its parts: the state of its softmax after them."""
    place, split, g = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    r, token, position, exists = _find(first + place, p_start, p_length, num_requests, num_tokens, few, BY_TOKEN)
    parts, share = _share(position, num_selected, splits, BLOCK, KEYS, SHARE, DENSE)
    begin = split * share
    if (begin >= parts) | (exists == 0):
        return
    row = tl.arange(0, HEADS)
    c = tl.arange(0, WIDTH)
    n = g * USED_HEADS + row
    there = row < USED_HEADS
    used = there[:, None] & (c < USED_WIDTH)[None, :]
    p_rows = p_q + token.to(tl.int64) * stride_q_t + n.to(tl.int64)[:, None] * stride_q_n
    b_q = tl.load(p_rows + c[None, :] * stride_q_h, mask=used, other=0.0).to(DTYPE)
    top = tl.full([HEADS], -float("inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, WIDTH], tl.float32)
    p_k += g.to(tl.int64) * stride_k_g
    p_v += g.to(tl.int64) * stride_v_g
    p_page += r.to(tl.int64) * stride_page_r
    if not DENSE:
        p_block += token.to(tl.int64) * stride_block_t + g.to(tl.int64) * stride_block_g
    PARTS: tl.constexpr = BLOCK // KEYS
    own = position // BLOCK
    stop = tl.minimum(begin + share, parts)
    block, page = _block(p_block, p_page, begin // PARTS, own, stride_block_k, stride_page_p, DENSE)
    for j in range(begin, stop):
        # Known one step ahead, so that keys and values can be under way several steps ahead.
        following = tl.minimum(j + 1, stop - 1) // PARTS
        next_block, next_page = _block(p_block, p_page, following, own, stride_block_k, stride_page_p, DENSE)
        inside = j % PARTS * KEYS
        end = tl.where(block >= 0, position + 1 - block * BLOCK - inside, 0)
        more_top, more_total, more_acc = part(
            b_q,
            p_k + page * stride_k_m + inside * stride_k_b,
            p_v + page * stride_v_m + inside * stride_v_b,
            tl.where(there, end - 1, -1),
            end,
            scale,
            stride_k_b,
            stride_k_h,
            stride_v_b,
            stride_v_h,
            USED_WIDTH,
            KEYS,
            WIDTH,
            DTYPE,
        )
        top, total, acc = fold(top, total, acc, more_top, more_total, more_acc)
        block = next_block
        page = next_page
    at = (place.to(tl.int64) * splits + split) * (USED_HEADS * tl.num_programs(2)) + n
    tl.store(p_acc + at[:, None] * USED_WIDTH + c[None, :], acc, mask=used)
    tl.store(p_top + at, top, mask=there)
    tl.store(p_total + at, total, mask=there)


@triton.jit(do_not_specialize=["num_requests", "num_tokens", "first", "few", "splits", "num_selected"])
def _merge(
    p_page,
    p_start,
    p_length,
    p_top,
    p_total,
    p_acc,
    p_out,
    p_lse,
    num_requests,
    num_tokens,
    first,
    few,
    splits,
    num_selected,
    stride_page_r,
    stride_page_p,
    BLOCK: tl.constexpr,
    USED_WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARE: tl.constexpr,
    FOLDED: tl.constexpr,
    CHUNK: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    DENSE: tl.constexpr,
):
    """One token and head: what programs left, folded FOLDED at a time, then added up, always in the same order."""
    place, n, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    _, token, position, exists = _find(first + place, p_start, p_length, num_requests, num_tokens, few, BY_TOKEN)
    # A token of no request gets zeros, if it has a place.
    nobody = BY_TOKEN & (token >= tl.load(p_start + num_requests))
    if (exists | nobody) == 0:
        return
    parts, share = _share(position, num_selected, splits, BLOCK, KEYS, SHARE, DENSE)
    programs = tl.where(nobody, 0, (parts + share - 1) // share)
    i = tl.arange(0, CHUNK)
    c = tl.arange(0, WIDTH)
    base = place.to(tl.int64) * splits * heads + n
    top = tl.full([CHUNK], -float("inf"), tl.float32)
    total = tl.zeros([CHUNK], tl.float32)
    acc = tl.zeros([CHUNK, WIDTH], tl.float32)
    for chunk in range(0, programs, CHUNK * FOLDED):
        some_top = tl.full([CHUNK], -float("inf"), tl.float32)
        some_total = tl.zeros([CHUNK], tl.float32)
        some_acc = tl.zeros([CHUNK, WIDTH], tl.float32)
        for k in tl.static_range(FOLDED):
            program = chunk + i * FOLDED + k
            there = program < programs
            at = base + program * heads
            more_top = tl.load(p_top + at, mask=there, other=-float("inf"))
            more_total = tl.load(p_total + at, mask=there, other=0.0)
            used = there[:, None] & (c < USED_WIDTH)[None, :]
            more_acc = tl.load(p_acc + at[:, None] * USED_WIDTH + c[None, :], mask=used, other=0.0)
            some_top, some_total, some_acc = fold(some_top, some_total, some_acc, more_top, more_total, more_acc)
        top, total, acc = fold(top, total, acc, some_top, some_total, some_acc)
    most = tl.max(top)
    share_of = tl.exp2(top - tl.where(most == -float("inf"), 0.0, most))
    whole = tl.sum(total * share_of)
    whole = tl.where(whole == 0.0, 1.0, whole)
    at = token.to(tl.int64) * heads + n
    tl.store(p_out + at * USED_WIDTH + c, tl.sum(acc * share_of[:, None], axis=0) / whole, mask=c < USED_WIDTH)
    if p_lse is not None:
        LN_2: tl.constexpr = 0.6931471805599453
        tl.store(p_lse + at, (most + tl.log2(whole)) * LN_2)
