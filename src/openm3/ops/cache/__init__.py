"""Writing a step's keys, values and index keys into the pages of a layer's pool.

`write_pages(k_TGH, v_TGH, index_k_TJ, pool, slot_T)` stores token t at `slot_T[t] = page * 128 + offset` of the pool,
in place, in the pool's dtype; slots are distinct. On the CPU ValueError names one outside the pool; elsewhere the host
does not look, and Triton's kernel stores nothing there. `index_k_TJ` and the pool's index part are None in layers
without a selection. Codes of the index keys, where the pool has them, are brought up to date for the pages written.

Keys and values may be stored as float8_e4m3fn, which keeps what is beyond its largest number, 448, as 448 of that sign,
and NaN as NaN.

`write_heads(heads, norms, rope, eps, pool, slot_T)` is what a layer of attention does with its projections:
`turn_heads` (the norm and rotation of `openm3.ops.norm`, for queries and keys, each with its weight), then
`write_pages`. It returns the queries.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from openm3.ops.cache import native, reference
from openm3.ops.dispatch import Implementation, Operator, always
from openm3.ops.index import IndexCodes, encode_pages
from openm3.ops.norm import norm_rotate
from openm3.ops.triton import implementation as in_triton


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


class Projections(NamedTuple):
    """What a layer's projections make of some tokens; the index parts are None in layers without a selection."""

    q_TNH: Tensor
    k_TGH: Tensor
    v_TGH: Tensor
    index_q_TGJ: Tensor | None = None
    index_k_TJ: Tensor | None = None


class HeadNorms(NamedTuple):
    """The weights of the norms that `Projections` go through."""

    q_H: Tensor
    k_H: Tensor
    index_q_J: Tensor | None = None
    index_k_J: Tensor | None = None


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
        in_triton("cache", "write_pages"),
        Implementation("reference", always, _reference),
    ),
)


def _turn_and_write(
    heads: Projections, norms: HeadNorms, rope: tuple[Tensor, Tensor], eps: float, pool: Pool, slot_T: Tensor
) -> tuple[Tensor, Tensor | None]:
    turned = turn_heads(heads, norms, rope, eps)
    WRITE_PAGES(turned.k_TGH, turned.v_TGH, turned.index_k_TJ, pool, slot_T)
    return turned.q_TNH, turned.index_q_TGJ


WRITE_HEADS = Operator(
    "write_heads",
    (
        Implementation("native", native.supports_heads, native.write_heads),
        in_triton("cache", "write_heads"),
        Implementation("reference", always, _turn_and_write),
    ),
)
OPERATORS = (WRITE_PAGES, WRITE_HEADS)


def write_pages(k_TGH: Tensor, v_TGH: Tensor, index_k_TJ: Tensor | None, pool: Pool, slot_T: Tensor) -> None:
    """Store each token's key, value and index key at its slot of the pool, in place."""
    _check(k_TGH, index_k_TJ, pool, slot_T)
    WRITE_PAGES(k_TGH, v_TGH, index_k_TJ, pool, slot_T)
    _encode(pool, slot_T)


def turn_heads(heads: Projections, norms: HeadNorms, rope: tuple[Tensor, Tensor], eps: float) -> Projections:
    """Queries and keys normed and rotated to their positions; `rope` is the rotary table of the tokens."""

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        assert weight is not None
        return norm_rotate(x, weight, *rope, eps)

    index_q_TGJ, index_k_TJ = heads.index_q_TGJ, heads.index_k_TJ
    return Projections(
        turned(heads.q_TNH, norms.q_H),
        turned(heads.k_TGH, norms.k_H),
        heads.v_TGH,
        None if index_q_TGJ is None else turned(index_q_TGJ, norms.index_q_J),
        None if index_k_TJ is None else turned(index_k_TJ[:, None], norms.index_k_J)[:, 0],
    )


def write_heads(
    heads: Projections, norms: HeadNorms, rope: tuple[Tensor, Tensor], eps: float, pool: Pool, slot_T: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Turn the heads and store the keys and values at their slots; returns `q_TNH` and `index_q_TGJ`."""
    _check(heads.k_TGH, heads.index_k_TJ, pool, slot_T)
    queries: tuple[Tensor, Tensor | None] = WRITE_HEADS(heads, norms, rope, eps, pool, slot_T)
    _encode(pool, slot_T)
    return queries


def _check(k_TGH: Tensor, index_k_TJ: Tensor | None, pool: Pool, slot_T: Tensor) -> None:
    if (index_k_TJ is None) != (pool.index_k_MBJ is None):
        raise ValueError("index keys and the pool's index part must be given together or not at all")
    if slot_T.shape != k_TGH.shape[:1]:
        raise ValueError(f"{k_TGH.shape[0]} tokens need as many slots, not {list(slot_T.shape)}")


def _encode(pool: Pool, slot_T: Tensor) -> None:
    if pool.codes is not None and pool.index_k_MBJ is not None:
        encode_pages(pool.index_k_MBJ, slot_T, pool.codes)
