"""Block selection in Triton: scores of blocks, the few that can be among the best of each row, the best K of those.

A row is a token and a group. With many rows a request, scores come from the keys through tensor cores. With few,
reading is what takes time: where there are codes of rows (int8) they are scanned, for brackets of the scores, and only
blocks that might be selected are scored from their keys. Shapes say which of the two runs; both select the same.

Scores go through a workspace of a bounded size, a chunk of tokens at a time. Every number is computed by one program in
one order, and the order among blocks is total, so equal inputs give equal selections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
from torch import Tensor

from openm3.ops.index.triton_choice import gather_candidates, take_best
from openm3.ops.index.triton_codes import encode_touched
from openm3.ops.index.triton_scan import scan_codes, scan_keys, score_candidates
from openm3.ops.triton import Machine, machine, padded, refusal

if TYPE_CHECKING:
    from openm3.ops.index import IndexCodes

WORKSPACE = 1 << 26
"""Numbers of four bytes held at a time, 256 MiB: what a million tokens need before 4096 tokens of one group."""

WIDEST = 256
"""The widest index keys whose tiles fit, and whose codes' products fit 32 bits."""

FEW_ROWS = 64
"""Up to here a page takes longer to read than to multiply, its codes with two digits included. Not measured yet.

On an H200 a multiprocessor reads 16 KiB in 0.5 us, in which it multiplies them with 90 rows of two digits.
"""

LEAST_ROWS = 16
"""Rows of the smallest tile: a warpgroup's instructions take 8, Triton's products 16."""


class Batch(NamedTuple):
    """Queries, the pool of keys that they choose from, and which keys belong to whom."""

    index_q_TGJ: Tensor
    index_k_MBJ: Tensor
    page_RP: Tensor
    start_R1: Tensor
    length_R: Tensor


class Workspace(NamedTuple):
    """For X rows: between what the score of each block lies, the blocks that may be selected, and how many they are.

    Where scores are known `low_XP` and `high_XP` are one tensor. Candidates fill the first `count_X` places of a row.
    """

    low_XP: Tensor
    high_XP: Tensor
    candidate_XP: Tensor
    count_X: Tensor


@dataclass(frozen=True)
class ScanTiles:
    """A program scans `split` blocks for `rows` pairs of token and group, of up to `tokens` tokens."""

    tokens: int
    rows: int
    split: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ChoiceTiles:
    """A program looks at `depth` x `groups` scores of each of `rows` rows at once, or at `candidates` of them."""

    rows: int
    depth: int
    groups: int
    num_warps: int
    candidates: int = 128


def scan_tiles(
    num_tokens: int, num_requests: int, num_groups: int, num_blocks: int, page_bytes: int, wide: bool, machine: Machine
) -> ScanTiles:
    """Tiles for queries of whole requests; `wide` says that numbers take four bytes. Not measured yet.

    With few rows a multiprocessor's programs, all there at once, have two pages on their way each: 64 KiB in flight
    hide an H200's latency. With many, 128 rows halve the passes over the keys, and eight programs a multiprocessor even
    out ragged batches. Four pages at least pay for loading the queries. Float32 has no tensor cores here: its products
    are unrolled, which takes the compiler minutes from 64 rows on.
    """
    each = -(-num_tokens // num_requests)
    few = wide or each * num_groups <= FEW_ROWS
    rows = max(padded(num_groups), min(padded(each * num_groups, least=LEAST_ROWS), 32 if wide else 128))
    tokens = rows // num_groups
    resident = 4 if few and page_bytes <= 16 << 10 else 2
    programs = (resident if few else 8) * machine.processors
    split = -(-num_blocks * num_requests * -(-each // tokens) // programs)
    # Triton takes two stages for each page that it reads ahead: one for its number in the table.
    ahead = min(max(machine.shared_bytes // resident // page_bytes - (1 if few else 2), 1), 2)
    return ScanTiles(tokens, rows, min(max(split, 4), 64), 4 if few and not wide else 8, 2 * ahead + 1)


def choice_tiles(num_rows: int, num_blocks: int, num_selected: int, machine: Machine) -> ChoiceTiles:
    """Sixteen scores a thread; enough groups that two of the best blocks seldom share one. Not measured yet.

    A row's candidates are a warp's share.
    """
    groups = min(padded(num_blocks, least=32), max(256, 4 * padded(num_selected)))
    depth = min(padded(-(-num_blocks // groups)), max(4096 // groups, 1))
    rows = min(max(4096 // (depth * groups), 1), 32, padded(-(-num_rows // (8 * machine.processors))))
    return ChoiceTiles(rows, depth, groups, min(max(rows * depth * groups // 512, 1), 8))


def supports_select_blocks(
    index_q_TGJ: Tensor,
    index_k_MBJ: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    num_selected: int,
    num_local: int,
    codes: IndexCodes | None = None,
) -> str | None:
    if reason := refusal(index_q_TGJ, index_k_MBJ):
        return reason
    if index_q_TGJ.dtype != index_k_MBJ.dtype:
        return f"takes queries and keys of one dtype, not {index_q_TGJ.dtype} and {index_k_MBJ.dtype}"
    return _too_wide(index_k_MBJ)


def supports_encode_pages(index_k_MBJ: Tensor, slot_T: Tensor, codes: IndexCodes) -> str | None:
    if reason := refusal(index_k_MBJ) or _too_wide(index_k_MBJ):
        return reason
    return None if _readable(codes) else "makes codes of rows (int8), not of tiles (uint8)"


def encode_pages(index_k_MBJ: Tensor, slot_T: Tensor, codes: IndexCodes) -> None:
    """Slots outside the pool are passed over, as where pages are written."""
    num_pages, block_size, width = index_k_MBJ.shape
    if slot_T.shape[0] == 0:
        return
    row = _row_bytes(codes, index_k_MBJ)
    encode_touched[(slot_T.shape[0],)](
        *(index_k_MBJ, slot_T, *codes, num_pages * block_size, slot_T.stride(0), *index_k_MBJ.stride()),
        B=block_size,
        J=width,
        ROW=row,
        SLOTS=padded(block_size),
        WIDTH=padded(row),
        num_warps=8,
    )


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
    (num_tokens, num_groups, _), (num_requests, num_blocks) = index_q_TGJ.shape, page_RP.shape
    block_TGK = index_q_TGJ.new_empty((num_tokens, num_groups, num_selected), dtype=torch.int32)
    if num_tokens == 0:
        return block_TGK
    batch = Batch(index_q_TGJ, index_k_MBJ, page_RP, start_R1.contiguous(), length_R.contiguous())
    if not _readable(codes) or num_tokens * num_groups > FEW_ROWS * num_requests:
        codes = None
    # Rows begin at multiples of 64 bytes, so that their loads are as wide as the device has them.
    stride = -(-num_blocks // 16) * 16
    chunk = min(num_tokens, max(1, WORKSPACE // (num_groups * stride * (2 if codes is None else 3))))
    low_XP = torch.empty((chunk * num_groups, stride), dtype=torch.float32, device=index_q_TGJ.device)
    high_XP = low_XP if codes is None else torch.empty_like(low_XP)
    candidate_XP = torch.empty_like(low_XP, dtype=torch.int32)
    work = Workspace(low_XP, high_XP, candidate_XP, candidate_XP.new_empty(chunk * num_groups))
    for first in range(0, num_tokens, chunk):
        last = min(first + chunk, num_tokens)
        _scan(batch, codes, work, first, last, num_local)
        _choose(batch, codes, work, first, last, num_local, block_TGK)
    return block_TGK


def _scan(batch: Batch, codes: IndexCodes | None, work: Workspace, first: int, last: int, num_local: int) -> None:
    """Scores, or brackets of scores, of all blocks for the tokens from `first` to `last`."""
    (num_tokens, num_groups, width), (_, block_size, _) = batch.index_q_TGJ.shape, batch.index_k_MBJ.shape
    num_requests, num_blocks = batch.page_RP.shape
    itemsize, row = batch.index_k_MBJ.element_size(), width
    if codes is not None:
        itemsize, row = 1, _row_bytes(codes, batch.index_k_MBJ)
    # Products of bytes are summed 32 at a time.
    slots, row_padded = padded(block_size, least=16), padded(row, least=32 if codes else 16)
    tiles = scan_tiles(
        *(num_tokens, num_requests, num_groups, num_blocks, slots * row_padded * itemsize),
        *(batch.index_k_MBJ.dtype == torch.float32 and codes is None, machine(batch.index_q_TGJ.device)),
    )
    grid = ((last - first) // tiles.tokens + num_requests, triton.cdiv(num_blocks, tiles.split))
    spread = (first, last, num_requests, tiles.split, work.low_XP.stride(0))
    if codes is None:
        scan_keys[grid](
            *(*batch, work.low_XP, *spread),
            *(*batch.index_q_TGJ.stride(), *batch.index_k_MBJ.stride(), *batch.page_RP.stride()),
            G=num_groups,
            B=block_size,
            J=width,
            LOCAL=num_local,
            TOKENS=tiles.tokens,
            ROWS=tiles.rows,
            SLOTS=slots,
            WIDTH=row_padded,
            KEYS_FIRST=tiles.rows <= FEW_ROWS,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    else:
        scan_codes[grid](
            *(batch.index_q_TGJ, *codes, *batch[2:], work.low_XP, work.high_XP, *spread),
            *(*batch.index_q_TGJ.stride(), *batch.page_RP.stride()),
            G=num_groups,
            B=block_size,
            J=width,
            LOCAL=num_local,
            TOKENS=tiles.tokens,
            ROWS=tiles.rows,
            ROW=row,
            SLOTS=slots,
            WIDTH=row_padded,
            BLOCKS=padded(tiles.split),
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )


def _choose(
    batch: Batch,
    codes: IndexCodes | None,
    work: Workspace,
    first: int,
    last: int,
    num_local: int,
    block_TGK: Tensor,
) -> None:
    """The best blocks for the tokens from `first` to `last`, from what `_scan` found."""
    (_, num_groups, num_selected), (num_requests, num_blocks) = block_TGK.shape, batch.page_RP.shape
    block_size, width = batch.index_k_MBJ.shape[1:]
    num_rows, gpu = (last - first) * num_groups, machine(block_TGK.device)
    tiles = choice_tiles(work.low_XP.shape[0], num_blocks, num_selected, gpu)
    grid = (triton.cdiv(num_rows, tiles.rows),)
    among = (first, num_rows, num_requests, num_requests.bit_length(), work.low_XP.stride(0))
    gather_candidates[grid](
        *(work.low_XP, work.high_XP, batch.start_R1, batch.length_R, work.candidate_XP, work.count_X, *among),
        G=num_groups,
        B=block_size,
        K=num_selected,
        LOCAL=num_local,
        ROWS=tiles.rows,
        DEPTH=tiles.depth,
        GROUPS=tiles.groups,
        num_warps=tiles.num_warps,
    )
    if codes is not None:
        wide = batch.index_k_MBJ.dtype == torch.float32
        programs = min(max(1, 16 * gpu.processors // num_rows), num_blocks, 128)
        score_candidates[(num_rows, programs)](
            *(*batch[:4], work.candidate_XP, work.count_X, work.low_XP, *among),
            *(*batch.index_q_TGJ.stride(), *batch.index_k_MBJ.stride(), *batch.page_RP.stride()),
            G=num_groups,
            B=block_size,
            J=width,
            K=num_selected,
            ROWS=LEAST_ROWS,
            SLOTS=padded(block_size, least=16),
            WIDTH=padded(width, least=16),
            num_warps=8 if wide else 4,
            num_stages=3,
        )
    take_best[grid](
        *(work.low_XP, work.candidate_XP, work.count_X, batch.start_R1, batch.length_R, block_TGK, *among),
        G=num_groups,
        B=block_size,
        K=num_selected,
        LOCAL=num_local,
        ROWS=tiles.rows,
        SLOTS=padded(num_selected),
        AT_ONCE=tiles.candidates,
        num_warps=min(tiles.rows, 8),
    )


def _too_wide(index_k_MBJ: Tensor) -> str | None:
    width = index_k_MBJ.shape[2]
    return None if width <= WIDEST else f"takes index keys of up to {WIDEST} numbers, not {width}"


def _readable(codes: IndexCodes | None) -> bool:
    return codes is not None and codes.code_MC.dtype == torch.int8


def _row_bytes(codes: IndexCodes, index_k_MBJ: Tensor) -> int:
    """Bytes of a key's codes. Raises ValueError where the codes are not those of the pool."""
    num_pages, block_size, width = index_k_MBJ.shape
    row = -(-width // 16) * 16
    code_MC, bound_M3 = codes
    if code_MC.shape != (num_pages, block_size * row) or bound_M3.shape != (num_pages, 3):
        both = f"{list(code_MC.shape)} and {list(bound_M3.shape)}"
        raise ValueError(f"codes and bounds of {both} are not those of a pool of {list(index_k_MBJ.shape)}")
    assert code_MC.is_contiguous() and bound_M3.is_contiguous()
    return row
