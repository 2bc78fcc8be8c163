"""Attention in Triton, for every CUDA GPU.

Three ways. Tiles of neighbouring tokens, all query heads of a group beside each other, walk the union of their tokens'
blocks (`triton_tiles`); where tokens side by side choose blocks far apart but share them with others of their request,
those who chose a block meet it together instead (`triton_scattered`). Requests of a few tokens (decode, verify) have
too few tiles to fill a machine: there each token's blocks are split over programs (`triton_splits`).

What else is in the batch changes no bit: the way of a request's tokens, and the order and grouping of their sums,
depend on that request alone, neither the size of a tile nor the number of programs has part in them. Two decisions
follow from shapes instead. Where long requests scatter, what a tile is: half as large in batches of few tokens. And a
request of many tokens counts as short in a batch with as many requests as tokens, of which others then are empty.

Nothing here waits for the device: grids follow from shapes, and programs find their request by themselves. Operands
stay in the dtype that came in, 8-bit keys and values take that of the queries, sums and softmax are float32, and
weights are rounded to the operands' dtype between the two products. Tokens that belong to no request (a captured step
may have some at its end) get zeros.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openm3.ops.attention import triton_scattered, triton_splits, triton_tiles
from openm3.ops.attention.triton_call import WORKSPACE, Call, Tile
from openm3.ops.attention.triton_scattered import Scattering
from openm3.ops.attention.triton_splits import Split
from openm3.ops.triton import Machine, machine, padded, refusal

FEW_TOKENS = 8
"""Requests of up to so many tokens split each token's blocks over programs."""

FOLDED = 8
"""Parts of a token's keys that are folded into one result before results are added up, whoever folds them."""

MAX_HEADS = 128
MAX_WIDTH = 256
MAX_SELECTED = 4096


def choose_tile(
    heads: int,
    width: int,
    block_size: int,
    num_selected: int | None,
    lines: int,
    itemsize: int,
    stored_itemsize: int,
    machine: Machine,
) -> Tile:
    """The tile of long requests, where there are `lines` tokens x groups; `num_selected` is None in dense layers.

    `itemsize` is that of the products' operands, `stored_itemsize` that of the keys as they are stored.

    Not yet measured on a device. 128 rows of 16 bits give each of Hopper's two warpgroups a product of 64 rows; fewer
    rows would ask more of the second-level cache than it gives (64 KiB a block for 4.2 MFLOP), unless there are fewer
    tiles than multiprocessors. Two programs share a multiprocessor, so that one multiplies while the other takes
    exponents: they have 128 registers a thread each, which without spills is enough for 32 keys a step (64 keys spill
    48 bytes, and each product waits for the one before; one program with 190 registers has nobody to overlap with). In
    float32 products hold their operands in registers.
    """
    tokens = max(1, 256 // itemsize // padded(heads))
    if lines < tokens * machine.processors and tokens > 1:
        tokens //= 2
    if num_selected is not None:
        # A union's members are the bits of an int32, and it is collected in registers.
        tokens = min(tokens, 32, max(1, MAX_SELECTED // padded(num_selected)))
    head_rows, padded_width = padded(heads, -(-16 // tokens)), padded(width, 16)
    keys = min(block_size, 128, max(16, (8 << 10) // (padded_width * itemsize)))
    query_bytes, step_bytes = tokens * head_rows * padded_width * itemsize, 2 * keys * padded_width * stored_itemsize
    stages, paired = _stages(step_bytes, query_bytes, machine)
    warps = 8 if tokens * head_rows * itemsize >= 256 else 4
    limited = paired and warps == 8 and itemsize == 2 and padded_width <= 128
    return Tile(tokens, head_rows, keys, padded_width, warps, stages, registers=128 if limited else None)


def choose_split(
    heads: int,
    width: int,
    block_size: int,
    num_selected: int | None,
    num_blocks: int,
    lines: int,
    itemsize: int,
    stored_itemsize: int,
    machine: Machine,
) -> Split:
    """The split of one token's keys, where there are `lines` tokens x groups; the rest as in `choose_tile`.

    Not yet measured on a device. In M3 a part is 64 keys and values of 32 KiB, two of which are under way in each of
    the two programs that a multiprocessor holds. 4 blocks a program leave 8 KiB to merge for 256 KiB read; where that
    makes too few programs to fill the machine each part gets its own, and the merge folds them as they would have.
    In dense layers the number of splits, and so the room for their results, has an end.
    """
    padded_width = padded(width, 16)
    keys = min(block_size, 128, max(16, (16 << 10) // (padded_width * itemsize)))
    stages, _ = _stages(2 * keys * padded_width * stored_itemsize, 0, machine)
    tile = Tile(1, padded(heads, 16), keys, padded_width, 8 if heads * itemsize > 128 else 4, stages)
    parts_a_block = block_size // tile.keys
    if num_selected is None:
        return Split(tile, parts=4, splits=min(128, max(1, -(-num_blocks * parts_a_block // 4))), folded=1)
    parts = max(1, num_selected * parts_a_block)
    splits = -(-parts // FOLDED)
    if 4 * lines * splits >= 3 * machine.processors:
        return Split(tile, parts=FOLDED, splits=splits, folded=1)
    return Split(tile, parts=1, splits=parts, folded=FOLDED)


def choose_scattering(
    tile: Tile,
    heads: int,
    width: int,
    num_selected: int,
    num_blocks: int,
    num_tokens: int,
    itemsize: int,
    machine: Machine,
) -> Scattering | None:
    """Which tiles of a batch do not walk; None if none of its size ever can. `itemsize` is that of the output.

    Not yet measured on a device. Of a union of u blocks a walk makes u steps. By page, a tile's share is K / 8 times
    its tokens, and half as much again where a page is chosen 8 times (only the last item of a page is not full); a step
    there costs about twice as much, since every row's result is written and read again. So 3 K is where both are even.
    """
    most, shared = 3 * num_selected, 8
    if tile.tokens <= 3 or num_blocks <= most or num_tokens * num_selected < shared * (most + 1):
        return None
    tiles = WORKSPACE // (tile.tokens * num_selected * heads * (width * itemsize + 4))
    return Scattering(most, shared, max(1, tiles), programs=2 * machine.processors)


def _stages(step_bytes: int, other_bytes: int, machine: Machine) -> tuple[int, bool]:
    """Steps under way and at work, and whether shared memory then holds two programs.

    64 KiB are to be under way, in not more than four steps. Without any there would be nothing to gain from a second
    program.
    """
    for programs in (2, 1):
        room = machine.shared_bytes // programs - other_bytes - (2 << 10)
        stages = min(1 + (64 << 10) // step_bytes, 5, room // step_bytes)
        if stages > 1:
            return stages, programs == 2
    return 1, False


def sparse_attention(
    q_TNH: Tensor,
    k_MGBH: Tensor,
    v_MGBH: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    block_TGK: Tensor,
    scale: float,
) -> Tensor:
    return _attend(q_TNH, k_MGBH, v_MGBH, page_RP, start_R1, length_R, block_TGK, scale, None)


def sparse_attention_lse(
    q_TNH: Tensor,
    k_MGBH: Tensor,
    v_MGBH: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    block_TGK: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    lse_TN = torch.empty(q_TNH.shape[:2], dtype=torch.float32, device=q_TNH.device)
    return _attend(q_TNH, k_MGBH, v_MGBH, page_RP, start_R1, length_R, block_TGK, scale, lse_TN), lse_TN


def dense_attention(
    q_TNH: Tensor,
    k_MGBH: Tensor,
    v_MGBH: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    scale: float,
) -> Tensor:
    return _attend(q_TNH, k_MGBH, v_MGBH, page_RP, start_R1, length_R, None, scale, None)


def supports_dense_attention(q_TNH: Tensor, k_MGBH: Tensor, v_MGBH: Tensor, *where: object) -> str | None:
    if reason := refusal(q_TNH, stored=(k_MGBH, v_MGBH)):
        return reason
    if any(
        x.itemsize == 1 and x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9) for x in (k_MGBH, v_MGBH)
    ):
        return "needs a GPU of compute capability 8.9 or later for 8-bit keys and values"
    _, groups, block_size, width = k_MGBH.shape
    if q_TNH.shape[1] // groups > MAX_HEADS:
        return f"takes at most {MAX_HEADS} query heads a group, not {q_TNH.shape[1] // groups}"
    if width > MAX_WIDTH:
        return f"takes heads of at most {MAX_WIDTH} numbers, not {width}"
    if block_size < 16 or block_size & (block_size - 1):
        return f"needs blocks of 16 tokens or a larger power of two, not {block_size}"
    if any((block_size - 1) * x.stride(2) + (width - 1) * x.stride(3) >= 1 << 31 for x in (k_MGBH, v_MGBH)):
        return "needs the keys of a page and head within 2^31 numbers of each other"
    if any(x.device != q_TNH.device for x in (k_MGBH, v_MGBH, *where) if isinstance(x, Tensor)):
        return "needs all tensors on one device"
    return None


def supports_sparse_attention(
    q_TNH: Tensor,
    k_MGBH: Tensor,
    v_MGBH: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    block_TGK: Tensor,
    scale: float,
) -> str | None:
    if block_TGK.shape[2] > MAX_SELECTED:
        return f"takes at most {MAX_SELECTED} selected blocks, not {block_TGK.shape[2]}"
    return supports_dense_attention(q_TNH, k_MGBH, v_MGBH, page_RP, start_R1, length_R, block_TGK)


supports_sparse_attention_lse = supports_sparse_attention


def _attend(
    q_TNH: Tensor,
    k_MGBH: Tensor,
    v_MGBH: Tensor,
    page_RP: Tensor,
    start_R1: Tensor,
    length_R: Tensor,
    block_TGK: Tensor | None,
    scale: float,
    lse_TN: Tensor | None,
) -> Tensor:
    out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    if length_R.shape[0] == 0:
        if lse_TN is not None:
            lse_TN.fill_(-math.inf)
        return out_TNH.zero_()
    if scale < 0:
        q_TNH, scale = -q_TNH, -scale
    call = Call(q_TNH, k_MGBH, v_MGBH, page_RP, start_R1, length_R, block_TGK, scale, out_TNH, lse_TN)
    num_tokens, num_requests = q_TNH.shape[0], length_R.shape[0]
    # As many requests as tokens have one each, unless some are empty; one request is long, or padded to be so.
    short = num_tokens <= max(FEW_TOKENS, num_requests)
    few = num_tokens if short else FEW_TOKENS if num_requests > 1 else 0
    if not short:
        _launch_long(call, few)
    if few:
        _launch_short(call, few)
    return out_TNH


def _launch_long(call: Call, few: int) -> None:
    """Requests of more than `few` tokens, and zeros for tokens of no request."""
    (num_tokens, _, width), (_, groups, block_size, _) = call.q_TNH.shape, call.k_MGBH.shape
    gpu = machine(call.q_TNH.device)
    num_selected = None if call.block_TGK is None else call.block_TGK.shape[2]
    sizes = call.dtype.itemsize, call.k_MGBH.itemsize
    tile = choose_tile(call.heads, width, block_size, num_selected, num_tokens * groups, *sizes, gpu)
    scattering = None
    if num_selected is not None:
        num_blocks, itemsize = call.page_RP.shape[1], call.out_TNH.itemsize
        scattering = choose_scattering(tile, call.heads, width, num_selected, num_blocks, num_tokens, itemsize, gpu)
    if scattering is None:
        triton_tiles.launch(call, tile, few, None)
        return
    marks = triton_scattered.unmarked(call, tile, scattering)
    rank = triton_tiles.launch(call, tile, few, marks)
    triton_scattered.launch(call, tile, scattering, marks, rank)


def _launch_short(call: Call, few: int) -> None:
    """Requests of up to `few` tokens, and zeros for tokens of no request if the batch has no longer ones."""
    (num_tokens, _, width), (_, groups, block_size, _) = call.q_TNH.shape, call.k_MGBH.shape
    num_selected = None if call.block_TGK is None else call.block_TGK.shape[2]
    num_blocks, lines = call.page_RP.shape[1], groups * min(num_tokens, call.length_R.shape[0] * few)
    sizes, gpu = (call.dtype.itemsize, call.k_MGBH.itemsize), machine(call.q_TNH.device)
    split = choose_split(call.heads, width, block_size, num_selected, num_blocks, lines, *sizes, gpu)
    triton_splits.launch(call, split, few)
