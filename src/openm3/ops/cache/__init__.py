"""Writing a step's keys, values and index keys into the pages of a layer's pool.

`write_pages(k_TGH, v_TGH, index_k_TJ, pool, slot_T)` stores token t at `slot_T[t] = page * 128 + offset` of the pool,
in place, in the pool's dtype; slots are distinct, and on the CPU ValueError names one outside the pool. `index_k_TJ`
and the pool's index part are None in layers without a selection. Codes of the index keys, where the pool has them, are
brought up to date for the pages written.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from openm3.ops.cache import native, reference
from openm3.ops.dispatch import Implementation, Operator, always
from openm3.ops.index import IndexCodes, encode_pages


class Pool(NamedTuple):
    """The pages of one layer: `k_MGBH`, `v_MGBH`, and `index_k_MBJ` (None without a selection).

    `codes` are those of the index keys, None where nothing scans them.
    """

    k_MGBH: Tensor
    v_MGBH: Tensor
    index_k_MBJ: Tensor | None
    codes: IndexCodes | None = None

    def tensors(self) -> list[Tensor]:
        """Every tensor that is there, always in the same order: the first axis of each counts pages."""
        return [x for x in (*self[:3], *(self.codes or ())) if x is not None]


def _reference(k_TGH: Tensor, v_TGH: Tensor, index_k_TJ: Tensor | None, pool: Pool, slot_T: Tensor) -> None:
    """The reference's scatter takes negative slots for others, and on other devices than the CPU checks cost a wait."""
    num_pages, _, block = pool.k_MGBH.shape[:3]
    if slot_T.device.type == "cpu":
        bad = slot_T[(slot_T < 0) | (slot_T >= num_pages * block)].tolist()
        if bad:
            raise ValueError(f"slot {bad[0]} is outside the pool of {num_pages} pages of {block} tokens")
    reference.write_pages(k_TGH, v_TGH, index_k_TJ, pool, slot_T)


WRITE_PAGES = Operator(
    "write_pages",
    (
        Implementation("native", native.supports, native.write_pages),
        Implementation("reference", always, _reference),
    ),
)
OPERATORS = (WRITE_PAGES,)


def write_pages(k_TGH: Tensor, v_TGH: Tensor, index_k_TJ: Tensor | None, pool: Pool, slot_T: Tensor) -> None:
    """Store each token's key, value and index key at its slot of the pool, in place."""
    if (index_k_TJ is None) != (pool.index_k_MBJ is None):
        raise ValueError("index keys and the pool's index part must be given together or not at all")
    if slot_T.shape != k_TGH.shape[:1]:
        raise ValueError(f"{k_TGH.shape[0]} tokens need as many slots, not {list(slot_T.shape)}")
    WRITE_PAGES(k_TGH, v_TGH, index_k_TJ, pool, slot_T)
    if pool.codes is not None and pool.index_k_MBJ is not None:
        encode_pages(pool.index_k_MBJ, slot_T, pool.codes)
