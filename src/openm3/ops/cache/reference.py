"""Page writes, as defined: one scatter a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from openm3.ops.cache import Pool


def write_pages(k_TGH: Tensor, v_TGH: Tensor, index_k_TJ: Tensor | None, pool: Pool, slot_T: Tensor) -> None:
    block = pool.k_MGBH.shape[2]
    page_T, offset_T = slot_T // block, slot_T % block
    pool.k_MGBH[page_T, :, offset_T] = k_TGH.to(pool.k_MGBH.dtype)
    pool.v_MGBH[page_T, :, offset_T] = v_TGH.to(pool.v_MGBH.dtype)
    if pool.index_k_MBJ is not None and index_k_TJ is not None:
        pool.index_k_MBJ[page_T, offset_T] = index_k_TJ.to(pool.index_k_MBJ.dtype)
