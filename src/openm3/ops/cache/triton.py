"""Page writes in Triton, and all that a layer of attention does with its projections: one launch each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from openm3.ops.norm.triton import WIDEST, normed
from openm3.ops.triton import machine, padded, refusal

if TYPE_CHECKING:
    from openm3.ops.cache import HeadNorms, Pool, Projections


def write_pages(k_TGH: Tensor, v_TGH: Tensor, index_k_TJ: Tensor | None, pool: Pool, slot_T: Tensor) -> None:
    (num_tokens, num_groups, head_dim), (num_pages, _, block_size, _) = k_TGH.shape, pool.k_MGBH.shape
    if num_tokens == 0:
        return
    # Where there is no index part, its programs are not launched, and values stand in for its arguments.
    index_k_TJ, index_k_MBJ = (v_TGH[:, 0], pool.v_MGBH[:, 0]) if index_k_TJ is None else (index_k_TJ, pool.index_k_MBJ)
    num_parts = 2 * num_groups + (pool.index_k_MBJ is not None)
    tokens = token_tile(num_tokens, num_parts, machine(k_TGH.device).processors)
    _write[(triton.cdiv(num_tokens, tokens), num_parts)](
        *(k_TGH, v_TGH, index_k_TJ, pool.k_MGBH, pool.v_MGBH, index_k_MBJ, slot_T),
        *(num_tokens, num_pages * block_size, slot_T.stride(0)),
        *(*k_TGH.stride(), *v_TGH.stride(), *index_k_TJ.stride()),
        *(*pool.k_MGBH.stride(), *pool.v_MGBH.stride(), *index_k_MBJ.stride()),
        G=num_groups,
        B=block_size,
        H=head_dim,
        J=index_k_TJ.shape[1],
        TOKENS=tokens,
        WIDTH=padded(max(head_dim, index_k_TJ.shape[1])),
        num_warps=4,
    )


def write_heads(
    heads: Projections, norms: HeadNorms, rope: tuple[Tensor, Tensor], eps: float, pool: Pool, slot_T: Tensor
) -> tuple[Tensor, Tensor | None]:
    (num_tokens, num_heads, head_dim), num_groups = heads.q_TNH.shape, heads.k_TGH.shape[1]
    num_pages, _, block_size, _ = pool.k_MGBH.shape
    q_TNH = _empty(heads.q_TNH)
    index_q_TGJ = None if heads.index_q_TGJ is None else _empty(heads.index_q_TGJ)
    if num_tokens == 0:
        return q_TNH, index_q_TGJ
    if index_q_TGJ is None:
        # As in `write_pages`: these arguments are there and not used.
        index = heads.v_TGH, heads.v_TGH[:, 0], norms.k_H, norms.k_H, q_TNH, pool.v_MGBH[:, 0]
        num_index_heads, num_parts = 0, num_heads + 2 * num_groups
    else:
        index = *heads[3:], *norms[2:], index_q_TGJ, pool.index_k_MBJ
        num_index_heads = index_q_TGJ.shape[1]
        num_parts = num_heads + 2 * num_groups + num_index_heads + 1
    index_q, index_k_TJ, index_q_J, index_k_J, index_out, index_k_MBJ = index
    index_dim = index_k_TJ.shape[1]
    columns = padded(max(head_dim, index_dim))
    # A norm holds several numbers for each that it reads: half of the tile that a mere copy takes.
    tokens = min(token_tile(num_tokens, num_parts, machine(q_TNH.device).processors), max(1, 2048 // columns))
    _write_heads[(triton.cdiv(num_tokens, tokens), num_parts)](
        *(*heads[:3], index_q, index_k_TJ, *(x.contiguous() for x in (*norms[:2], index_q_J, index_k_J)), *rope),
        *(q_TNH, index_out, pool.k_MGBH, pool.v_MGBH, index_k_MBJ, slot_T),
        *(eps, num_tokens, num_pages * block_size, slot_T.stride(0)),
        *(stride for x in (*heads[:3], index_q, index_k_TJ, *rope) for stride in x.stride()),
        *(stride for x in (pool.k_MGBH, pool.v_MGBH, index_k_MBJ) for stride in x.stride()),
        N=num_heads,
        G=num_groups,
        INDEX_HEADS=num_index_heads,
        B=block_size,
        H=head_dim,
        J=index_dim,
        W=rope[0].shape[1],
        TOKENS=tokens,
        WIDTH=padded(head_dim),
        INDEX_WIDTH=padded(index_dim),
        num_warps=min(max(tokens * columns // 512, 1), 16),
    )
    return q_TNH, index_q_TGJ


def token_tile(num_tokens: int, num_parts: int, processors: int) -> int:
    """Tokens that a program writes: 32 fill its threads, and fewer fill the device when there are few. Not measured."""
    return min(32, padded(num_tokens * num_parts // (4 * processors)))


def supports_write_pages(
    k_TGH: Tensor, v_TGH: Tensor, index_k_TJ: Tensor | None, pool: Pool, slot_T: Tensor
) -> str | None:
    return _refusal(pool, k_TGH, v_TGH, index_k_TJ)


def supports_write_heads(
    heads: Projections, norms: HeadNorms, rope: tuple[Tensor, Tensor], eps: float, pool: Pool, slot_T: Tensor
) -> str | None:
    if reason := _refusal(pool, *heads, *norms, *rope):
        return reason
    if not rope[0].dtype == rope[1].dtype == torch.float32:
        return "takes rotary tables in float32"
    widest = max(x.shape[-1] for x in heads if x is not None)
    return None if widest <= WIDEST else f"takes heads of up to {WIDEST} numbers, not {widest}"


def _refusal(pool: Pool, *tensors: Tensor | None) -> str | None:
    keys = pool.k_MGBH, pool.v_MGBH
    if reason := refusal(*[x for x in (*tensors, pool.index_k_MBJ) if x is not None], stored=keys):
        return reason
    eight_bits = any(x.dtype == torch.float8_e4m3fn for x in keys)
    if eight_bits and keys[0].is_cuda and torch.cuda.get_device_capability(keys[0].device) < (8, 9):
        return "rounds to eight bits on GPUs of compute capability 8.9 and later"
    return None


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def _write(
    p_k,
    p_v,
    p_index,
    p_k_pool,
    p_v_pool,
    p_index_pool,
    p_slot,
    num_tokens,
    num_slots,
    stride_slot,
    stride_kt,
    stride_kg,
    stride_kh,
    stride_vt,
    stride_vg,
    stride_vh,
    stride_it,
    stride_ij,
    stride_km,
    stride_kpg,
    stride_kb,
    stride_kph,
    stride_vm,
    stride_vpg,
    stride_vb,
    stride_vph,
    stride_im,
    stride_ib,
    stride_ipj,
    G: tl.constexpr,
    B: tl.constexpr,
    H: tl.constexpr,
    J: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    b_token, b_page, b_offset, b_taken = _slots(p_slot, num_tokens, num_slots, stride_slot, B, TOKENS)
    part = tl.program_id(1)
    b_width = tl.arange(0, WIDTH)[None, :]
    # Names that differ: what several branches assign must have one type.
    if part < G:
        b_k_inside = b_taken & (b_width < H)
        b_k = tl.load(p_k + b_token * stride_kt + part * stride_kg + b_width * stride_kh, mask=b_k_inside)
        b_p_k = p_k_pool + b_page * stride_km + part * stride_kpg + b_offset * stride_kb + b_width * stride_kph
        tl.store(b_p_k, stored(b_k, p_k_pool.dtype.element_ty), mask=b_k_inside)
    elif part < 2 * G:
        i_group = part - G
        b_v_inside = b_taken & (b_width < H)
        b_v = tl.load(p_v + b_token * stride_vt + i_group * stride_vg + b_width * stride_vh, mask=b_v_inside)
        b_p_v = p_v_pool + b_page * stride_vm + i_group * stride_vpg + b_offset * stride_vb + b_width * stride_vph
        tl.store(b_p_v, stored(b_v, p_v_pool.dtype.element_ty), mask=b_v_inside)
    else:
        b_index_inside = b_taken & (b_width < J)
        b_index_k = tl.load(p_index + b_token * stride_it + b_width * stride_ij, mask=b_index_inside)
        b_p_index = p_index_pool + b_page * stride_im + b_offset * stride_ib + b_width * stride_ipj
        tl.store(b_p_index, b_index_k, mask=b_index_inside)


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def _write_heads(
    p_q,
    p_k,
    p_v,
    p_index_q,
    p_index_k,
    p_q_norm,
    p_k_norm,
    p_index_q_norm,
    p_index_k_norm,
    p_cos,
    p_sin,
    p_q_out,
    p_index_q_out,
    p_k_pool,
    p_v_pool,
    p_index_pool,
    p_slot,
    eps,
    num_tokens,
    num_slots,
    stride_slot,
    stride_qt,
    stride_qn,
    stride_qh,
    stride_kt,
    stride_kg,
    stride_kh,
    stride_vt,
    stride_vg,
    stride_vh,
    stride_iqt,
    stride_iqg,
    stride_iqj,
    stride_ikt,
    stride_ikj,
    stride_ct,
    stride_cw,
    stride_st,
    stride_sw,
    stride_km,
    stride_kpg,
    stride_kb,
    stride_kph,
    stride_vm,
    stride_vpg,
    stride_vb,
    stride_vph,
    stride_im,
    stride_ib,
    stride_ipj,
    N: tl.constexpr,
    G: tl.constexpr,
    INDEX_HEADS: tl.constexpr,
    B: tl.constexpr,
    H: tl.constexpr,
    J: tl.constexpr,
    W: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    INDEX_WIDTH: tl.constexpr,
):
    """One head of some tokens. What went through the norm is rounded to its own dtype, then to that of the pool."""
    b_token, b_page, b_offset, b_taken = _slots(p_slot, num_tokens, num_slots, stride_slot, B, TOKENS)
    part = tl.program_id(1)
    b_there = b_token < num_tokens
    b_p_cos, b_p_sin = p_cos + b_token * stride_ct, p_sin + b_token * stride_st
    b_width, b_index_width = tl.arange(0, WIDTH)[None, :], tl.arange(0, INDEX_WIDTH)[None, :]
    if part < N:
        b_q = normed(
            *(p_q + b_token * stride_qt + part * stride_qn, p_q_norm, b_p_cos, b_p_sin, b_there, eps),
            *(stride_qh, 1, stride_cw, stride_sw, H, W, WIDTH),
        )
        tl.store(p_q_out + (b_token * N + part) * H + b_width, b_q, mask=b_there & (b_width < H))
    elif part < N + G:
        i_k = part - N
        b_k = normed(
            *(p_k + b_token * stride_kt + i_k * stride_kg, p_k_norm, b_p_cos, b_p_sin, b_there, eps),
            *(stride_kh, 1, stride_cw, stride_sw, H, W, WIDTH),
        ).to(p_k.dtype.element_ty)
        b_p_k = p_k_pool + b_page * stride_km + i_k * stride_kpg + b_offset * stride_kb + b_width * stride_kph
        tl.store(b_p_k, stored(b_k, p_k_pool.dtype.element_ty), mask=b_taken & (b_width < H))
    elif part < N + 2 * G:
        i_v = part - N - G
        b_inside = b_taken & (b_width < H)
        b_v = tl.load(p_v + b_token * stride_vt + i_v * stride_vg + b_width * stride_vh, mask=b_inside)
        b_p_v = p_v_pool + b_page * stride_vm + i_v * stride_vpg + b_offset * stride_vb + b_width * stride_vph
        tl.store(b_p_v, stored(b_v, p_v_pool.dtype.element_ty), mask=b_inside)
    elif part < N + 2 * G + INDEX_HEADS:
        i_q = part - N - 2 * G
        b_index_q = normed(
            *(p_index_q + b_token * stride_iqt + i_q * stride_iqg, p_index_q_norm, b_p_cos, b_p_sin, b_there, eps),
            *(stride_iqj, 1, stride_cw, stride_sw, J, W, INDEX_WIDTH),
        )
        b_p_q = p_index_q_out + (b_token * INDEX_HEADS + i_q) * J + b_index_width
        tl.store(b_p_q, b_index_q, mask=b_there & (b_index_width < J))
    else:
        b_index_k = normed(
            *(p_index_k + b_token * stride_ikt, p_index_k_norm, b_p_cos, b_p_sin, b_there, eps),
            *(stride_ikj, 1, stride_cw, stride_sw, J, W, INDEX_WIDTH),
        ).to(p_index_k.dtype.element_ty)
        b_p_index = p_index_pool + b_page * stride_im + b_offset * stride_ib + b_index_width * stride_ipj
        tl.store(b_p_index, b_index_k, mask=b_taken & (b_index_width < J))


@triton.jit
def _slots(p_slot, num_tokens, num_slots, stride_slot, B: tl.constexpr, TOKENS: tl.constexpr):
    """The tokens of a program, their pages and offsets there, and which have a slot, one row each.

    Padding of a captured batch has none: it stores nothing.
    """
    b_token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS).to(tl.int64)[:, None]
    b_slot = tl.load(p_slot + b_token * stride_slot, mask=b_token < num_tokens, other=-1).to(tl.int64)
    return b_token, b_slot // B, b_slot % B, (b_slot >= 0) & (b_slot < num_slots)


@triton.jit
def stored(b_x, DTYPE: tl.constexpr):
    """In the dtype of a pool: with eight bits, numbers beyond 448 become 448; comparisons let NaN through."""
    if DTYPE.is_fp8e4nv():
        b_x = b_x.to(tl.float32)
        b_x = tl.where(b_x > 448.0, 448.0, tl.where(b_x < -448.0, -448.0, b_x))
    return b_x.to(DTYPE)
