"""Attention over the selected blocks of a paged cache, and over all of it in the dense layers.

`sparse_attention(q_TNH, k_MGBH, v_MGBH, page_RP, start_R1, length_R, block_TGK, scale=) -> out_TNH`

- Packed batch and positions as in `openm3.ops.index`. Token t of group g reads the causally visible tokens of the
  logical blocks `block_TGK[t, g]`; the N/G query heads of a group share them. Ids are distinct and in any order; -1
  and blocks after the token's own hold nothing.
- Softmax of `scale * q . k` in float32 whatever the inputs (float64 for float64), result in the dtype of q. A token
  with no visible key gives zeros. Slots without a visible token may hold anything, NaN included.
- Differentiable with respect to q, k and v. Memory grows with the sequence, never with its square.

`sparse_attention_lse` also returns the natural-log sum of exponentials `lse_TN` (float32, -inf without keys).
`dense_attention` is the same over every visible token, without `block_TGK`; selecting all blocks equals it.
"""

from __future__ import annotations

from torch import Tensor

from openm3.ops.attention import blocked, compiled, native, reference
from openm3.ops.dispatch import Implementation, Operator, always
from openm3.ops.index import check_batch
from openm3.ops.triton import implementation as in_triton


def _reference_sparse(*args: object) -> Tensor:
    return reference.sparse_attention(*args)[0]  # type: ignore[arg-type]


def _reference_dense(*args: object) -> Tensor:
    return reference.dense_attention(*args)[0]  # type: ignore[arg-type]


SPARSE = Operator(
    "sparse_attention",
    (
        Implementation("native", native.supports, native.sparse_attention),
        Implementation("blocked", blocked.supports, blocked.sparse_attention),
        in_triton("attention", "sparse_attention"),
        Implementation("reference", always, _reference_sparse),
        Implementation("compiled", compiled.supports, compiled.sparse_attention, opt_in=True),
    ),
)
SPARSE_LSE = Operator(
    "sparse_attention_lse",
    (
        Implementation("native", native.supports, native.sparse_attention_lse),
        in_triton("attention", "sparse_attention_lse"),
        Implementation("reference", always, reference.sparse_attention),
    ),
)
DENSE = Operator(
    "dense_attention",
    (
        Implementation("native", native.supports, native.dense_attention),
        Implementation("blocked", blocked.supports, blocked.dense_attention),
        in_triton("attention", "dense_attention"),
        Implementation("reference", always, _reference_dense),
        Implementation("compiled", compiled.supports, compiled.dense_attention, opt_in=True),
    ),
)
OPERATORS = (SPARSE, SPARSE_LSE, DENSE)


def sparse_attention(
    q_TNH: Tensor,
    k_MGBH: Tensor,
    v_MGBH: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    block_TGK: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Attention of each token over its selected blocks, [T, N, H]."""
    _check(q_TNH, k_MGBH, v_MGBH, page_RP, start_R1, length_R, block_TGK)
    out_TNH: Tensor = SPARSE(q_TNH, k_MGBH, v_MGBH, page_RP, start_R1, length_R, block_TGK, scale)
    return out_TNH


def sparse_attention_lse(
    q_TNH: Tensor,
    k_MGBH: Tensor,
    v_MGBH: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    block_TGK: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As `sparse_attention`, and the natural-log sum of exponentials [T, N]."""
    _check(q_TNH, k_MGBH, v_MGBH, page_RP, start_R1, length_R, block_TGK)
    both: tuple[Tensor, Tensor] = SPARSE_LSE(q_TNH, k_MGBH, v_MGBH, page_RP, start_R1, length_R, block_TGK, scale)
    return both


def dense_attention(
    q_TNH: Tensor,
    k_MGBH: Tensor,
    v_MGBH: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Causal attention of each token over its whole sequence, [T, N, H]."""
    _check(q_TNH, k_MGBH, v_MGBH, page_RP, start_R1, length_R, None)
    out_TNH: Tensor = DENSE(q_TNH, k_MGBH, v_MGBH, page_RP, start_R1, length_R, scale)
    return out_TNH


def _check(
    q_TNH: Tensor,
    k_MGBH: Tensor,
    v_MGBH: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    block_TGK: Tensor | None,
) -> None:
    if k_MGBH.ndim != 4 or k_MGBH.shape != v_MGBH.shape:
        raise ValueError(f"expected k and v [M, G, B, H], not {list(k_MGBH.shape)} and {list(v_MGBH.shape)}")
    _, groups, block_size, width = k_MGBH.shape
    if q_TNH.ndim != 3 or q_TNH.shape[2] != width or q_TNH.shape[1] % groups:
        raise ValueError(f"expected q [T, N, {width}] with N a multiple of {groups}, not {list(q_TNH.shape)}")
    if block_TGK is not None and block_TGK.shape[:2] != (q_TNH.shape[0], groups):
        raise ValueError(f"expected blocks [{q_TNH.shape[0]}, {groups}, K], not {list(block_TGK.shape)}")
    check_batch(q_TNH.shape[0], block_size, page_RP, start_R1, length_R)
