"""Block selection in native code: a certified scan of int8 codes. Source: cpu.cpp beside this file."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from openm3.ops import native

if TYPE_CHECKING:
    from openm3.ops.index import IndexCodes

TILE = 16
"""Codes lie in tiles of 16 keys, so blocks are made of whole tiles."""


class Statistics(NamedTuple):
    """What one call did, over all tokens and groups: blocks scanned by their codes, blocks and keys scored exactly.

    `nbytes` is what was read, codes once for all tokens read together; `operations` are multiplications and additions.
    """

    scanned_blocks: int
    rescored_blocks: int
    rescored_keys: int
    nbytes: int
    operations: int


def select_blocks(
    index_q_TGJ: Tensor,
    index_k_MBJ: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    num_selected: int,
    num_local: int,
    codes: IndexCodes | None = None,
) -> Tensor:
    return counted(index_q_TGJ, index_k_MBJ, page_RP, start_R1, length_R, num_selected, num_local, codes)[0]


def counted(
    index_q_TGJ: Tensor,
    index_k_MBJ: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    num_selected: int,
    num_local: int,
    codes: IndexCodes | None = None,
) -> tuple[Tensor, Statistics]:
    """The selection, and what it took."""
    block_TGK = torch.empty((*index_q_TGJ.shape[:2], num_selected), dtype=torch.int32)
    code_MC, bound_M3 = (None, None) if codes is None else codes
    block_size, width = index_k_MBJ.shape[1:]
    scanned, blocks, keys, nbytes = native.loaded().select_blocks(
        native.dense(index_q_TGJ),
        native.dense(index_k_MBJ),
        code_MC,
        bound_M3,
        native.table(page_RP),
        start_R1,
        length_R,
        num_selected,
        num_local,
        block_TGK,
        native.threads(),
    )
    nbytes += keys * width * index_k_MBJ.itemsize
    return block_TGK, Statistics(scanned, blocks, keys, nbytes, 2 * width * (scanned * block_size + keys))


def encode_pages(index_k_MBJ: Tensor, slot_T: Tensor, codes: IndexCodes) -> None:
    native.loaded().encode_pages(native.dense(index_k_MBJ), slot_T, *codes, native.threads())


def supports(
    index_q_TGJ: Tensor,
    index_k_MBJ: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    num_selected: int,
    num_local: int,
    codes: IndexCodes | None = None,
) -> str | None:
    return native.refusal(index_q_TGJ, index_k_MBJ) or _whole_tiles(index_k_MBJ) or _own_layout(codes)


def supports_encoding(index_k_MBJ: Tensor, slot_T: Tensor, codes: IndexCodes) -> str | None:
    return native.refusal(index_k_MBJ) or _whole_tiles(index_k_MBJ) or _own_layout(codes)


def _whole_tiles(index_k_MBJ: Tensor) -> str | None:
    if index_k_MBJ.shape[1] % TILE:
        return f"needs blocks of a multiple of {TILE} tokens, not {index_k_MBJ.shape[1]}"
    return None


def _own_layout(codes: IndexCodes | None) -> str | None:
    if codes is None or codes.code_MC.dtype == torch.uint8:
        return None
    return f"takes codes in tiles (uint8), not {str(codes.code_MC.dtype).removeprefix('torch.')}"
