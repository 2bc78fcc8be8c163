"""Attention of long requests in Triton: tiles of neighbouring tokens walk the union of their blocks.

Each block is read once a tile, and a row ignores the blocks that its token did not choose. Blocks before the tile's
first token need no causal mask: they are walked first, in a loop of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openm3.ops.attention.triton_call import Call, Marks, Tile, shape, strides
from openm3.ops.attention.triton_softmax import advance
from openm3.ops.triton import padded
from openm3.ops.triton.batch import request_of_tile


def num_tiles(call: Call, tile: Tile) -> int:
    """Request r has the tiles from start // tokens + r on, and so have the tokens that belong to no request."""
    return call.q_TNH.shape[0] // tile.tokens + call.length_R.shape[0] + 1


def launch(call: Call, tile: Tile, few: int, marks: Marks | None) -> Tensor | None:
    """Requests of more than `few` tokens, and zeros where no request is; tiles that get marks are left to others.

    Returns what the tiles have chosen, None in dense layers.
    """
    union = count = None
    groups, capacity = call.k_MGBH.shape[1], 0
    if call.block_TGK is not None:
        capacity = tile.tokens * call.block_TGK.shape[2]
        union, count = _unite_tiles(call, call.block_TGK, tile, few, marks)
    _attend_tile[(num_tiles(call, tile), groups)](
        **call.pools(),
        **call.where(),
        **shape(tile),
        p_union=union,
        p_count=count,
        p_out=call.out_TNH,
        p_lse=call.lse_TN,
        few=few,
        capacity=capacity,
        TOKENS=tile.tokens,
        DENSE=call.block_TGK is None,
    )
    return union


def _unite_tiles(call: Call, block_TGK: Tensor, tile: Tile, few: int, marks: Marks | None) -> tuple[Tensor, Tensor]:
    (_, groups, num_selected), device = block_TGK.shape, block_TGK.device
    tiles, capacity = num_tiles(call, tile), tile.tokens * num_selected
    union = torch.empty((tiles, groups, 3, capacity), dtype=torch.int32, device=device)
    count = torch.empty((tiles, groups, 2), dtype=torch.int32, device=device)
    unmarked = dict.fromkeys(("p_chosen", "p_listed", "p_tile")) | dict.fromkeys(("tiles", "num_pages"), 0)
    _unite[(tiles, groups)](
        **call.where(),
        **strides("block", "tgk", block_TGK),
        p_block=block_TGK,
        p_union=union,
        p_count=count,
        few=few,
        **(marks.arguments() if marks else unmarked),
        K=num_selected,
        SLOTS=padded(num_selected),
        TOKENS=tile.tokens,
        BLOCK=call.k_MGBH.shape[2],
        MARK=marks is not None,
        MOST=marks.most if marks else capacity,
        SHARED=marks.shared if marks else 0,
        num_warps=1 if capacity <= 512 else 4,
    )
    return union, count


@triton.jit
def find_tile(tile, p_start, num_requests, num_tokens, TOKENS: tl.constexpr):
    """A tile's request, that request's tokens, and the tile's first token, which may lie behind them.

    Request number `num_requests` owns what belongs to no request.
    """
    used = tl.load(p_start + num_requests)
    r = request_of_tile(p_start, num_requests + 1, 0, used, tile, TOKENS)
    start = tl.load(p_start + r).to(tl.int32)
    stop = tl.load(p_start + r + 1, mask=r < num_requests, other=num_tokens).to(tl.int32)
    return r, start, stop, start + (tile - start // TOKENS - r) * TOKENS


@triton.jit
def choices(
    p_block,
    first,
    g,
    own,
    stop,
    stride_t,
    stride_g,
    stride_k,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The blocks that a tile's tokens chose, -1 where that is none, or one after the token's own."""
    slot = tl.arange(0, SLOTS)
    token = first + tl.arange(0, TOKENS)
    there = (token < stop)[:, None] & (slot < K)[None, :]
    p_ids = p_block + g.to(tl.int64) * stride_g + token.to(tl.int64)[:, None] * stride_t + slot[None, :] * stride_k
    block = tl.load(p_ids, mask=there, other=-1)
    return tl.where(block <= own[:, None], block, -1).to(tl.int32)


@triton.jit(do_not_specialize=["num_requests", "num_tokens", "few", "tiles", "num_pages"])
def _unite(
    p_page,
    p_start,
    p_length,
    p_block,
    p_union,
    p_count,
    p_chosen,
    p_listed,
    p_tile,
    num_requests,
    num_tokens,
    few,
    tiles,
    num_pages,
    stride_page_r,
    stride_page_p,
    stride_block_t,
    stride_block_g,
    stride_block_k,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    MARK: tl.constexpr,
    MOST: tl.constexpr,
    SHARED: tl.constexpr,
):
    """The pages of a tile's visible blocks, ascending, the tokens that chose each as bits, and the blocks.

    Counts them all, and those before the tile's first token, which need no mask. Where MARK, tiles as `Marks` has them
    get a count of -1, and each of their choices its rank among those of its page.
    """
    tile, g, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    r, start, stop, first = find_tile(tile, p_start, num_requests, num_tokens, TOKENS)
    if (first >= stop) | (stop - start <= few) | (r == num_requests):
        return
    i = tl.arange(0, TOKENS)
    before = tl.load(p_length + r).to(tl.int32) - stop
    own = (before + first + i) // BLOCK
    chosen = choices(p_block, first, g, own, stop, stride_block_t, stride_block_g, stride_block_k, K, SLOTS, TOKENS)
    capacity = TOKENS * K
    if MARK:
        tokens = tl.minimum(stop - start, tiles * TOKENS)
        visible = (before + tl.minimum(first + TOKENS, stop) - 1) // BLOCK + 1
        capacity = tl.where(tokens.to(tl.int64) * K >= visible.to(tl.int64) * SHARED, MOST, capacity)
    NONE: tl.constexpr = 2147483647
    at = tl.arange(0, TOKENS * SLOTS)
    blocks = tl.zeros([TOKENS * SLOTS], tl.int32)
    members = tl.zeros([TOKENS * SLOTS], tl.int32)
    count = 0
    num_whole = 0
    ids = tl.where(chosen >= 0, chosen, NONE)
    least = tl.min(ids)
    while (least < NONE) & (count <= capacity):
        has = ids == least
        members = tl.where(at == count, tl.sum(tl.max(has.to(tl.int32), axis=1) << i), members)
        blocks = tl.where(at == count, least, blocks)
        count += 1
        num_whole += ((least + 1) * BLOCK <= before + first).to(tl.int32)
        ids = tl.where(has, NONE, ids)
        least = tl.min(ids)
    place = tile.to(tl.int64) * groups + g
    p_union += place * (3 * TOKENS * K)
    p_page += r.to(tl.int64) * stride_page_r
    if count > capacity:
        if MARK:
            chunk = (tile // tiles) * groups + g
            chosen_page = tl.load(p_page + chosen * stride_page_p, mask=chosen >= 0, other=0)
            p_of_page = p_chosen + chunk.to(tl.int64) * num_pages + chosen_page
            rank = tl.atomic_add(p_of_page, 1, mask=chosen >= 0, sem="relaxed")
            tl.store(p_union + i[:, None] * K + tl.arange(0, SLOTS)[None, :], rank, mask=chosen >= 0)
            tl.store(p_tile + chunk * tiles + tl.atomic_add(p_listed + chunk, 1, sem="relaxed"), tile)
            count = -1
    else:
        page = tl.load(p_page + blocks * stride_page_p, mask=at < count, other=0)
        tl.store(p_union + at, page.to(tl.int32), mask=at < count)
        tl.store(p_union + TOKENS * K + at, members, mask=at < count)
        tl.store(p_union + 2 * TOKENS * K + at, blocks, mask=at < count)
    tl.store(p_count + 2 * place, count)
    tl.store(p_count + 2 * place + 1, num_whole)


@triton.jit
def _page(p_page, p_union, number, there, stride_page_p, DENSE: tl.constexpr):
    """The page of a block of the walk."""
    p = p_page + number * stride_page_p if DENSE else p_union + number
    return tl.load(p, mask=there, other=0).to(tl.int64)


@triton.jit(do_not_specialize=["num_requests", "num_tokens", "few"])
def _attend_tile(
    p_q,
    p_k,
    p_v,
    p_page,
    p_start,
    p_length,
    p_union,
    p_count,
    p_out,
    p_lse,
    scale,
    num_requests,
    num_tokens,
    few,
    capacity,
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
    USED_HEADS: tl.constexpr,
    USED_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    DENSE: tl.constexpr,
):
    """A tile of neighbouring tokens, all heads of a group, over the tile's union of blocks, or over all blocks."""
    # A prompt's last tiles see the most keys: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    g = tl.program_id(1)
    r, start, stop, first = find_tile(tile, p_start, num_requests, num_tokens, TOKENS)
    nobody = r == num_requests
    if (first >= stop) | ((stop - start <= few) & (nobody == 0)):
        return
    before = tl.load(p_length + r, mask=r < num_requests, other=0).to(tl.int32) - stop
    end = before + tl.minimum(first + TOKENS, stop)
    if DENSE:
        count = (end + BLOCK - 1) // BLOCK
        whole = (before + first) // BLOCK
    else:
        place = tile.to(tl.int64) * tl.num_programs(1) + g
        p_union += place * (3 * capacity)
        count = tl.load(p_count + 2 * place)
        whole = tl.load(p_count + 2 * place + 1)
    count = tl.where(nobody, 0, count)
    whole = tl.where(nobody, 0, whole)
    if count < 0:
        return
    row = tl.arange(0, TOKENS * HEADS)
    c = tl.arange(0, WIDTH)
    i = row // HEADS
    token = (first + i).to(tl.int64)
    n = g * USED_HEADS + row % HEADS
    there = (first + i < stop) & (row % HEADS < USED_HEADS)
    used = there[:, None] & (c < USED_WIDTH)[None, :]
    p_rows = p_q + token[:, None] * stride_q_t + n.to(tl.int64)[:, None] * stride_q_n
    b_q = tl.load(p_rows + c[None, :] * stride_q_h, mask=used, other=0.0).to(DTYPE)
    top = tl.full([TOKENS * HEADS], -float("inf"), tl.float32)
    total = tl.zeros([TOKENS * HEADS], tl.float32)
    acc = tl.zeros([TOKENS * HEADS, WIDTH], tl.float32)
    p_k += g.to(tl.int64) * stride_k_g
    p_v += g.to(tl.int64) * stride_v_g
    p_page += r.to(tl.int64) * stride_page_r
    PARTS: tl.constexpr = BLOCK // KEYS
    for causal in tl.static_range(2):
        begin = whole * PARTS if causal else 0
        stop_at = count * PARTS if causal else whole * PARTS
        page = _page(p_page, p_union, begin // PARTS, begin < stop_at, stride_page_p, DENSE)
        for j in range(begin, stop_at):
            # Known one step ahead, so that keys and values can be under way several steps ahead.
            next_page = _page(p_page, p_union, (j + 1) // PARTS, j + 1 < stop_at, stride_page_p, DENSE)
            inside = j % PARTS * KEYS
            block = j // PARTS
            sees = i >= 0
            if not DENSE:
                sees = (tl.load(p_union + capacity + j // PARTS) >> i) & 1 != 0
                if causal:
                    block = tl.load(p_union + 2 * capacity + j // PARTS)
            top, total, acc = advance(
                top,
                total,
                acc,
                b_q,
                p_k + page * stride_k_m + inside * stride_k_b,
                p_v + page * stride_v_m + inside * stride_v_b,
                sees,
                before + first + i - block * BLOCK - inside,
                end - block * BLOCK - inside,
                scale,
                stride_k_b,
                stride_k_h,
                stride_v_b,
                stride_v_h,
                USED_WIDTH,
                KEYS,
                WIDTH,
                DTYPE,
                WHOLE=not causal,
            )
            page = next_page
    total = tl.where(total == 0.0, 1.0, total)
    at = token * (USED_HEADS * tl.num_programs(1)) + n
    tl.store(p_out + at[:, None] * USED_WIDTH + c[None, :], acc / total[:, None], mask=used)
    if p_lse is not None:
        LN_2: tl.constexpr = 0.6931471805599453
        tl.store(p_lse + at, (top + tl.log2(total)) * LN_2, mask=there)
