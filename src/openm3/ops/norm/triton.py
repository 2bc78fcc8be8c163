"""Norms in Triton: a program reads some rows once, computes in float32 and rounds at the end."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openm3.ops.triton import padded, refusal

WIDEST = 1 << 15
"""The widest rows that fit in a program's registers."""


def supports_rms_norm(x: Tensor, weight: Tensor, eps: float) -> str | None:
    if reason := refusal(x, weight):
        return reason
    return None if x.shape[-1] <= WIDEST else f"takes rows of up to {WIDEST} numbers, not {x.shape[-1]}"


def supports_norm_rotate(x_TNH: Tensor, weight_H: Tensor, cos_TW: Tensor, sin_TW: Tensor, eps: float) -> str | None:
    reason = supports_rms_norm(x_TNH, weight_H, eps) or refusal(cos_TW, sin_TW)
    if reason is None and not cos_TW.dtype == sin_TW.dtype == torch.float32:
        return "takes rotary tables in float32"
    return reason


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x_TNH = x.reshape(-1, 1, x.shape[-1])
    nothing_TW = x.new_empty((x_TNH.shape[0], 0), dtype=torch.float32)
    return norm_rotate(x_TNH, weight, nothing_TW, nothing_TW, eps).view(x.shape)


def norm_rotate(x_TNH: Tensor, weight_H: Tensor, cos_TW: Tensor, sin_TW: Tensor, eps: float) -> Tensor:
    (num_tokens, num_heads, width), half = x_TNH.shape, cos_TW.shape[1]
    out_TNH = torch.empty(x_TNH.shape, dtype=x_TNH.dtype, device=x_TNH.device)
    if out_TNH.numel() == 0:
        return out_TNH
    num_rows, columns = num_tokens * num_heads, padded(width)
    rows = row_tile(num_rows, columns)
    _norm_rotate[(triton.cdiv(num_rows, rows),)](
        *(x_TNH, weight_H, cos_TW, sin_TW, out_TNH),
        *(eps, num_rows),
        *(*x_TNH.stride(), weight_H.stride(0), *cos_TW.stride(), *sin_TW.stride()),
        N=num_heads,
        H=width,
        W=half,
        ROWS=rows,
        WIDTH=columns,
        num_warps=min(max(rows * columns // 1024, 1), 16),
    )
    return out_TNH


def row_tile(num_rows: int, columns: int) -> int:
    """Rows of a program: 4096 numbers, 16 a thread of eight warps, or one row if that is wider. Not measured yet."""
    return max(1, min(4096 // columns, padded(num_rows)))


@triton.jit(do_not_specialize=["num_rows"])
def _norm_rotate(
    p_x,
    p_weight,
    p_cos,
    p_sin,
    p_out,
    eps,
    num_rows,
    stride_xt,
    stride_xn,
    stride_xh,
    stride_weight,
    stride_ct,
    stride_cw,
    stride_st,
    stride_sw,
    N: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    b_row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    b_column = tl.arange(0, WIDTH)[None, :]
    b_there = b_row < num_rows
    b_token = b_row // N
    b_normed = normed(
        *(p_x + b_token * stride_xt + b_row % N * stride_xn, p_weight),
        *(p_cos + b_token * stride_ct, p_sin + b_token * stride_st, b_there, eps),
        *(stride_xh, stride_weight, stride_cw, stride_sw, H, W, WIDTH),
    )
    tl.store(p_out + b_row * H + b_column, b_normed, mask=b_there & (b_column < H))


@triton.jit
def normed(
    b_p_x,
    p_weight,
    b_p_cos,
    b_p_sin,
    b_there,
    eps,
    stride_x,
    stride_weight,
    stride_cos,
    stride_sin,
    H: tl.constexpr,
    W: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Rows of H numbers with their norm and rotation, in float32; pointers and `b_there` have one entry a row."""
    b_column = tl.arange(0, WIDTH)[None, :]
    b_taken = b_there & (b_column < H)
    b_x = tl.load(b_p_x + b_column * stride_x, mask=b_taken, other=0.0).to(tl.float32)
    b_scale = tl.rsqrt(tl.sum(b_x * b_x, 1, keep_dims=True) / H + eps)
    b_weight = tl.load(p_weight + b_column * stride_weight, mask=b_column < H, other=0.0).to(tl.float32)
    b_normed = b_x * b_scale * (1.0 + b_weight)
    if W > 0:
        # Each channel's partner is read again, from the cache, rather than moved between threads.
        b_turned = b_taken & (b_column < 2 * W)
        b_first = b_column < W
        b_other = tl.where(b_first, b_column + W, b_column - W)
        b_y = tl.load(b_p_x + b_other * stride_x, mask=b_turned, other=0.0).to(tl.float32)
        b_other_weight = tl.load(p_weight + b_other * stride_weight, mask=b_column < 2 * W, other=0.0).to(tl.float32)
        b_partner = b_y * b_scale * (1.0 + b_other_weight)
        b_angle = tl.where(b_first, b_column, b_other)
        b_cos = tl.load(b_p_cos + b_angle * stride_cos, mask=b_turned, other=1.0)
        b_sin = tl.load(b_p_sin + b_angle * stride_sin, mask=b_turned, other=0.0)
        b_normed = b_normed * b_cos + tl.where(b_first, -b_partner, b_partner) * b_sin
    return b_normed
