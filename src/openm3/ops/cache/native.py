"""Page writes in native code: one pass over the tokens. Source: cpu.cpp beside this file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from openm3.ops import native

if TYPE_CHECKING:
    from openm3.ops.cache import HeadNorms, Pool, Projections


def write_pages(k_TGH: Tensor, v_TGH: Tensor, index_k_TJ: Tensor | None, pool: Pool, slot_T: Tensor) -> None:
    index_k_TJ = None if index_k_TJ is None else native.dense(index_k_TJ)
    rows = (native.dense(k_TGH), native.dense(v_TGH), index_k_TJ)
    native.loaded().write_pages(*rows, *pool[:3], slot_T, native.threads())


def write_heads(
    heads: Projections, norms: HeadNorms, rope: tuple[Tensor, Tensor], eps: float, pool: Pool, slot_T: Tensor
) -> tuple[Tensor, Tensor | None]:
    parts = [None if x is None else native.dense(x) for x in (*heads, *norms, *rope)]
    q_TNH = torch.empty(heads.q_TNH.shape, dtype=heads.q_TNH.dtype)
    index_q = heads.index_q_TGJ
    index_q_TGJ = None if index_q is None else torch.empty(index_q.shape, dtype=index_q.dtype)
    native.loaded().write_heads(*parts, eps, *pool[:3], slot_T, q_TNH, index_q_TGJ, native.threads())
    return q_TNH, index_q_TGJ


def supports(k_TGH: Tensor, v_TGH: Tensor, index_k_TJ: Tensor | None, pool: Pool, slot_T: Tensor) -> str | None:
    return _refusal(pool, k_TGH, v_TGH, index_k_TJ)


def supports_heads(
    heads: Projections, norms: HeadNorms, rope: tuple[Tensor, Tensor], eps: float, pool: Pool, slot_T: Tensor
) -> str | None:
    reason = _refusal(pool, *heads, *norms, *rope)
    if reason is None and not rope[0].dtype == rope[1].dtype == torch.float32:
        return "takes rotary tables in float32"
    return reason


def _refusal(pool: Pool, *tensors: Tensor | None) -> str | None:
    pages = [x for x in pool[:3] if x is not None]
    reason = native.refusal(*pages, *[x for x in tensors if x is not None])
    if reason is None and any(x.shape[-1] > 1 and x.stride(-1) != 1 for x in pages):
        return "needs pools that are dense in their last axis"
    return reason
