"""The index branch of sparse attention: score 128-token blocks for each token and KV group, keep the best K.

`select_blocks(index_q_TGJ, index_k_MBJ, page_RP, start_R1, length_R, num_selected=16, num_local=1) -> block_TGK`

- Packed batch: request r owns tokens `start_R1[r]:start_R1[r+1]`; `length_R[r]` is its whole key length, these tokens
  included, so its token i stands at position `length_R[r] - (start_R1[r+1] - start_R1[r]) + i`. `page_RP` maps its
  logical blocks to pages of the pool.
- The score of a block is the largest `index_q . index_k` over its causally visible tokens: stored values, float32 sums,
  no scale, no ReLU, no head weights. NaN counts as -inf.
- The token's own block and the `num_local - 1` before it are always taken and use slots of K. Then by score descending,
  equal scores by smaller block. Fewer than K visible: all of them.
- The result (int32) holds logical blocks, ascending, -1 at the tail.

`encode_pages(index_k_MBJ, slot_T, codes)` keeps `IndexCodes` true to slots just written. A selection that is given them
scans a byte a number instead of two or four; what it selects does not depend on them. `native.counted` is the same call
and says what it took: blocks scanned and rescored, bytes, operations.

`block_scores(...) -> score_TGP` is the same score, materialised, for tools and tests (-inf where nothing is visible).

Source: MiniMax Sparse Attention, equations 6 and 7; the order among equals is ours.
"""

from __future__ import annotations

from operator import le, sub
from typing import NamedTuple

import torch
from torch import Tensor

from openm3.ops.dispatch import Implementation, Operator, always
from openm3.ops.index import blocked, native, reference
from openm3.ops.native import blank, missing
from openm3.ops.triton import implementation as in_triton
from openm3.ops.triton import refused_device

CPU = torch.device("cpu")


class IndexCodes(NamedTuple):
    """Index keys in one byte a number, and how far off that is at most, page by page.

    The dtype of `code_MC` says how a page lies in its C bytes, as whoever scans it wants it:

    - uint8, for CPUs: tiles of 16 keys x 4 numbers, biased by 128, the keys made up to a multiple of 4 numbers;
    - int8, for Triton: a row for each key, made up with zeros to a multiple of 16 numbers.

    `bound_M3` (float32) holds the page's scale, the largest norm of what its codes lose, and the largest norm of its
    coded keys. An infinite bound says that nothing is known.
    """

    code_MC: Tensor
    bound_M3: Tensor


SELECT_BLOCKS = Operator(
    "select_blocks",
    (
        Implementation("native", native.supports, native.select_blocks),
        in_triton("index", "select_blocks"),
        Implementation("blocked", blocked.supports, blocked.select_blocks),
        Implementation("reference", always, reference.select_blocks),
    ),
)
BLOCK_SCORES = Operator("block_scores", (Implementation("reference", always, reference.block_scores),))
ENCODE_PAGES = Operator(
    "encode_pages",
    (
        Implementation("native", native.supports_encoding, native.encode_pages),
        in_triton("index", "encode_pages"),
        Implementation("reference", always, reference.encode_pages),
    ),
)
OPERATORS = (SELECT_BLOCKS, BLOCK_SCORES, ENCODE_PAGES)


def select_blocks(
    index_q_TGJ: Tensor,
    index_k_MBJ: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    *,
    num_selected: int = 16,
    num_local: int = 1,
    codes: IndexCodes | None = None,
) -> Tensor:
    """The K blocks each token and group attends to: `block_TGK`, int32, ascending, -1 at the tail."""
    _check(index_q_TGJ, index_k_MBJ, page_RP, start_R1, length_R)
    if not 0 < num_local <= num_selected:
        raise ValueError(f"num_local must be between 1 and num_selected {num_selected}, not {num_local}")
    queries_and_keys = index_q_TGJ.detach(), index_k_MBJ.detach()
    block_TGK: Tensor = SELECT_BLOCKS(*queries_and_keys, page_RP, start_R1, length_R, num_selected, num_local, codes)
    return block_TGK


def new_codes(index_k_MBJ: Tensor) -> IndexCodes | None:
    """Codes of a fresh pool, None where nothing would scan them. Whoever writes pages keeps them true."""
    codes = empty_codes(index_k_MBJ)
    slot_T = torch.zeros(0, dtype=torch.long, device=index_k_MBJ.device)
    return None if ENCODE_PAGES.choose(index_k_MBJ, slot_T, codes).name == "reference" else codes


def empty_codes(index_k_MBJ: Tensor) -> IndexCodes:
    """Codes that know nothing of these pages yet, as implementations for their device keep them."""
    (pages, block_size, width), device = index_k_MBJ.shape, index_k_MBJ.device
    unknown = torch.tensor([0.0, torch.inf, 0.0], device=device)
    if refused_device(index_k_MBJ) is None:
        code_MC = torch.zeros((pages, block_size * -(-width // 16) * 16), dtype=torch.int8, device=device)
    else:
        code_MC = blank((pages, block_size * -(-width // 4) * 4), torch.uint8, device)
    return IndexCodes(code_MC, unknown.repeat(pages, 1))


def code_bytes(block_size: int, width: int, device: torch.device = CPU) -> int:
    """What the codes of one page take on a device, 0 where there are none."""
    if device.type == "cuda":
        return block_size * -(-width // 16) * 16 + 12
    return 0 if missing() is not None else block_size * -(-width // 4) * 4 + 12


def encode_pages(index_k_MBJ: Tensor, slot_T: Tensor, codes: IndexCodes) -> None:
    """Bring the codes up to what the pages that hold these slots (`page * block size + offset`) hold now, in place.

    Of a page with a single slot here, not its first or last, only that key need be looked at: the codes must be true of
    the others.
    """
    ENCODE_PAGES(index_k_MBJ, slot_T, codes)


def block_scores(
    index_q_TGJ: Tensor, index_k_MBJ: Tensor, page_RP: Tensor, start_R1: Tensor, length_R: Tensor
) -> Tensor:
    """The score of every block, `score_TGP` (float32), -inf where a token sees nothing."""
    _check(index_q_TGJ, index_k_MBJ, page_RP, start_R1, length_R)
    score_TGP: Tensor = BLOCK_SCORES(index_q_TGJ, index_k_MBJ, page_RP, start_R1, length_R)
    return score_TGP


def _check(index_q_TGJ: Tensor, index_k_MBJ: Tensor, page_RP: Tensor, start_R1: Tensor, length_R: Tensor) -> None:
    if index_q_TGJ.ndim != 3 or index_k_MBJ.ndim != 3 or index_q_TGJ.shape[2] != index_k_MBJ.shape[2]:
        both = f"{list(index_q_TGJ.shape)} and {list(index_k_MBJ.shape)}"
        raise ValueError(f"expected index_q [T, G, J] and index_k [M, B, J], not {both}")
    check_batch(index_q_TGJ.shape[0], index_k_MBJ.shape[1], page_RP, start_R1, length_R)


def check_batch(num_tokens: int, block_size: int, page_RP: Tensor, start_R1: Tensor, length_R: Tensor) -> None:
    """Raise ValueError unless the packed batch is consistent. Values on an accelerator are not looked at."""
    requests = length_R.shape[0]
    if page_RP.ndim != 2 or page_RP.shape[0] != requests or start_R1.shape != (requests + 1,):
        raise ValueError(
            f"{requests} requests need page_RP [{requests}, P] and start_R1 [{requests + 1}], "
            f"not {list(page_RP.shape)} and {list(start_R1.shape)}"
        )
    if start_R1.device.type != "cpu":
        return
    starts, lengths, capacity = start_R1.tolist(), length_R.tolist(), page_RP.shape[1] * block_size
    counts = list(map(sub, starts[1:], starts))
    right = starts[0] == 0 and starts[-1] == num_tokens and min(counts, default=0) >= 0
    if right and all(map(le, counts, lengths)) and max(lengths, default=0) <= capacity:
        return
    if starts[0] != 0 or starts[-1] != num_tokens:
        raise ValueError(f"start_R1 must go from 0 to the {num_tokens} tokens given, not {starts[0]} to {starts[-1]}")
    for r, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        if not 0 <= count <= length:
            raise ValueError(f"request {r} has {count} tokens in this step, but a key length of {length}")
        if length > capacity:
            raise ValueError(f"request {r} has {length} keys, more than its {page_RP.shape[1]} pages hold")
