"""Page writes, as defined: one scatter a tensor."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def write_pages(
    k_TGH: Tensor, v_TGH: Tensor, index_k_TJ: Tensor | None, pool: Sequence[Tensor | None], slot_T: Tensor
) -> None:
    k_MGBH, v_MGBH, index_k_MBJ = pool
    assert k_MGBH is not None and v_MGBH is not None
    block = k_MGBH.shape[2]
    page_T, offset_T = slot_T // block, slot_T % block
    k_MGBH[page_T, :, offset_T] = k_TGH.to(k_MGBH.dtype)
    v_MGBH[page_T, :, offset_T] = v_TGH.to(v_MGBH.dtype)
    if index_k_MBJ is not None and index_k_TJ is not None:
        index_k_MBJ[page_T, offset_T] = index_k_TJ.to(index_k_MBJ.dtype)
