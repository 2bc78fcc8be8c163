"""Scores of blocks in Triton: of every block from its keys, brackets of them from its codes, of candidates once more.

Only blocks before a token's local ones compete for its places, and of these every key is visible: no scan has a mask.
With few query rows the keys are the rows of a product, 64 to an instruction of Hopper's warpgroups, whose columns may
be as few as the queries. Candidates are scored by the same products, so codes do not even change how scores are
rounded.
"""

import triton
import triton.language as tl

from openm3.ops.index.triton_codes import DIGIT, brackets, query_codes
from openm3.ops.triton.batch import request_of_tile, requests_of_tokens


@triton.jit(do_not_specialize=["first", "last", "num_requests", "split"])
def scan_keys(
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
    LOCAL: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """The scores of `split` blocks for up to TOKENS tokens of one request: a row of scores for each token and group."""
    i_request, token, end, block, block_end = _task(
        p_start, p_length, first, last, num_requests, split, B, LOCAL, TOKENS
    )
    if block >= block_end:
        return
    b_row = tl.arange(0, ROWS)
    b_taken = (b_row < TOKENS * G) & (token + b_row // G < end)
    b_q = _queries(p_q, token, b_row, b_taken, stride_qt, stride_qg, stride_qj, G, J, WIDTH)
    b_p_score = p_score + ((token - first) * G + b_row).to(tl.int64) * stride_score
    p_page += i_request.to(tl.int64) * stride_pr
    for i_block in range(block, block_end):
        p_at = p_k + tl.load(p_page + tl.cast(i_block, tl.int64) * stride_pp).to(tl.int64) * stride_km
        b_best = _block_scores(b_q, p_at, stride_kb, stride_kj, B, J, SLOTS, WIDTH, KEYS_FIRST)
        tl.store(b_p_score + i_block, b_best, mask=b_taken)


@triton.jit(do_not_specialize=["first", "last", "num_requests", "split"])
def scan_codes(
    p_q,
    p_code,
    p_bound,
    p_page,
    p_start,
    p_length,
    p_low,
    p_high,
    first,
    last,
    num_requests,
    split,
    stride_score,
    stride_qt,
    stride_qg,
    stride_qj,
    stride_pr,
    stride_pp,
    G: tl.constexpr,
    B: tl.constexpr,
    J: tl.constexpr,
    LOCAL: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    ROW: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """As `scan_keys`, of up to BLOCKS blocks, from codes: between what each score lies."""
    i_request, token, end, block, block_end = _task(
        p_start, p_length, first, last, num_requests, split, B, LOCAL, TOKENS
    )
    if block >= block_end:
        return
    b_row, b_slot, b_width = tl.arange(0, ROWS), tl.arange(0, SLOTS)[:, None], tl.arange(0, WIDTH)[None, :]
    b_taken = (b_row < TOKENS * G) & (token + b_row // G < end)
    b_q = _queries(p_q, token, b_row, b_taken, stride_qt, stride_qg, stride_qj, G, J, WIDTH)
    b_high, b_low, b_unit, b_lost, b_size = query_codes(b_q)
    p_page += i_request.to(tl.int64) * stride_pr
    b_p_code = p_code + b_slot * ROW + b_width
    EXACT: tl.constexpr = SLOTS == B and WIDTH == ROW
    # Products wait in registers: bounds are loaded for all blocks together, outside of the loop.
    b_step = tl.arange(0, BLOCKS)[:, None]
    b_best = tl.zeros((BLOCKS, ROWS), tl.int32)
    for i_block in range(block, block_end):
        page = tl.load(p_page + tl.cast(i_block, tl.int64) * stride_pp).to(tl.int64)
        b_p_at = b_p_code + page * (B * ROW)
        b_code = tl.load(b_p_at) if EXACT else tl.load(b_p_at, mask=(b_slot < B) & (b_width < ROW), other=0)
        b_product = tl.dot(b_code, tl.trans(b_high), out_dtype=tl.int32) * DIGIT
        b_product = tl.dot(b_code, tl.trans(b_low), b_product, out_dtype=tl.int32)
        b_largest = tl.max(b_product if SLOTS == B else tl.where(b_slot < B, b_product, -(1 << 31)), 0)
        b_best = tl.where(b_step == i_block - block, b_largest[None, :], b_best)
    b_block = block + b_step
    b_there = b_block < block_end
    b_page = tl.load(p_page + b_block.to(tl.int64) * stride_pp, mask=b_there, other=0).to(tl.int64)
    b_from, b_to = brackets(b_best, b_unit[None, :], b_lost[None, :], b_size[None, :], p_bound + b_page * 3, b_there, J)
    b_at = ((token - first) * G + b_row).to(tl.int64)[None, :] * stride_score + b_block
    tl.store(p_low + b_at, b_from, mask=b_there & b_taken[None, :])
    tl.store(p_high + b_at, b_to, mask=b_there & b_taken[None, :])


@triton.jit(do_not_specialize=["first", "num_rows", "num_requests", "num_steps"])
def score_candidates(
    p_q,
    p_k,
    p_page,
    p_start,
    p_candidate,
    p_count,
    p_score,
    first,
    num_rows,
    num_requests,
    num_steps,
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
    K: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The scores of a row's candidates, which its programs take in turns."""
    i_row = tl.program_id(0)
    count = tl.load(p_count + i_row)
    # All of them are selected, whatever their scores.
    if count <= K:
        return
    token = first + i_row // G
    i_request = requests_of_tokens(p_start, num_requests, num_steps, token)
    b_row = tl.arange(0, ROWS)
    b_taken = b_row == 0
    b_q = _queries(p_q, token, b_row + i_row % G, b_taken, stride_qt, stride_qg, stride_qj, G, J, WIDTH)
    p_candidate += i_row.to(tl.int64) * stride_score
    p_score += i_row.to(tl.int64) * stride_score
    p_page += i_request.to(tl.int64) * stride_pr
    for i in range(tl.program_id(1), count, tl.num_programs(1)):
        block = tl.load(p_candidate + i)
        p_at = p_k + tl.load(p_page + block.to(tl.int64) * stride_pp).to(tl.int64) * stride_km
        b_best = _block_scores(b_q, p_at, stride_kb, stride_kj, B, J, SLOTS, WIDTH, True)
        tl.store(p_score + block + b_row, b_best, mask=b_taken)


@triton.jit
def _task(
    p_start, p_length, first, last, num_requests, split, B: tl.constexpr, LOCAL: tl.constexpr, TOKENS: tl.constexpr
):
    """What a program scans: (request, token, end of tokens, block, end of blocks); no block past the last token."""
    # Tiles of queries run side by side over the same keys, which then come from the cache but for the first.
    i_tile, i_split = tl.program_id(0), tl.program_id(1)
    i_request = request_of_tile(p_start, num_requests, first, last, i_tile, TOKENS)
    stop = tl.load(p_start + i_request + 1)
    begin = tl.minimum(tl.maximum(tl.load(p_start + i_request), first), last)
    end = tl.minimum(tl.maximum(stop, first), last)
    token = begin + (i_tile - (begin - first) // TOKENS - i_request) * TOKENS
    newest = tl.load(p_length + i_request) - stop + tl.minimum(token + TOKENS, end) - 1
    block_end = tl.where(token < end, newest // B + 1 - LOCAL, 0)
    block = i_split * split
    return i_request, token, end, block, tl.minimum(block + split, block_end)


@triton.jit
def _queries(
    p_q,
    token,
    b_row,
    b_taken,
    stride_qt,
    stride_qg,
    stride_qj,
    G: tl.constexpr,
    J: tl.constexpr,
    WIDTH: tl.constexpr,
):
    b_width = tl.arange(0, WIDTH)[None, :]
    b_p_q = p_q + (token + b_row // G).to(tl.int64)[:, None] * stride_qt + (b_row % G)[:, None] * stride_qg
    return tl.load(b_p_q + b_width * stride_qj, mask=b_taken[:, None] & (b_width < J), other=0.0)


@triton.jit
def _block_scores(
    b_q,
    p_at,
    stride_kb,
    stride_kj,
    B: tl.constexpr,
    J: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS_FIRST: tl.constexpr,
):
    """For each query the largest product with the keys that stand at `p_at`."""
    b_slot, b_width = tl.arange(0, SLOTS)[:, None], tl.arange(0, WIDTH)[None, :]
    b_p_k = p_at + b_slot.to(tl.int64) * stride_kb + b_width * stride_kj
    EXACT: tl.constexpr = SLOTS == B and WIDTH == J
    b_k = tl.load(b_p_k) if EXACT else tl.load(b_p_k, mask=(b_slot < B) & (b_width < J), other=0.0)
    if KEYS_FIRST:
        b_score = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")
        if SLOTS != B:
            b_score = tl.where(b_slot < B, b_score, float("-inf"))
        b_best = tl.max(b_score, 0)
    else:
        b_score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if SLOTS != B:
            b_score = tl.where(tl.arange(0, SLOTS)[None, :] < B, b_score, float("-inf"))
        b_best = tl.max(b_score, 1)
    # A maximum passes over NaN, as the score of a block does; where it met nothing else it is NaN.
    return tl.where(b_best == b_best, b_best, float("-inf"))
