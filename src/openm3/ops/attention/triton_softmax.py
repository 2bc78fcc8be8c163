"""The online softmax of attention in Triton: what all its kernels do with a few keys and their values.

Scores are taken to base 2, the scale holds the factor and is not negative. A row's state is its largest score `top`,
the sum `total` of its weights 2^(score - top), and the sum `acc` of its weighted values; it begins as -inf, 0 and 0.
Sums and softmax are float32, weights are rounded to the operands' dtype between the two products.
"""

import triton
import triton.language as tl


@triton.jit
def advance(
    top,
    total,
    acc,
    b_q,
    p_k,
    p_v,
    sees,
    limit,
    end,
    scale,
    stride_k_b,
    stride_k_h,
    stride_v_b,
    stride_v_h,
    USED_WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The state after KEYS more keys, which count for the rows that have `sees`.

    Unless the keys are WHOLE, a row sees them up to number `limit` only, and nothing is read from number `end` on.
    """
    b_k = _load(p_k, end, stride_k_b, stride_k_h, USED_WIDTH, KEYS, WIDTH, WHOLE).to(DTYPE)
    score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    if not WHOLE:
        score = tl.where(tl.arange(0, KEYS)[None, :] <= limit[:, None], score, -float("inf"))
    new_top = tl.where(sees, tl.maximum(top, tl.max(score, axis=1) * scale), top)
    base = _finite(new_top)
    # Rows that do not see the keys subtract infinity, which costs nothing an element: their weights are 0.
    weight = tl.exp2(score * scale - tl.where(sees, base, float("inf"))[:, None])
    shrink = tl.exp2(top - base)
    b_v = _load(p_v, end, stride_v_b, stride_v_h, USED_WIDTH, KEYS, WIDTH, WHOLE).to(DTYPE)
    acc = tl.dot(weight.to(DTYPE), b_v, acc * shrink[:, None], input_precision="ieee")
    return new_top, total * shrink + tl.sum(weight, axis=1), acc


@triton.jit
def part(
    b_q,
    p_k,
    p_v,
    limit,
    end,
    scale,
    stride_k_b,
    stride_k_h,
    stride_v_b,
    stride_v_h,
    USED_WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The state of KEYS keys alone, of which a row sees those up to number `limit`; none is read from `end` on."""
    b_k = _load(p_k, end, stride_k_b, stride_k_h, USED_WIDTH, KEYS, WIDTH, False).to(DTYPE)
    score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    score = tl.where(tl.arange(0, KEYS)[None, :] <= limit[:, None], score, -float("inf"))
    top = tl.max(score, axis=1) * scale
    weight = tl.exp2(score * scale - _finite(top)[:, None])
    b_v = _load(p_v, end, stride_v_b, stride_v_h, USED_WIDTH, KEYS, WIDTH, False).to(DTYPE)
    return top, tl.sum(weight, axis=1), tl.dot(weight.to(DTYPE), b_v, input_precision="ieee")


@triton.jit
def fold(top, total, acc, more_top, more_total, more_acc):
    """One state out of two. Multiplications and additions are named one by one: every kernel rounds them alike."""
    new_top = tl.maximum(top, more_top)
    base = _finite(new_top)
    shrink, share = tl.exp2(top - base), tl.exp2(more_top - base)
    total = tl.fma(total, shrink, more_total * share)
    acc = tl.fma(acc, tl.broadcast_to(shrink[:, None], acc.shape), more_acc * share[:, None])
    return new_top, total, acc


@triton.jit
def _finite(top):
    """What rows subtract: those that have seen nothing must not subtract infinity from infinity."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _load(
    p, end, stride_b, stride_h, USED_WIDTH: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr
):
    i = tl.arange(0, KEYS)
    c = tl.arange(0, WIDTH)
    p_rows = p + i[:, None] * stride_b + c[None, :] * stride_h
    if not WHOLE:
        return tl.load(p_rows, mask=(i < end)[:, None] & (c < USED_WIDTH)[None, :], other=0.0)
    elif USED_WIDTH == WIDTH:
        return tl.load(p_rows)
    else:
        return tl.load(p_rows, mask=(c < USED_WIDTH)[None, :], other=0.0)
