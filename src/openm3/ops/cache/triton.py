"""Page writes in Triton: keys, values and index keys in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from openm3.ops.triton import machine, padded, refusal

if TYPE_CHECKING:
    from openm3.ops.cache import Pool


def supports_write_pages(
    k_TGH: Tensor, v_TGH: Tensor, index_k_TJ: Tensor | None, pool: Pool, slot_T: Tensor
) -> str | None:
    return refusal(*[x for x in (k_TGH, v_TGH, index_k_TJ, *pool[:3]) if x is not None])


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


def token_tile(num_tokens: int, num_parts: int, processors: int) -> int:
    """Tokens that a program writes: 32 fill its threads, and fewer fill the device when there are few. Not measured."""
    return min(32, padded(num_tokens * num_parts // (4 * processors)))


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
    b_token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
    part = tl.program_id(1)
    b_slot = tl.load(p_slot + b_token * stride_slot, mask=b_token < num_tokens, other=-1).to(tl.int64)
    # Padding of a captured batch has no slot: it stores nothing.
    b_taken = ((b_slot >= 0) & (b_slot < num_slots))[:, None]
    b_page, b_offset = (b_slot // B)[:, None], (b_slot % B)[:, None]
    b_token = b_token[:, None]
    b_width = tl.arange(0, WIDTH)[None, :]
    if part < G:
        b_p_from = p_k + b_token * stride_kt + part * stride_kg + b_width * stride_kh
        b_p_to = p_k_pool + b_page * stride_km + part * stride_kpg + b_offset * stride_kb + b_width * stride_kph
        b_inside = b_taken & (b_width < H)
        tl.store(b_p_to, tl.load(b_p_from, mask=b_inside), mask=b_inside)
    elif part < 2 * G:
        b_p_from = p_v + b_token * stride_vt + (part - G) * stride_vg + b_width * stride_vh
        b_p_to = p_v_pool + b_page * stride_vm + (part - G) * stride_vpg + b_offset * stride_vb + b_width * stride_vph
        b_inside = b_taken & (b_width < H)
        tl.store(b_p_to, tl.load(b_p_from, mask=b_inside), mask=b_inside)
    else:
        b_p_from = p_index + b_token * stride_it + b_width * stride_ij
        b_p_to = p_index_pool + b_page * stride_im + b_offset * stride_ib + b_width * stride_ipj
        b_inside = b_taken & (b_width < J)
        tl.store(b_p_to, tl.load(b_p_from, mask=b_inside), mask=b_inside)
