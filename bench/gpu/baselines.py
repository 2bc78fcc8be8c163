"""What people run on Hopper GPUs today, written from public descriptions, to measure against.

- Query-major: one program scores 16 queries of a group against every block of their request, one block after another
  (an unsplit scorer, scores kept in memory, top-k by PyTorch); one program attends for one token and group, its query
  heads as 16 rows, to one selected block after another.
- Block-major: everything goes the way that the operator takes where selections scatter, a partial result for each
  block that a token chose. That is the published scheme; its kernels need other GPUs.
- Dense: PyTorch's scaled_dot_product_attention in its FlashAttention form, and FlashAttention 3 where it is installed.

Every request has the same number of tokens, and every length is given on the host.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ROWS = 16


def query_major_blocks(
    index_q_TGJ: Tensor, index_k_MBJ: Tensor, page_RP: Tensor, length: int, num_selected: int
) -> Tensor:
    """`select_blocks` for R requests of T / R tokens and `length` keys each."""
    (num_tokens, groups, width), (_, block_size, _) = index_q_TGJ.shape, index_k_MBJ.shape
    requests, num_blocks = page_RP.shape
    count = num_tokens // requests
    score_TGP = torch.empty((num_tokens, groups, num_blocks), dtype=torch.float32, device=index_q_TGJ.device)
    _score[(requests * triton.cdiv(count, ROWS), groups)](
        *(index_q_TGJ, index_k_MBJ, page_RP, score_TGP, length, count, num_blocks),
        G=groups,
        J=width,
        B=block_size,
        ROWS=ROWS,
        num_warps=4,
        num_stages=3,
    )
    own_t = (torch.arange(count, device=score_TGP.device) + length - count) // block_size
    own_T11 = own_t.repeat(requests)[:, None, None].expand(-1, groups, 1)
    score_TGP.scatter_(2, own_T11, math.inf)
    best = score_TGP.topk(min(num_selected, num_blocks), dim=-1)
    missing = num_blocks
    block_TGK = best.indices.masked_fill(best.values == -math.inf, missing).sort(dim=-1).values
    return block_TGK.masked_fill(block_TGK == missing, -1).to(torch.int32)


def query_major_attention(
    q_TNH: Tensor, k_MGBH: Tensor, v_MGBH: Tensor, page_RP: Tensor, length: int, block_TGK: Tensor, scale: float
) -> Tensor:
    """`sparse_attention` for R requests of T / R tokens and `length` keys each."""
    (num_tokens, heads, width), (_, groups, block_size, _) = q_TNH.shape, k_MGBH.shape
    requests, num_blocks = page_RP.shape
    out_TNH = torch.empty_like(q_TNH)
    _attend[(num_tokens, groups)](
        *(q_TNH, k_MGBH, v_MGBH, page_RP, block_TGK, out_TNH, scale * math.log2(math.e)),
        *(length, num_tokens // requests, num_blocks),
        G=groups,
        H=width,
        B=block_size,
        K=block_TGK.shape[2],
        HEADS=heads // groups,
        ROWS=max(ROWS, triton.next_power_of_2(heads // groups)),
        num_warps=4,
        num_stages=2,
    )
    return out_TNH


@contextmanager
def block_major_everywhere() -> Iterator[None]:
    """Inside the block `sparse_attention` walks no tile's union, wherever it has the other way at all."""
    from openm3.ops.attention import triton as kernels

    def choose(*sizes: Any) -> Any:
        found = kernels_choose(*sizes)
        return None if found is None else replace(found, most=0, shared=0)

    kernels_choose = kernels.choose_scattering
    with mock.patch.object(kernels, "choose_scattering", choose):
        yield


def dense_flash(q_TNH: Tensor, k_SGH: Tensor, v_SGH: Tensor) -> Tensor:
    """Every query against every key: what causality leaves out of a few queries behind a million keys is nothing."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_TNH, k_SGH, v_SGH))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[0].transpose(0, 1)


def has_flash_3() -> bool:
    return importlib.util.find_spec("flash_attn_interface") is not None


def dense_flash_3(q_TNH: Tensor, k_SGH: Tensor, v_SGH: Tensor) -> Tensor:
    """As `dense_flash`, in FlashAttention 3."""
    from flash_attn_interface import flash_attn_func

    found = flash_attn_func(q_TNH[None], k_SGH[None], v_SGH[None])
    out_1TNH: Tensor = found[0] if isinstance(found, tuple) else found
    return out_1TNH[0]


@triton.jit
def _score(
    p_q,
    p_k,
    p_page,
    p_score,
    length,
    count,
    num_blocks,
    G: tl.constexpr,
    J: tl.constexpr,
    B: tl.constexpr,
    ROWS: tl.constexpr,
):
    tiles = tl.cdiv(count, ROWS)
    r, g = tl.program_id(0) // tiles, tl.program_id(1)
    i = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    token = (r * count + i).to(tl.int64)
    there = i < count
    position = length - count + i
    b, j = tl.arange(0, B), tl.arange(0, J)
    b_q = tl.load(p_q + (token[:, None] * G + g) * J + j[None, :], mask=there[:, None], other=0.0)
    for block in range(tl.cdiv(length, B)):
        page = tl.load(p_page + r * num_blocks + block).to(tl.int64)
        b_k = tl.load(p_k + page * (B * J) + b[:, None] * J + j[None, :])
        score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        score = tl.where(block * B + b[None, :] <= position[:, None], score, float("-inf"))
        tl.store(p_score + (token * G + g) * num_blocks + block, tl.max(score, 1), mask=there)


@triton.jit
def _attend(
    p_q,
    p_k,
    p_v,
    p_page,
    p_block,
    p_out,
    scale,
    length,
    count,
    num_blocks,
    G: tl.constexpr,
    H: tl.constexpr,
    B: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
):
    token, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    r = token // count
    position = (length - count + token % count).to(tl.int32)
    n, b, h = tl.arange(0, ROWS), tl.arange(0, B), tl.arange(0, H)
    there = (n < HEADS)[:, None]
    at = ((token * G + g) * HEADS + n[:, None]) * H + h[None, :]
    b_q = tl.load(p_q + at, mask=there, other=0.0)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, H], tl.float32)
    for slot in range(K):
        block = tl.load(p_block + (token * G + g) * K + slot)
        if block >= 0:
            page = tl.load(p_page + r * num_blocks + block).to(tl.int64)
            key = (page * G + g) * B * H + b[:, None] * H + h[None, :]
            seen = (block * B + b <= position)[:, None]
            b_k = tl.load(p_k + key, mask=seen, other=0.0)
            score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
            score = tl.where(block * B + b[None, :] <= position, score, float("-inf"))
            new_top = tl.maximum(top, tl.max(score, 1))
            weight = tl.exp2(score - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            b_v = tl.load(p_v + key, mask=seen, other=0.0)
            acc = tl.dot(weight.to(b_v.dtype), b_v, acc * shrink[:, None], input_precision="ieee")
            total = total * shrink + tl.sum(weight, 1)
            top = new_top
    tl.store(p_out + at, acc / total[:, None], mask=there)
