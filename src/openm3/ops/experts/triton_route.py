"""Routing in Triton: products with the router over splits of the inputs, then the choice of each token's experts.

How sums are grouped depends neither on how many tokens there are nor on which.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from openm3.ops.triton import padded, refusal

WORKSPACE = 1 << 28
"""Bytes of activations, outputs of pairs or parts of the router's sums held at a time: up to 10,922 tokens of M3 in
bfloat16 go through an expert together."""

MOST_EXPERTS = 1024
"""As many as one program chooses from."""

ROUTE_DEPTH = 512
"""Inputs that a program of the router adds up, whatever the tokens: equal tokens are routed equally in every batch."""

HIDDEN = tl.constexpr(-(1 << 63))
"""Below the rank of any expert."""


def route(x_TD: Tensor, router_ED: Tensor, bias_E: Tensor, num_active: int) -> tuple[Tensor, Tensor]:
    (num_tokens, width), num_experts = x_TD.shape, router_ED.shape[0]
    expert_TA = torch.empty((num_tokens, num_active), dtype=torch.int32, device=x_TD.device)
    weight_TA = torch.empty((num_tokens, num_active), dtype=torch.float32, device=x_TD.device)
    step = max(1, WORKSPACE // (triton.cdiv(width, ROUTE_DEPTH) * num_experts * 4))
    for first in range(0, num_tokens, step):
        part = slice(first, first + step)
        _route_part(x_TD[part], router_ED, bias_E, expert_TA[part], weight_TA[part])
    return expert_TA, weight_TA


def _route_part(x_TD: Tensor, router_ED: Tensor, bias_E: Tensor, expert_TA: Tensor, weight_TA: Tensor) -> None:
    (num_tokens, width), num_experts, num_active = x_TD.shape, router_ED.shape[0], expert_TA.shape[1]
    splits = triton.cdiv(width, ROUTE_DEPTH)
    part_STE = torch.empty((splits, num_tokens, num_experts), dtype=torch.float32, device=x_TD.device)
    # Few tokens leave it to many programs to read the router; many tokens read it less often in larger tiles.
    rows, columns = (16, 16) if num_tokens <= 64 else (64, min(64, padded(num_experts, 16)))
    _route_products[(triton.cdiv(num_tokens, rows), triton.cdiv(num_experts, columns), splits)](
        *(x_TD, router_ED, part_STE, num_tokens, *x_TD.stride(), *router_ED.stride()),
        D=width,
        E=num_experts,
        ROWS=rows,
        COLUMNS=columns,
        SPLIT=ROUTE_DEPTH,
        DEPTH=32,
        num_warps=4,
    )
    rows = max(1, 512 // padded(num_experts))
    _choose[(triton.cdiv(num_tokens, rows),)](
        *(part_STE, bias_E, expert_TA, weight_TA, num_tokens, splits, bias_E.stride(0)),
        A=num_active,
        E=num_experts,
        ROWS=rows,
        EXPERTS=padded(num_experts),
        ACTIVE=padded(num_active),
        num_warps=4,
    )


def supports_route(x_TD: Tensor, router_ED: Tensor, bias_E: Tensor, num_active: int) -> str | None:
    if reason := refusal(x_TD, router_ED, bias_E):
        return reason
    if not router_ED.dtype == bias_E.dtype == torch.float32:
        return "routes in float32"
    return too_many(router_ED.shape[0])


def too_many(num_experts: int) -> str | None:
    """Why so many experts cannot be chosen from, None if they can."""
    return None if num_experts <= MOST_EXPERTS else f"takes up to {MOST_EXPERTS} experts, not {num_experts}"


@triton.jit
def piece(b_p, depth, stride, b_depth, WIDTH: tl.constexpr, DEPTH: tl.constexpr):
    """The next DEPTH of WIDTH numbers of some rows, zeros behind the last."""
    if WIDTH % DEPTH == 0:
        return tl.load(b_p + depth * stride)
    return tl.load(b_p + depth * stride, mask=b_depth < WIDTH - depth, other=0.0)


@triton.jit(do_not_specialize=["num_tokens"])
def _route_products(
    p_x,
    p_router,
    p_part,
    num_tokens,
    stride_xt,
    stride_xd,
    stride_re,
    stride_rd,
    D: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Float32 products without tensor cores: each sum is one chain in the order of its inputs, in every tile."""
    b_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b_column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    b_depth = tl.program_id(2) * SPLIT + tl.arange(0, DEPTH)[None, :]
    b_p_x = p_x + tl.minimum(b_row, num_tokens - 1).to(tl.int64)[:, None] * stride_xt + b_depth * stride_xd
    b_p_router = p_router + tl.minimum(b_column, E - 1)[:, None] * stride_re + b_depth * stride_rd
    b_sum = tl.zeros((ROWS, COLUMNS), tl.float32)
    for depth in range(0, SPLIT, DEPTH):
        b_x = piece(b_p_x, depth, stride_xd, b_depth, D, SPLIT).to(tl.float32)
        b_router = piece(b_p_router, depth, stride_rd, b_depth, D, SPLIT)
        b_sum = tl.dot(b_x, tl.trans(b_router), b_sum, input_precision="ieee")
    i_row = tl.program_id(2).to(tl.int64) * num_tokens + b_row
    b_inside = (b_row < num_tokens)[:, None] & (b_column < E)[None, :]
    tl.store(p_part + i_row[:, None] * E + b_column[None, :], b_sum, mask=b_inside)


@triton.jit(do_not_specialize=["num_tokens", "splits"])
def _choose(
    p_part,
    p_bias,
    p_expert,
    p_weight,
    num_tokens,
    splits,
    stride_bias,
    A: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ACTIVE: tl.constexpr,
):
    b_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b_expert = tl.arange(0, EXPERTS)[None, :]
    b_inside = (b_row < num_tokens)[:, None] & (b_expert < E)
    b_p_part = p_part + b_row.to(tl.int64)[:, None] * E + b_expert
    b_logit = tl.zeros((ROWS, EXPERTS), tl.float32)
    for i in range(splits):
        b_logit += tl.load(b_p_part + tl.cast(i, tl.int64) * num_tokens * E, mask=b_inside, other=0.0)
    b_score = tl.div_rn(1.0, 1.0 + tl.exp(-b_logit))
    b_key = b_score + tl.load(p_bias + b_expert * stride_bias, mask=b_expert < E, other=0.0)
    # The total order as numbers: NaN first as in a sort, then the larger, zeros of either sign equal; then the smaller.
    b_bits = tl.where(b_key == 0.0, 0.0, b_key).to(tl.int32, bitcast=True)
    b_order = tl.where(b_key == b_key, b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    b_rank = (b_order.to(tl.int64) << 32) | (EXPERTS - 1 - b_expert).to(tl.int64)
    b_rank = tl.where(b_inside, b_rank, HIDDEN)
    b_active = tl.arange(0, ACTIVE)[None, :]
    b_best = tl.full((ROWS,), (1 << 63) - 1, tl.int64)
    b_chosen = tl.zeros((ROWS, ACTIVE), tl.int32)
    b_weight = tl.zeros((ROWS, ACTIVE), tl.float32)
    for a in range(A):
        b_best = tl.max(tl.where(b_rank < b_best[:, None], b_rank, HIDDEN), 1)
        b_taken = b_rank == b_best[:, None]
        b_chosen = tl.where(b_active == a, tl.sum(tl.where(b_taken, b_expert, 0), 1)[:, None], b_chosen)
        b_weight = tl.where(b_active == a, tl.sum(tl.where(b_taken, b_score, 0.0), 1)[:, None], b_weight)
    b_weight = tl.div_rn(b_weight, tl.sum(b_weight, 1)[:, None] + tl.zeros_like(b_weight))
    b_stored = (b_row < num_tokens)[:, None] & (b_active < A)
    b_place = b_row.to(tl.int64)[:, None] * A + b_active
    tl.store(p_expert + b_place, b_chosen, mask=b_stored)
    tl.store(p_weight + b_place, b_weight, mask=b_stored)
