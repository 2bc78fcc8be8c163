"""Attention of long requests where selections scatter, in Triton: those who chose a block meet it together.

A tile whose tokens choose blocks far apart would read each for one or two of its rows. Its choices (a token and one of
its slots) are sorted by page instead, by counting, and cut into items of one page and as many choices as a tile has
tokens. An item is one tile-sized softmax over one block; its rows' results wait, with their log-sum-exp, until a last
kernel weighs those of each token in the order of its slots. Rows know nothing of each other, so neither the order of
the choices of a page, which is left to chance, nor who else chose it changes a bit.

A page chosen n times has n / 8 items, rounded up: beyond 8 choices a page at least half of the rows are used. Programs
take items until there are none, so where no tile is marked all that is launched here ends at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from openm3.ops.attention.triton_call import WORKSPACE, Call, Marks, Tile, shape, strides
from openm3.ops.attention.triton_softmax import advance, fold
from openm3.ops.attention.triton_tiles import choices, find_tile, num_tiles
from openm3.ops.triton import padded


@dataclass(frozen=True)
class Scattering:
    """Which tiles do not walk (`most` and `shared` as in `Marks`), and how they are done instead.

    `tiles` tiles of a group at a time, and `programs` that take items until there are none.
    """

    most: int
    shared: int
    tiles: int
    programs: int


def unmarked(call: Call, tile: Tile, scattering: Scattering) -> Marks:
    """Room for the marks of a call, nothing marked yet."""
    pages, groups = call.k_MGBH.shape[:2]
    tiles = min(scattering.tiles, num_tiles(call, tile))
    chunks = -(-num_tiles(call, tile) // tiles)
    zeros = torch.zeros(chunks * groups * (pages + 2), dtype=torch.int32, device=call.q_TNH.device)
    chosen, listed, items = zeros.split([chunks * groups * n for n in (pages, 1, 1)])
    return Marks(
        scattering.most,
        scattering.shared,
        tiles,
        chosen.view(chunks, groups, pages),
        listed.view(chunks, groups),
        torch.empty((chunks, groups, tiles), dtype=torch.int32, device=call.q_TNH.device),
        items.view(chunks, groups),
    )


def launch(call: Call, tile: Tile, scattering: Scattering, marks: Marks, rank: Tensor) -> None:
    """The tokens of marked tiles; `rank` is what the tiles have left behind."""
    assert call.block_TGK is not None
    (chunks, groups, pages), num_selected = marks.chosen_XGM.shape, call.block_TGK.shape[2]
    heads, width, device = call.heads, call.q_TNH.shape[2], call.q_TNH.device
    num_choices = marks.tiles * tile.tokens * num_selected
    # Every page has at most one item that is not full.
    capacity = num_choices // tile.tokens + min(pages, num_choices)
    first_item = torch.empty_like(marks.chosen_XGM)
    _place[(triton.cdiv(pages, 1024), chunks * groups)](
        marks.chosen_XGM, marks.listed_XG, marks.items_XG, first_item, pages, TOKENS=tile.tokens, SIZE=1024
    )
    item = torch.empty((chunks, groups, 2, capacity), dtype=torch.int32, device=device)
    choice = torch.empty((chunks, groups, 3, capacity * tile.tokens), dtype=torch.int32, device=device)
    chosen = {
        **call.where(),
        **strides("block", "tgk", call.block_TGK),
        "p_block": call.block_TGK,
        "p_listed": marks.listed_XG,
        "p_tile": marks.tile_XGU,
        "tiles": marks.tiles,
        "K": num_selected,
        "TOKENS": tile.tokens,
        "BLOCK": call.k_MGBH.shape[2],
    }
    _sort[(min(marks.tiles, 4 * scattering.programs), chunks * groups)](
        **chosen,
        p_chosen=marks.chosen_XGM,
        p_rank=rank,
        p_first_item=first_item,
        p_item=item,
        p_choice=choice,
        num_pages=pages,
        capacity=capacity,
        groups=groups,
        SLOTS=padded(num_selected),
        num_warps=1 if tile.tokens * num_selected <= 512 else 4,
    )
    together = min(groups, max(1, WORKSPACE // (num_choices * heads * (width * call.out_TNH.itemsize + 4))))
    part = torch.empty((together, num_choices, heads, width), dtype=call.out_TNH.dtype, device=device)
    part_lse = torch.empty((together, num_choices, heads), dtype=torch.float32, device=device)
    for chunk in range(chunks):
        for first_group in range(0, groups, together):
            now = min(together, groups - first_group)
            some = {"chunk": chunk, "groups": groups, "first_group": first_group, "num_choices": num_choices}
            some |= {"p_part": part, "p_part_lse": part_lse}
            _attend_items[(triton.cdiv(scattering.programs, now), now)](
                **call.pools(),
                **some,
                **shape(tile),
                p_items=marks.items_XG,
                p_item=item,
                p_choice=choice,
                capacity=capacity,
                TOKENS=tile.tokens,
            )
            _merge[(triton.cdiv(scattering.programs, now), now)](
                **chosen,
                **some,
                p_out=call.out_TNH,
                p_lse=call.lse_TN,
                USED_HEADS=heads,
                USED_WIDTH=width,
                HEADS=tile.heads,
                WIDTH=tile.width,
                num_warps=tile.warps,
            )


@triton.jit(do_not_specialize=["num_pages"])
def _place(p_chosen, p_listed, p_items, p_first_item, num_pages, TOKENS: tl.constexpr, SIZE: tl.constexpr):
    """Each page's first item. Pages stand in the order in which their programs ask for room: any order will do."""
    line = tl.program_id(1)
    if tl.load(p_listed + line) == 0:
        return
    page = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    at = line.to(tl.int64) * num_pages + page
    items = (tl.load(p_chosen + at, mask=page < num_pages, other=0) + TOKENS - 1) // TOKENS
    first = tl.atomic_add(p_items + line, tl.sum(items), sem="relaxed")
    tl.store(p_first_item + at, first + tl.cumsum(items) - items, mask=page < num_pages)


@triton.jit(do_not_specialize=["num_requests", "num_tokens", "tiles", "num_pages", "capacity", "groups"])
def _sort(
    p_page,
    p_start,
    p_length,
    p_block,
    p_listed,
    p_tile,
    p_chosen,
    p_rank,
    p_first_item,
    p_item,
    p_choice,
    num_requests,
    num_tokens,
    tiles,
    num_pages,
    capacity,
    groups,
    stride_page_r,
    stride_page_p,
    stride_block_t,
    stride_block_g,
    stride_block_k,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Puts the choices of marked tiles into their items: which it is, its token, and its last key within the block."""
    line = tl.program_id(1)
    g = line % groups
    i = tl.arange(0, TOKENS)
    slot = tl.arange(0, SLOTS)
    p_item += line.to(tl.int64) * 2 * capacity
    p_choice += line.to(tl.int64) * 3 * capacity * TOKENS
    for entry in range(tl.program_id(0), tl.load(p_listed + line), tl.num_programs(0)):
        tile = tl.load(p_tile + line.to(tl.int64) * tiles + entry)
        r, _, stop, first = find_tile(tile, p_start, num_requests, num_tokens, TOKENS)
        position = tl.load(p_length + r).to(tl.int32) - stop + first + i
        block = choices(
            p_block, first, g, position // BLOCK, stop, stride_block_t, stride_block_g, stride_block_k, K, SLOTS, TOKENS
        )
        valid = block >= 0
        page = tl.load(p_page + r.to(tl.int64) * stride_page_r + block * stride_page_p, mask=valid, other=0)
        at_page = line.to(tl.int64) * num_pages + page
        inside = i[:, None] * K + slot[None, :]
        place = (tile.to(tl.int64) * groups + g) * (3 * TOKENS * K)
        rank = tl.load(p_rank + place + inside, mask=valid, other=0)
        item = tl.load(p_first_item + at_page, mask=valid, other=0) + rank // TOKENS
        at = item * TOKENS + rank % TOKENS
        tl.store(p_choice + at, tile % tiles * (TOKENS * K) + inside, mask=valid)
        token = tl.broadcast_to((first + i)[:, None], valid.shape)
        tl.store(p_choice + capacity * TOKENS + at, token, mask=valid)
        limit = tl.minimum(position[:, None] - block * BLOCK, BLOCK - 1)
        tl.store(p_choice + 2 * capacity * TOKENS + at, limit, mask=valid)
        leads = valid & (rank % TOKENS == 0)
        tl.store(p_item + item, page.to(tl.int32), mask=leads)
        left = tl.load(p_chosen + at_page, mask=leads, other=0) - rank
        tl.store(p_item + capacity + item, tl.minimum(left, TOKENS), mask=leads)


@triton.jit(do_not_specialize=["capacity", "chunk", "groups", "first_group", "num_choices"])
def _attend_items(
    p_q,
    p_k,
    p_v,
    p_items,
    p_item,
    p_choice,
    p_part,
    p_part_lse,
    scale,
    capacity,
    chunk,
    groups,
    first_group,
    num_choices,
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
    USED_HEADS: tl.constexpr,
    USED_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Items of one page: the softmax of each of their rows over that page alone."""
    g = first_group + tl.program_id(1)
    line = (chunk * groups + g).to(tl.int64)
    num_items = tl.load(p_items + line)
    p_item += line * 2 * capacity
    p_choice += line * (3 * TOKENS) * capacity
    p_k += g.to(tl.int64) * stride_k_g
    p_v += g.to(tl.int64) * stride_v_g
    row = tl.arange(0, TOKENS * HEADS)
    c = tl.arange(0, WIDTH)
    i = row // HEADS
    head = row % HEADS
    n = (g * USED_HEADS + head).to(tl.int64)
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        page = tl.load(p_item + item).to(tl.int64)
        filled = i < tl.load(p_item + capacity + item)
        p_mine = p_choice + item * TOKENS + i
        choice = tl.load(p_mine, mask=filled, other=0)
        token = tl.load(p_mine + capacity * TOKENS, mask=filled, other=0).to(tl.int64)
        limit = tl.load(p_mine + 2 * capacity * TOKENS, mask=filled, other=-1)
        used = (filled & (head < USED_HEADS))[:, None] & (c < USED_WIDTH)[None, :]
        p_rows = p_q + token[:, None] * stride_q_t + n[:, None] * stride_q_n
        b_q = tl.load(p_rows + c[None, :] * stride_q_h, mask=used, other=0.0).to(DTYPE)
        top = tl.full([TOKENS * HEADS], -float("inf"), tl.float32)
        total = tl.zeros([TOKENS * HEADS], tl.float32)
        acc = tl.zeros([TOKENS * HEADS, WIDTH], tl.float32)
        end = tl.max(limit) + 1
        for inside in range(0, BLOCK, KEYS):
            top, total, acc = advance(
                top,
                total,
                acc,
                b_q,
                p_k + page * stride_k_m + inside * stride_k_b,
                p_v + page * stride_v_m + inside * stride_v_b,
                filled,
                limit - inside,
                end - inside,
                scale,
                stride_k_b,
                stride_k_h,
                stride_v_b,
                stride_v_h,
                USED_WIDTH,
                KEYS,
                WIDTH,
                DTYPE,
                WHOLE=False,
            )
        total = tl.where(total == 0.0, 1.0, total)
        at = (tl.program_id(1).to(tl.int64) * num_choices + choice) * USED_HEADS + head
        tl.store(p_part + at[:, None] * USED_WIDTH + c[None, :], acc / total[:, None], mask=used)
        tl.store(p_part_lse + at, top + tl.log2(total), mask=filled & (head < USED_HEADS))


@triton.jit(do_not_specialize=["num_requests", "num_tokens", "tiles", "chunk", "groups", "first_group", "num_choices"])
def _merge(
    p_page,
    p_start,
    p_length,
    p_block,
    p_listed,
    p_tile,
    p_part,
    p_part_lse,
    p_out,
    p_lse,
    num_requests,
    num_tokens,
    tiles,
    chunk,
    groups,
    first_group,
    num_choices,
    stride_page_r,
    stride_page_p,
    stride_block_t,
    stride_block_g,
    stride_block_k,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    USED_HEADS: tl.constexpr,
    USED_WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Marked tiles: what its blocks gave each row, weighed by their shares of the sum, in the order of the slots."""
    g = first_group + tl.program_id(1)
    line = (chunk * groups + g).to(tl.int64)
    row = tl.arange(0, TOKENS * HEADS)
    c = tl.arange(0, WIDTH)
    i = row // HEADS
    head = row % HEADS
    for entry in range(tl.program_id(0), tl.load(p_listed + line), tl.num_programs(0)):
        tile = tl.load(p_tile + line * tiles + entry)
        r, _, stop, first = find_tile(tile, p_start, num_requests, num_tokens, TOKENS)
        token = (first + i).to(tl.int64)
        own = (tl.load(p_length + r).to(tl.int32) - stop + first + i) // BLOCK
        there = (first + i < stop) & (head < USED_HEADS)
        p_ids = p_block + g.to(tl.int64) * stride_block_g + token * stride_block_t
        base = tl.program_id(1).to(tl.int64) * num_choices + (tile % tiles * TOKENS + i) * K
        top = tl.full([TOKENS * HEADS], -float("inf"), tl.float32)
        total = tl.zeros([TOKENS * HEADS], tl.float32)
        acc = tl.zeros([TOKENS * HEADS, WIDTH], tl.float32)
        for k in tl.range(0, K, num_stages=3):
            block = tl.load(p_ids + k * stride_block_k, mask=there, other=-1)
            valid = (block >= 0) & (block <= own)
            at_part = (base + k) * USED_HEADS + head
            used = valid[:, None] & (c < USED_WIDTH)[None, :]
            b_part = tl.load(p_part + at_part[:, None] * USED_WIDTH + c[None, :], mask=used, other=0.0)
            some = tl.load(p_part_lse + at_part, mask=valid, other=-float("inf"))
            top, total, acc = fold(top, total, acc, some, tl.where(valid, 1.0, 0.0), b_part.to(tl.float32))
        total = tl.where(total == 0.0, 1.0, total)
        at = (token * groups + g) * USED_HEADS + head
        used = there[:, None] & (c < USED_WIDTH)[None, :]
        tl.store(p_out + at[:, None] * USED_WIDTH + c[None, :], acc / total[:, None], mask=used)
        if p_lse is not None:
            LN_2: tl.constexpr = 0.6931471805599453
            tl.store(p_lse + at, (top + tl.log2(total)) * LN_2, mask=there)
