"""Block selection in Triton: block maxima over tiles of queries and ranges of keys, then the best K of each query.

The maxima go through a workspace of a bounded size, a chunk of tokens at a time. Every number is computed by one
program in one order, and the order among blocks is total, so equal inputs give equal selections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from openm3.ops.triton import Machine, machine, padded, refusal
from openm3.ops.triton.batch import request_of_tile, requests_of_tokens

if TYPE_CHECKING:
    from openm3.ops.index import IndexCodes

WORKSPACE = 1 << 26
"""Block scores (float32) held at a time, 256 MiB: a million tokens before 2048 tokens of four groups."""

WIDEST = 256
"""The widest index keys whose tiles fit."""

HIDDEN = tl.constexpr(-(1 << 63))
"""The rank of a block that the token does not see, below that of any other."""


@dataclass(frozen=True)
class ScoreTiles:
    """A program scores `rows` pairs of token and group, of up to `tokens` tokens, against `split` blocks."""

    tokens: int
    rows: int
    split: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class SelectTiles:
    """A program selects for `rows` pairs of token and group, looking at `blocks` scores of each at once."""

    rows: int
    blocks: int
    num_warps: int


def score_tiles(
    num_tokens: int, num_requests: int, num_groups: int, num_blocks: int, page_bytes: int, wide: bool, machine: Machine
) -> ScoreTiles:
    """Tiles for queries of whole requests; `wide` says that numbers take four bytes. Not measured yet.

    Warpgroups multiply 64 rows, and 128 halve the passes over the keys. Float32 has no tensor cores here: its products
    are unrolled, which takes the compiler minutes from 64 rows on. Pages wait in up to `num_stages` buffers.
    """
    most = 32 if wide else 128
    rows = max(padded(num_groups), min(most, padded(-(-num_tokens // num_requests) * num_groups, least=16)))
    tokens = rows // num_groups
    # Eight programs a multiprocessor even out ragged batches; at least four pages each pay for loading the queries.
    split = num_blocks * -(-num_tokens // tokens) // (8 * machine.processors)
    stages = machine.shared_bytes // page_bytes - 1
    return ScoreTiles(tokens, rows, min(max(split, 4), 64), 8 if wide or rows >= 128 else 4, min(max(stages, 1), 4))


def select_tiles(num_rows: int, num_blocks: int, machine: Machine) -> SelectTiles:
    """Scores stay in registers up to a million tokens of context, 32 a thread. Not measured yet."""
    blocks = min(padded(num_blocks), 8192)
    rows = min(8192 // blocks, padded(-(-num_rows // machine.processors)))
    return SelectTiles(rows, blocks, min(max(rows * blocks // 1024, 1), 8))


def supports_select_blocks(
    index_q_TGJ: Tensor,
    index_k_MBJ: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    num_selected: int,
    num_local: int,
    codes: IndexCodes | None = None,
) -> str | None:
    if reason := refusal(index_q_TGJ, index_k_MBJ):
        return reason
    if index_q_TGJ.dtype != index_k_MBJ.dtype:
        return f"takes queries and keys of one dtype, not {index_q_TGJ.dtype} and {index_k_MBJ.dtype}"
    if index_k_MBJ.shape[2] > WIDEST:
        return f"takes index keys of up to {WIDEST} numbers, not {index_k_MBJ.shape[2]}"
    return None


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
    (num_tokens, num_groups, width), (_, block_size, _) = index_q_TGJ.shape, index_k_MBJ.shape
    num_requests, num_blocks = page_RP.shape
    block_TGK = index_q_TGJ.new_empty((num_tokens, num_groups, num_selected), dtype=torch.int32)
    if num_tokens == 0:
        return block_TGK
    start_R1, length_R = start_R1.contiguous(), length_R.contiguous()
    where = machine(index_q_TGJ.device)
    page = padded(block_size, least=16), padded(width, least=16)
    itemsize = index_k_MBJ.element_size()
    chunk = min(num_tokens, max(1, WORKSPACE // (num_groups * num_blocks)))
    tiles = score_tiles(chunk, num_requests, num_groups, num_blocks, page[0] * page[1] * itemsize, itemsize == 4, where)
    taking = select_tiles(chunk * num_groups, num_blocks, where)
    score_PX = torch.empty((num_blocks, chunk * num_groups), dtype=torch.float32, device=index_q_TGJ.device)
    for first in range(0, num_tokens, chunk):
        last = min(first + chunk, num_tokens)
        grid = ((last - first) // tiles.tokens + num_requests, triton.cdiv(num_blocks, tiles.split))
        _score_blocks[grid](
            index_q_TGJ,
            index_k_MBJ,
            page_RP,
            start_R1,
            length_R,
            score_PX,
            *(first, last, num_requests, tiles.split, score_PX.stride(0)),
            *(*index_q_TGJ.stride(), *index_k_MBJ.stride(), *page_RP.stride()),
            G=num_groups,
            B=block_size,
            J=width,
            TOKENS=tiles.tokens,
            ROWS=tiles.rows,
            SLOTS=page[0],
            WIDTH=page[1],
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
        num_rows = (last - first) * num_groups
        _select_best[(triton.cdiv(num_rows, taking.rows),)](
            score_PX,
            start_R1,
            length_R,
            block_TGK,
            *(first, num_rows, num_requests, num_requests.bit_length(), score_PX.stride(0)),
            G=num_groups,
            B=block_size,
            K=num_selected,
            LOCAL=num_local,
            ROWS=taking.rows,
            BLOCKS=taking.blocks,
            SLOTS=padded(num_selected),
            AT_ONCE=num_blocks <= taking.blocks,
            num_warps=taking.num_warps,
        )
    return block_TGK


@triton.jit(do_not_specialize=["first", "last", "num_requests", "split"])
def _score_blocks(
    p_q,
    p_k,
    p_page,
    p_start,
    p_length,
    p_score,
    first,
    last,
    num_requests,
    split,
    stride_score,
    stride_qt,
    stride_qg,
    stride_qj,
    stride_km,
    stride_kb,
    stride_kj,
    stride_pr,
    stride_pp,
    G: tl.constexpr,
    B: tl.constexpr,
    J: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # Tiles of queries run side by side over the same keys, which then come from the cache but for the first.
    i_tile, i_split = tl.program_id(0), tl.program_id(1)
    i_request = request_of_tile(p_start, num_requests, first, last, i_tile, TOKENS)
    stop = tl.load(p_start + i_request + 1)
    begin = tl.minimum(tl.maximum(tl.load(p_start + i_request), first), last)
    end = tl.minimum(tl.maximum(stop, first), last)
    token = begin + (i_tile - (begin - first) // TOKENS - i_request) * TOKENS
    if token >= end:
        return
    before = tl.load(p_length + i_request) - stop
    oldest, newest = before + token, before + tl.minimum(token + TOKENS, end) - 1
    block = i_split * split
    block_end = tl.minimum(block + split, newest // B + 1)
    if block >= block_end:
        return

    b_row, b_slot, b_width = tl.arange(0, ROWS), tl.arange(0, SLOTS), tl.arange(0, WIDTH)
    b_token = token + b_row // G
    b_taken = (b_row < TOKENS * G) & (b_token < end)
    b_position = before + b_token
    b_p_q = p_q + b_token.to(tl.int64)[:, None] * stride_qt + (b_row % G)[:, None] * stride_qg
    b_q = tl.load(b_p_q + b_width[None, :] * stride_qj, mask=b_taken[:, None] & (b_width < J)[None, :], other=0.0)
    b_p_k = p_k + b_slot[:, None].to(tl.int64) * stride_kb + b_width[None, :] * stride_kj
    b_p_score = p_score + (token - first) * G + b_row
    p_page += i_request.to(tl.int64) * stride_pr

    # Up to here all tokens of the tile see all of every block.
    block_whole = tl.minimum(tl.maximum((oldest + 1) // B, block), block_end)
    for i_block in range(block, block_whole):
        b_score = _scores(b_q, b_p_k, p_page, i_block, stride_km, stride_pp, b_slot, b_width, B, J, SLOTS, WIDTH)
        if SLOTS != B:
            b_score = tl.where((b_slot < B)[None, :], b_score, float("-inf"))
        _store_best(b_p_score, b_score, i_block, stride_score, b_taken)
    for i_block in range(block_whole, block_end):
        b_score = _scores(b_q, b_p_k, p_page, i_block, stride_km, stride_pp, b_slot, b_width, B, J, SLOTS, WIDTH)
        b_visible = (b_slot < B)[None, :] & (i_block * B + b_slot[None, :] <= b_position[:, None])
        _store_best(b_p_score, tl.where(b_visible, b_score, float("-inf")), i_block, stride_score, b_taken)


@triton.jit
def _scores(
    b_q,
    b_p_k,
    p_page,
    i_block,
    stride_km,
    stride_pp,
    b_slot,
    b_width,
    B: tl.constexpr,
    J: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    page = tl.load(p_page + tl.cast(i_block, tl.int64) * stride_pp).to(tl.int64)
    if SLOTS == B and WIDTH == J:
        b_k = tl.load(b_p_k + page * stride_km)
    else:
        b_inside = (b_slot < B)[:, None] & (b_width < J)[None, :]
        b_k = tl.load(b_p_k + page * stride_km, mask=b_inside, other=0.0)
    return tl.dot(b_q, tl.trans(b_k), input_precision="ieee")


@triton.jit
def _store_best(b_p_score, b_score, i_block, stride_score, b_taken):
    # A maximum passes over NaN, as the score of a block does; where it met nothing else it is NaN.
    b_best = tl.max(b_score, 1)
    b_best = tl.where(b_best == b_best, b_best, float("-inf"))
    tl.store(b_p_score + tl.cast(i_block, tl.int64) * stride_score, b_best, mask=b_taken)


@triton.jit(do_not_specialize=["first", "num_rows", "num_requests", "num_steps"])
def _select_best(
    p_score,
    p_start,
    p_length,
    p_block,
    first,
    num_rows,
    num_requests,
    num_steps,
    stride_score,
    G: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    LOCAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    SLOTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    b_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b_taken = b_row < num_rows
    b_token = first + tl.minimum(b_row, num_rows - 1) // G
    b_request = requests_of_tokens(p_start, num_requests, num_steps, b_token)
    b_position = tl.load(p_length + b_request) - tl.load(p_start + b_request + 1) + b_token
    b_own = tl.where(b_taken, b_position // B, -1)
    b_p_score = p_score + b_row
    num_ranges = tl.max(b_own) // BLOCKS + 1

    # The K-th best is the lower bound of what is taken: ranks are distinct, so K times the best below the last one.
    b_bound = tl.full((ROWS,), (1 << 63) - 1, tl.int64)
    if AT_ONCE:
        b_rank = _ranks(b_p_score, b_own, 0, stride_score, BLOCKS, LOCAL)
        for _ in range(K):
            b_bound = tl.max(tl.where(b_rank < b_bound[None, :], b_rank, HIDDEN), 0)
    else:
        for _ in range(K):
            b_best = tl.full((ROWS,), HIDDEN, tl.int64)
            for i_range in range(num_ranges):
                b_rank = _ranks(b_p_score, b_own, i_range, stride_score, BLOCKS, LOCAL)
                b_best = tl.maximum(b_best, tl.max(tl.where(b_rank < b_bound[None, :], b_rank, HIDDEN), 0))
            b_bound = b_best

    b_p_block = p_block + (first.to(tl.int64) * G + b_row) * K
    b_count = tl.zeros((ROWS,), tl.int32)
    for i_range in range(num_ranges):
        b_rank = _ranks(b_p_score, b_own, i_range, stride_score, BLOCKS, LOCAL)
        b_chosen = (b_rank >= b_bound[None, :]) & (b_rank > HIDDEN)
        b_one = b_chosen.to(tl.int32)
        b_slot = b_count[None, :] + tl.cumsum(b_one, 0) - 1
        b_block = i_range * BLOCKS + tl.arange(0, BLOCKS)[:, None] + tl.zeros_like(b_slot)
        tl.store(b_p_block[None, :] + b_slot, b_block, mask=b_chosen)
        b_count += tl.sum(b_one, 0)
    b_slot = tl.arange(0, SLOTS)[:, None]
    b_empty = (b_slot >= b_count[None, :]) & (b_slot < K) & b_taken[None, :]
    tl.store(b_p_block[None, :] + b_slot, tl.full((SLOTS, ROWS), -1, tl.int32), mask=b_empty)


@triton.jit
def _ranks(b_p_score, b_own, i_range, stride_score, BLOCKS: tl.constexpr, LOCAL: tl.constexpr):
    """The total order as numbers: forced blocks first, then the score, then the smaller block."""
    b_block = i_range * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    b_visible = b_block <= b_own[None, :]
    b_score = tl.load(b_p_score[None, :] + b_block.to(tl.int64) * stride_score, mask=b_visible, other=0.0)
    # Zeros of either sign are equal.
    b_bits = tl.where(b_score == 0.0, 0.0, b_score).to(tl.int32, bitcast=True)
    b_order = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    b_order = tl.where(b_block > b_own[None, :] - LOCAL, 0x7FFFFFFF, b_order)
    b_rank = (b_order.to(tl.int64) << 32) | (0x7FFFFFFF - b_block).to(tl.int64)
    return tl.where(b_visible, b_rank, HIDDEN)
