"""Page writes, as defined: one scatter a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from openm3.ops.cache import Pool


def write_pages(k_TGH: Tensor, v_TGH: Tensor, index_k_TJ: Tensor | None, pool: Pool, slot_T: Tensor) -> None:
    block = pool.k_MGBH.shape[2]
    page_T, offset_T = slot_T // block, slot_T % block
    pool.k_MGBH[page_T, :, offset_T] = _stored(k_TGH, pool.k_MGBH.dtype)
    pool.v_MGBH[page_T, :, offset_T] = _stored(v_TGH, pool.v_MGBH.dtype)
    if pool.index_k_MBJ is not None and index_k_TJ is not None:
        pool.index_k_MBJ[page_T, offset_T] = index_k_TJ.to(pool.index_k_MBJ.dtype)


def _stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """PyTorch makes NaN of what eight bits cannot hold."""
    if dtype == torch.float8_e4m3fn:
        most = torch.finfo(dtype).max
        x = x.clamp(-most, most)
    return x.to(dtype)
