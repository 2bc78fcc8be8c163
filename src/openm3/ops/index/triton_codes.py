"""Index keys and queries as int8 codes for the certified scan on a GPU, with bounds of what the codes lose.

A page's keys are `k = scale * code + rest`, one scale a page. Queries are few and kept nowhere, so their codes can have
two digits, `q = unit * (DIGIT * high + low) + rest`, which leaves almost nothing to the rest. Then

    | q . k  -  unit scale (DIGIT high + low) . code |  <=  |q| max|rest of k|  +  |rest of q| max|scale code|

The lengths are rounded up. What float32 sums may lose, here and in the scores themselves, is a share of `|q| |k|`.
"""

import triton
import triton.language as tl

DIGIT = tl.constexpr(254)
"""What the high digit of a query's code counts: low digits then reach from -127 to 127."""

TINY = tl.constexpr(1e-30)
"""Rows whose largest number is smaller are all rest: it cannot be divided by."""

UP = tl.constexpr(1.0 + 2.0**-13)
FLOOR = tl.constexpr(1e-17)
"""A computed length times UP plus FLOOR is no less than the true one: squares may round, or vanish below 1e-19."""


@triton.jit
def encode_touched(
    p_k,
    p_slot,
    p_code,
    p_bound,
    num_slots,
    stride_slot,
    stride_km,
    stride_kb,
    stride_kj,
    B: tl.constexpr,
    J: tl.constexpr,
    ROW: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Codes and bounds of the page that a token's slot is in, unless the token before it has the same.

    Where several programs do meet in a page, they write the same bytes: all read what stood there before the call.
    """
    i_token = tl.program_id(0).to(tl.int64)
    slot = tl.load(p_slot + i_token * stride_slot).to(tl.int64)
    # Padding of a captured batch has no slot.
    if (slot < 0) | (slot >= num_slots):
        return
    page = slot // B
    # Division rounds towards zero, so page 0 is not that of every slot it comes from.
    before = tl.load(p_slot + (i_token - 1) * stride_slot, mask=i_token > 0, other=-1).to(tl.int64)
    if (before >= 0) & (before // B == page):
        return
    b_slot, b_width = tl.arange(0, SLOTS)[:, None], tl.arange(0, WIDTH)[None, :]
    b_p_k = p_k + page * stride_km + b_slot.to(tl.int64) * stride_kb + b_width * stride_kj
    b_k = tl.load(b_p_k, mask=(b_slot < B) & (b_width < J), other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(b_k))
    # The maximum passes over NaN.
    finite = tl.min((b_k * 0.0 == 0.0).to(tl.int32)) == 1
    usable = finite & (largest >= TINY)
    scale = tl.where(usable, largest / 127.0, 0.0)
    b_code = tl.where(usable, tl.floor(b_k * tl.where(usable, 127.0 / largest, 0.0) + 0.5), 0.0)
    b_coded = b_code * scale
    b_rest = b_k - b_coded
    rest = tl.max(tl.sqrt(tl.sum(b_rest * b_rest, 1))) * UP + FLOOR
    size = tl.max(tl.sqrt(tl.sum(b_coded * b_coded, 1))) * UP + FLOOR
    b_p_code = p_code + page * (B * ROW) + b_slot * ROW + b_width
    tl.store(b_p_code, b_code.to(tl.int8), mask=(b_slot < B) & (b_width < ROW))
    p_bound += page * 3
    tl.store(p_bound, scale)
    tl.store(p_bound + 1, tl.where(finite, rest, float("inf")))
    tl.store(p_bound + 2, tl.where(finite, size, 0.0))


@triton.jit
def query_codes(b_q):
    """The digits of some queries, (high, low), then the unit, the length of the rest and that of the query, a row each.

    Numbers that are not finite leave a length that is not.
    """
    b_q = b_q.to(tl.float32)
    b_largest = tl.max(tl.abs(b_q), 1)
    b_usable = (b_largest >= TINY) & (b_largest < float("inf"))
    b_unit = tl.where(b_usable, b_largest / (127.0 * DIGIT), 0.0)
    b_inverse = tl.where(b_usable, (127.0 * DIGIT) / b_largest, 0.0)
    b_code = tl.floor(b_q * b_inverse[:, None] + 0.5)
    b_code = tl.where(b_code == b_code, b_code, 0.0)
    b_high = tl.floor(b_code * (1.0 / DIGIT) + 0.5)
    b_low = b_code - b_high * DIGIT
    b_rest = b_q - b_code * b_unit[:, None]
    b_size = tl.sqrt(tl.sum(b_q * b_q, 1)) * UP + FLOOR
    # The product with the unit was rounded.
    b_lost = tl.sqrt(tl.sum(b_rest * b_rest, 1)) * UP + FLOOR + b_size * 2.0**-22
    return b_high.to(tl.int8), b_low.to(tl.int8), b_unit, b_lost, b_size


@triton.jit
def brackets(b_product, b_unit, b_lost, b_size, b_p_bound, b_there, J: tl.constexpr):
    """Between what the scores of pages lie for queries, from the largest products of their codes.

    Both ends are infinite where the bounds say nothing, or where float32 might not hold the score.
    """
    b_scale = tl.load(b_p_bound, mask=b_there, other=0.0)
    b_rest = tl.load(b_p_bound + 1, mask=b_there, other=0.0)
    b_coded = tl.load(b_p_bound + 2, mask=b_there, other=0.0)
    # Twice the roundings of the score's sum and of what is computed here, all of numbers no larger than |q| |k|.
    SLACK: tl.constexpr = (2 * J + 64) * 2.0**-23
    b_middle = b_product.to(tl.float32) * b_unit * b_scale
    b_width = b_size * (b_rest + SLACK * (b_rest + b_coded)) + b_lost * b_coded
    b_known = b_size * (b_rest + b_coded) < 1e37
    b_from = tl.where(b_known, b_middle - b_width, float("-inf"))
    return b_from, tl.where(b_known, b_middle + b_width, float("inf"))
