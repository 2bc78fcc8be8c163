"""Page writes in native code: one pass over the tokens. Source: cpu.cpp beside this file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from openm3.ops import native

if TYPE_CHECKING:
    from openm3.ops.cache import Pool


def write_pages(k_TGH: Tensor, v_TGH: Tensor, index_k_TJ: Tensor | None, pool: Pool, slot_T: Tensor) -> None:
    native.loaded().write_pages(
        native.dense(k_TGH),
        native.dense(v_TGH),
        None if index_k_TJ is None else native.dense(index_k_TJ),
        pool.k_MGBH.detach(),
        pool.v_MGBH.detach(),
        None if pool.index_k_MBJ is None else pool.index_k_MBJ.detach(),
        slot_T,
        native.threads(),
    )


def supports(k_TGH: Tensor, v_TGH: Tensor, index_k_TJ: Tensor | None, pool: Pool, slot_T: Tensor) -> str | None:
    parts = [pool.k_MGBH, pool.v_MGBH, *([] if pool.index_k_MBJ is None else [pool.index_k_MBJ])]
    rows = [k_TGH, v_TGH, *([] if index_k_TJ is None else [index_k_TJ])]
    reason = native.refusal(*parts, *rows)
    if reason is None and any(part.shape[-1] > 1 and part.stride(-1) != 1 for part in parts):
        return "needs pools that are dense in their last axis"
    return reason
