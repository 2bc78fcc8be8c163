"""Writing a step's keys, values and index keys into the pages of a layer's pool.

`write_pages(k_TGH, v_TGH, index_k_TJ, pool, slot_T)` stores token t at `slot_T[t] = page * 128 + offset` of the pool,
in place, in the pool's dtype; slots are distinct. `index_k_TJ` and the pool's index part are None in layers without a
selection.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from openm3.ops.cache import reference
from openm3.ops.dispatch import Implementation, Operator, always


class Pool(NamedTuple):
    """The pages of one layer: `k_MGBH`, `v_MGBH`, and `index_k_MBJ` (None without a selection)."""

    k_MGBH: Tensor
    v_MGBH: Tensor
    index_k_MBJ: Tensor | None


WRITE_PAGES = Operator("write_pages", (Implementation("reference", always, reference.write_pages),))
OPERATORS = (WRITE_PAGES,)


def write_pages(k_TGH: Tensor, v_TGH: Tensor, index_k_TJ: Tensor | None, pool: Pool, slot_T: Tensor) -> None:
    """Store each token's key, value and index key at its slot of the pool, in place."""
    if (index_k_TJ is None) != (pool.index_k_MBJ is None):
        raise ValueError("index keys and the pool's index part must be given together or not at all")
    if slot_T.shape != k_TGH.shape[:1]:
        raise ValueError(f"{k_TGH.shape[0]} tokens need as many slots, not {list(slot_T.shape)}")
    if slot_T.device.type == "cpu" and bool((slot_T < 0).any()):
        raise ValueError(f"slots must not be negative, as {int(slot_T.min())} is")
    WRITE_PAGES(k_TGH, v_TGH, index_k_TJ, pool, slot_T)
