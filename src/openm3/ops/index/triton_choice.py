"""From scores, or brackets of scores, to the best K blocks of each row, in Triton.

Few blocks of a row can be among its best. `gather_candidates` finds them: the blocks are dealt to groups, and as many
group maxima as there are places, taken from the top, bound the last selected score from below. Blocks that reach the
bound are candidates. That holds for any numbers, and leaves little more than K where they are not all alike.
`take_best` puts the candidates in the total order.
"""

import triton
import triton.language as tl

from openm3.ops.triton.batch import requests_of_tokens

LEAST = tl.constexpr(-(1 << 31))
MOST = tl.constexpr((1 << 31) - 1)
"""The smallest and the largest order; no number has either."""

HIDDEN = tl.constexpr(-(1 << 63))
"""The rank of what is not there, below that of anything."""


@triton.jit(do_not_specialize=["first", "num_rows", "num_requests", "num_steps"])
def gather_candidates(
    p_low,
    p_high,
    p_start,
    p_length,
    p_candidate,
    p_count,
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
    DEPTH: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """The candidates of ROWS rows, ascending, their local blocks among them, and how many they are.

    Scores lie between `low` and `high`, which are the same where they are known.
    """
    b_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b_own = _own_blocks(p_start, p_length, b_row, first, num_rows, num_requests, num_steps, G, B)
    b_rivals = b_own + 1 - LOCAL
    b_places = K - tl.minimum(b_own + 1, LOCAL)
    b_at = (b_row.to(tl.int64) * stride_score)[:, None, None]
    b_there = (b_row < num_rows)[:, None, None]
    b_group = tl.arange(0, GROUPS)[None, :]
    b_tile = tl.arange(0, DEPTH)[None, :, None] * GROUPS + b_group[:, None, :]

    b_best = tl.full((ROWS, GROUPS), LEAST, tl.int32)
    for i_first in range(0, tl.max(b_rivals), DEPTH * GROUPS):
        b_block = i_first + b_tile
        b_rival = b_block < b_rivals[:, None, None]
        # The end of the row cuts no load in two, as the end of what counts would.
        b_order = _order(tl.load(p_low + b_at + b_block, mask=b_there & (b_block < stride_score), other=0.0))
        b_best = tl.maximum(b_best, tl.max(tl.where(b_rival, b_order, LEAST), 1))
    # Ranks tell equal maxima apart, so each step goes down by one.
    b_rank = (b_best.to(tl.int64) << 32) | b_group.to(tl.int64)
    b_bound = tl.full((ROWS,), (1 << 63) - 1, tl.int64)
    for i in range(K):
        b_next = tl.max(tl.where(b_rank < b_bound[:, None], b_rank, HIDDEN), 1)
        b_bound = tl.where(i < b_places, b_next, b_bound)
    b_least = (b_bound >> 32).to(tl.int32)[:, None, None]

    b_count = tl.zeros((ROWS,), tl.int32)
    for i_first in range(0, tl.max(b_own) + 1, DEPTH * GROUPS):
        b_block = i_first + b_tile
        b_order = _order(tl.load(p_high + b_at + b_block, mask=b_there & (b_block < stride_score), other=0.0))
        b_in = (b_block <= b_own[:, None, None]) & ((b_order >= b_least) | (b_block >= b_rivals[:, None, None]))
        b_one = b_in.to(tl.int32)
        b_each = tl.sum(b_one, 2)
        b_before = b_count[:, None] + tl.cumsum(b_each, 1) - b_each
        b_place = b_before[:, :, None] + tl.cumsum(b_one, 2) - 1
        tl.store(p_candidate + b_at + b_place, b_block + tl.zeros_like(b_place), mask=b_in)
        b_count += tl.sum(b_each, 1)
    tl.store(p_count + b_row, b_count, mask=b_row < num_rows)


@triton.jit(do_not_specialize=["first", "num_rows", "num_requests", "num_steps"])
def take_best(
    p_score,
    p_candidate,
    p_count,
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
    SLOTS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The K best of the candidates of ROWS rows, ascending, -1 at the tail."""
    b_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b_local = _own_blocks(p_start, p_length, b_row, first, num_rows, num_requests, num_steps, G, B) + 1 - LOCAL
    b_count = tl.load(p_count + b_row, mask=b_row < num_rows, other=0)
    most = tl.max(b_count)
    b_p_score = p_score + b_row.to(tl.int64) * stride_score
    b_p_candidate = p_candidate + b_row.to(tl.int64) * stride_score

    # The K-th best bounds what is taken: ranks are distinct, so K times the best below the last one.
    b_first = _ranks(b_p_score, b_p_candidate, b_count, b_local, 0, AT_ONCE)
    b_bound = tl.full((ROWS,), (1 << 63) - 1, tl.int64)
    for _ in range(K):
        b_best = tl.max(tl.where(b_first < b_bound[:, None], b_first, HIDDEN), 1)
        for i_first in range(AT_ONCE, most, AT_ONCE):
            b_rank = _ranks(b_p_score, b_p_candidate, b_count, b_local, i_first, AT_ONCE)
            b_best = tl.maximum(b_best, tl.max(tl.where(b_rank < b_bound[:, None], b_rank, HIDDEN), 1))
        b_bound = b_best

    b_p_block = (p_block + (first.to(tl.int64) * G + b_row) * K)[:, None]
    b_taken = tl.zeros((ROWS,), tl.int32)
    for i_first in range(0, most, AT_ONCE):
        b_rank = _ranks(b_p_score, b_p_candidate, b_count, b_local, i_first, AT_ONCE)
        b_chosen = (b_rank >= b_bound[:, None]) & (b_rank > HIDDEN)
        b_one = b_chosen.to(tl.int32)
        b_at = i_first + tl.arange(0, AT_ONCE)[None, :]
        b_block = tl.load(b_p_candidate[:, None] + b_at, mask=b_chosen, other=0)
        tl.store(b_p_block + b_taken[:, None] + tl.cumsum(b_one, 1) - 1, b_block, mask=b_chosen)
        b_taken += tl.sum(b_one, 1)
    b_slot = tl.arange(0, SLOTS)[None, :]
    b_empty = (b_slot >= b_taken[:, None]) & (b_slot < K) & (b_row < num_rows)[:, None]
    tl.store(b_p_block + b_slot, tl.full((ROWS, SLOTS), -1, tl.int32), mask=b_empty)


@triton.jit
def _ranks(b_p_score, b_p_candidate, b_count, b_local, i_first, AT_ONCE: tl.constexpr):
    """The total order as numbers: local blocks, then the score, then the smaller block, which comes first here too."""
    b_at = i_first + tl.arange(0, AT_ONCE)[None, :]
    b_there = b_at < b_count[:, None]
    b_block = tl.load(b_p_candidate[:, None] + b_at, mask=b_there, other=0)
    b_rival = b_there & (b_block < b_local[:, None])
    b_order = _order(tl.load(b_p_score[:, None] + b_block, mask=b_rival, other=0.0))
    return tl.where(b_there, (tl.where(b_rival, b_order, MOST).to(tl.int64) << 32) - b_at, HIDDEN)


@triton.jit
def _order(b_score):
    """Integers in the order of some numbers, none of them NaN."""
    # Zeros of either sign are equal.
    b_bits = tl.where(b_score == 0.0, 0.0, b_score).to(tl.int32, bitcast=True)
    return b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _own_blocks(p_start, p_length, b_row, first, num_rows, num_requests, num_steps, G: tl.constexpr, B: tl.constexpr):
    """The block that the token of each row stands in, -1 past the last row."""
    b_token = first + tl.minimum(b_row, num_rows - 1) // G
    b_request = requests_of_tokens(p_start, num_requests, num_steps, b_token)
    b_position = tl.load(p_length + b_request) - tl.load(p_start + b_request + 1) + b_token
    return tl.where(b_row < num_rows, b_position // B, -1)
