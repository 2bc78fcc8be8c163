"""Attention in Triton, for every CUDA GPU.

Tiles of neighbouring tokens, all query heads of a group beside each other, walk the union of their tokens' blocks: each
block is read once a tile, and a row ignores the blocks that its token did not choose. Requests of a few tokens (decode,
verify) have too few tiles to fill a machine: there each token's blocks are split over programs, and a second kernel
merges their results. Which of the two a request takes depends on its own number of tokens alone, and so do the order
and the grouping of its sums: what else is in the batch changes no bit.

Nothing here waits for the device: grids follow from shapes, and programs find their request by themselves. Operands
stay in the dtype that came in, sums and softmax are float32, and weights are rounded to the operands' dtype between
the two products.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from openm3.ops.triton import machine, padded, refusal
from openm3.ops.triton.batch import request_of_tile

FEW_TOKENS = 8
"""Requests of up to so many tokens split each token's blocks over programs."""

MAX_HEADS = 128
MAX_WIDTH = 256
MAX_SELECTED = 4096


@dataclass(frozen=True)
class Tile:
    """How one program works: `tokens` x `heads` rows meet `keys` keys at a time, `width` numbers each."""

    tokens: int
    heads: int
    keys: int
    width: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Split:
    """How a token's blocks are shared out: `splits` programs of `blocks` blocks each, all shaped like `tile`."""

    tile: Tile
    blocks: int
    splits: int


def choose_tile(
    heads: int, width: int, block_size: int, num_selected: int | None, itemsize: int, shared_bytes: int
) -> Tile:
    """The tile of long requests; `num_selected` is None in dense layers.

    Not yet measured on a device. 128 rows of 16 bits give Hopper's two warpgroups a product of 64 rows each; float32
    runs on no tensor cores, and its operands take twice the room.
    """
    tokens = max(1, 256 // itemsize // padded(heads))
    if num_selected is not None:
        # A union's members are the bits of an int32, and its walk keeps all its ids in registers.
        tokens = min(tokens, 32, max(1, MAX_SELECTED // padded(num_selected)))
    return _filled(tokens, heads, width, block_size, itemsize, shared_bytes)


def choose_split(
    heads: int, width: int, block_size: int, num_blocks: int, dense: bool, itemsize: int, shared_bytes: int
) -> Split:
    """The split of one token's `num_blocks` blocks.

    Not yet measured on a device. 4 of 16 selected blocks are 256 KiB of M3's cache in bf16, against 8 KiB written for
    the merge. In dense layers the number of splits, and so the room for their results, has an end.
    """
    tile = _filled(1, heads, width, block_size, itemsize, shared_bytes)
    blocks = max(16, -(-num_blocks // 128)) if dense else 4
    return Split(tile, blocks, max(1, -(-num_blocks // blocks)))


def _filled(tokens: int, heads: int, width: int, block_size: int, itemsize: int, shared_bytes: int) -> Tile:
    """Keys and values come in 16 KiB each, as many in flight as shared memory holds beside the queries."""
    head_rows, width = padded(heads, -(-16 // tokens)), padded(width, 16)
    row_bytes = width * itemsize
    keys = min(block_size, 128, max(16, (16 << 10) // row_bytes))
    room = shared_bytes - (8 << 10) - tokens * head_rows * row_bytes
    stages = min(3, max(1, room // (2 * keys * row_bytes)))
    return Tile(tokens, head_rows, keys, width, 8 if tokens * head_rows * itemsize >= 256 else 4, stages)


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
    if reason := refusal(q_TNH, k_MGBH, v_MGBH):
        return reason
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
    call = _Call(q_TNH, k_MGBH, v_MGBH, page_RP, start_R1, length_R, block_TGK, scale, out_TNH, lse_TN)
    num_tokens, num_requests = q_TNH.shape[0], length_R.shape[0]
    with torch.cuda.device_of(q_TNH):
        if num_tokens > FEW_TOKENS:
            _launch_tiles(call)
        if 0 < num_tokens <= FEW_TOKENS or num_requests > 1:
            _launch_splits(call)
    return out_TNH


@dataclass(frozen=True)
class _Call:
    q_TNH: Tensor
    k_MGBH: Tensor
    v_MGBH: Tensor
    page_RP: Tensor
    start_R1: Tensor
    length_R: Tensor
    block_TGK: Tensor | None
    scale: float
    out_TNH: Tensor
    lse_TN: Tensor | None

    @property
    def heads(self) -> int:
        return self.q_TNH.shape[1] // self.k_MGBH.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """What the products multiply: what came in, or float32 where queries and cache differ."""
        dtypes = {x.dtype for x in (self.q_TNH, self.k_MGBH, self.v_MGBH)}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def common(self, tile: Tile) -> dict[str, object]:
        """The arguments that the kernels of both ways share."""
        return {
            "p_q": self.q_TNH,
            "p_k": self.k_MGBH,
            "p_v": self.v_MGBH,
            "p_page": self.page_RP,
            "p_start": self.start_R1,
            "p_length": self.length_R,
            "scale": self.scale * math.log2(math.e),
            **_strides("q", "tnh", self.q_TNH),
            **_strides("k", "mgbh", self.k_MGBH),
            **_strides("v", "mgbh", self.v_MGBH),
            **_strides("page", "rp", self.page_RP),
            "USED_HEADS": self.heads,
            "USED_WIDTH": self.q_TNH.shape[2],
            "BLOCK": self.k_MGBH.shape[2],
            "HEADS": tile.heads,
            "KEYS": tile.keys,
            "WIDTH": tile.width,
            "DTYPE": _TRITON_DTYPES[self.dtype],
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


_TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _strides(name: str, axes: str, x: Tensor) -> dict[str, int]:
    return {f"stride_{name}_{axis}": stride for axis, stride in zip(axes, x.stride(), strict=True)}


def _launch_tiles(call: _Call) -> None:
    """Requests of more than a few tokens."""
    (num_tokens, _, width), (_, groups, block_size, _) = call.q_TNH.shape, call.k_MGBH.shape
    num_requests, block_TGK, device = call.length_R.shape[0], call.block_TGK, call.q_TNH.device
    num_selected = None if block_TGK is None else block_TGK.shape[2]
    itemsize, shared_bytes = call.dtype.itemsize, machine(device).shared_bytes
    tile = choose_tile(call.heads, width, block_size, num_selected, itemsize, shared_bytes)
    # Request r has the tiles from start // tokens + r on: enough for any number of tokens, and found without a scan.
    num_tiles = num_tokens // tile.tokens + num_requests
    union = member = count = None
    if block_TGK is not None:
        capacity = tile.tokens * block_TGK.shape[2]
        union = torch.empty((num_tiles, groups, capacity), dtype=torch.int32, device=device)
        member, count = torch.empty_like(union), torch.empty((num_tiles, groups), dtype=torch.int32, device=device)
        _unite[(num_tiles, groups)](
            block_TGK,
            call.start_R1,
            call.length_R,
            union,
            member,
            count,
            num_requests,
            *block_TGK.stride(),
            K=block_TGK.shape[2],
            SLOTS=padded(block_TGK.shape[2]),
            TOKENS=tile.tokens,
            BLOCK=block_size,
            FEW=FEW_TOKENS,
            num_warps=1 if capacity <= 512 else 4,
        )
    _attend_tile[(num_tiles, groups)](
        **call.common(tile),
        p_union=union,
        p_member=member,
        p_count=count,
        p_out=call.out_TNH,
        p_lse=call.lse_TN,
        num_requests=num_requests,
        capacity=0 if union is None else union.shape[2],
        TOKENS=tile.tokens,
        FEW=FEW_TOKENS,
        DENSE=block_TGK is None,
    )


def _launch_splits(call: _Call) -> None:
    """Requests of a few tokens."""
    (num_tokens, heads, width), (_, groups, block_size, _) = call.q_TNH.shape, call.k_MGBH.shape
    num_requests, block_TGK, device = call.length_R.shape[0], call.block_TGK, call.q_TNH.device
    dense = block_TGK is None
    num_blocks = call.page_RP.shape[1] if dense else block_TGK.shape[2]
    itemsize, shared_bytes = call.dtype.itemsize, machine(device).shared_bytes
    split = choose_split(call.heads, width, block_size, num_blocks, dense, itemsize, shared_bytes)
    few = min(FEW_TOKENS, num_tokens)
    places = num_requests * few
    part = torch.empty((min(num_tokens, places), split.splits, heads, width), dtype=torch.float32, device=device)
    part_lse = torch.empty(part.shape[:3], dtype=torch.float32, device=device)
    shape = {"few": few, "splits": split.splits, "num_blocks": num_blocks, "FEW": FEW_TOKENS, "DENSE": dense}
    shape |= {"SPLIT": split.blocks, "BY_TOKEN": num_tokens <= places}
    _attend_split[(places, groups, split.splits)](
        **call.common(split.tile),
        **shape,
        **_strides("block", "tgk", call.page_RP[None] if dense else block_TGK),
        p_block=block_TGK,
        p_part=part,
        p_part_lse=part_lse,
    )
    _merge[(places, heads)](
        part,
        part_lse,
        call.start_R1,
        call.length_R,
        call.out_TNH,
        call.lse_TN,
        **shape,
        BLOCK=block_size,
        USED_WIDTH=width,
        WIDTH=split.tile.width,
        CHUNK=16,
        num_warps=4,
    )


@triton.jit
def _find(tile, p_start, num_requests, TOKENS: tl.constexpr):
    """The request of a tile, its tokens' bounds, and the tile's first token, which may lie behind them."""
    r = request_of_tile(p_start, num_requests, 0, tl.load(p_start + num_requests), tile, TOKENS)
    start = tl.load(p_start + r).to(tl.int32)
    stop = tl.load(p_start + r + 1).to(tl.int32)
    return r, start, stop, start + (tile - start // TOKENS - r) * TOKENS


@triton.jit(do_not_specialize=["num_requests"])
def _unite(
    p_block,
    p_start,
    p_length,
    p_union,
    p_member,
    p_count,
    num_requests,
    stride_t,
    stride_g,
    stride_k,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
):
    """The visible blocks of a tile's tokens, ascending, each with the tokens that chose it as bits."""
    tile, g = tl.program_id(0), tl.program_id(1)
    r, start, stop, first = _find(tile, p_start, num_requests, TOKENS)
    if (first >= stop) | (stop - start <= FEW):
        return
    i = tl.arange(0, TOKENS)
    slot = tl.arange(0, SLOTS)
    token = first + i
    own = (tl.load(p_length + r).to(tl.int32) - stop + token) // BLOCK
    there = (token < stop)[:, None] & (slot < K)[None, :]
    p_ids = p_block + g.to(tl.int64) * stride_g + token.to(tl.int64)[:, None] * stride_t + slot[None, :] * stride_k
    NONE: tl.constexpr = 2147483647
    ids = tl.load(p_ids, mask=there, other=-1).to(tl.int32)
    ids = tl.where((ids >= 0) & (ids <= own[:, None]), ids, NONE)
    place = tile.to(tl.int64) * tl.num_programs(1) + g
    count = 0
    least = tl.min(ids)
    while least < NONE:
        chosen = ids == least
        bits = tl.sum(tl.max(chosen.to(tl.int32), axis=1) << i)
        tl.store(p_union + place * (TOKENS * K) + count, least)
        tl.store(p_member + place * (TOKENS * K) + count, bits)
        count += 1
        ids = tl.where(chosen, NONE, ids)
        least = tl.min(ids)
    tl.store(p_count + place, count)


@triton.jit
def _step(
    top,
    total,
    acc,
    b_q,
    p_k,
    p_v,
    slot,
    end,
    limit,
    scale,
    stride_k_b,
    stride_k_h,
    stride_v_b,
    stride_v_h,
    USED_WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """One step of the online softmax: KEYS keys from `slot` on, of which a row sees those up to its limit.

    From `end` on nothing is read.
    """
    i = tl.arange(0, KEYS)
    c = tl.arange(0, WIDTH)
    there = (slot + i < end)[:, None] & (c < USED_WIDTH)[None, :]
    b_k = tl.load(p_k + i[:, None] * stride_k_b + c[None, :] * stride_k_h, mask=there, other=0.0)
    score = tl.dot(b_q, tl.trans(b_k.to(DTYPE)), input_precision="ieee") * scale
    score = tl.where((slot + i)[None, :] <= limit[:, None], score, -float("inf"))
    new_top = tl.maximum(top, tl.max(score, axis=1))
    # Rows that have seen nothing yet must not subtract infinity from infinity.
    base = tl.where(new_top == -float("inf"), 0.0, new_top)
    weight = tl.exp2(score - base[:, None])
    shrink = tl.exp2(top - base)
    b_v = tl.load(p_v + i[:, None] * stride_v_b + c[None, :] * stride_v_h, mask=there, other=0.0)
    acc = tl.dot(weight.to(DTYPE), b_v.to(DTYPE), acc * shrink[:, None], input_precision="ieee")
    return new_top, total * shrink + tl.sum(weight, axis=1), acc


@triton.jit(do_not_specialize=["num_requests"])
def _attend_tile(
    p_q,
    p_k,
    p_v,
    p_page,
    p_start,
    p_length,
    p_union,
    p_member,
    p_count,
    p_out,
    p_lse,
    scale,
    num_requests,
    capacity,
    stride_q_t,
    stride_q_n,
    stride_q_h,
    stride_k_m,
    stride_k_g,
    stride_k_b,
    stride_k_h,
    stride_v_m,
    stride_v_g,
    stride_v_b,
    stride_v_h,
    stride_page_r,
    stride_page_p,
    USED_HEADS: tl.constexpr,
    USED_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    FEW: tl.constexpr,
    DENSE: tl.constexpr,
):
    """A tile of neighbouring tokens, all heads of a group, over the tile's union of blocks, or over all blocks."""
    # A prompt's last tiles see the most keys: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    g = tl.program_id(1)
    r, start, stop, first = _find(tile, p_start, num_requests, TOKENS)
    if (first >= stop) | (stop - start <= FEW):
        return
    before = tl.load(p_length + r).to(tl.int32) - stop
    end = before + tl.minimum(first + TOKENS, stop)
    row = tl.arange(0, TOKENS * HEADS)
    c = tl.arange(0, WIDTH)
    i = row // HEADS
    token = (first + i).to(tl.int64)
    n = g * USED_HEADS + row % HEADS
    there = (first + i < stop) & (row % HEADS < USED_HEADS)
    limit = tl.where(there, before + first + i, -1)
    used = there[:, None] & (c < USED_WIDTH)[None, :]
    p_rows = p_q + token[:, None] * stride_q_t + n.to(tl.int64)[:, None] * stride_q_n
    b_q = tl.load(p_rows + c[None, :] * stride_q_h, mask=used, other=0.0).to(DTYPE)
    top = tl.full([TOKENS * HEADS], -float("inf"), tl.float32)
    total = tl.zeros([TOKENS * HEADS], tl.float32)
    acc = tl.zeros([TOKENS * HEADS, WIDTH], tl.float32)
    p_k += g.to(tl.int64) * stride_k_g
    p_v += g.to(tl.int64) * stride_v_g
    p_page += r.to(tl.int64) * stride_page_r
    if DENSE:
        num_blocks = (end + BLOCK - 1) // BLOCK
    else:
        place = tile.to(tl.int64) * tl.num_programs(1) + g
        num_blocks = tl.load(p_count + place)
        p_union += place * capacity
        p_member += place * capacity
    PARTS: tl.constexpr = BLOCK // KEYS
    for j in range(num_blocks * PARTS):
        if DENSE:
            block = j // PARTS
            sees = limit
        else:
            block = tl.load(p_union + j // PARTS)
            sees = tl.where((tl.load(p_member + j // PARTS) >> i) & 1 != 0, limit, -1)
        page = tl.load(p_page + block * stride_page_p).to(tl.int64)
        inside = j % PARTS * KEYS
        top, total, acc = _step(
            top,
            total,
            acc,
            b_q,
            p_k + page * stride_k_m + inside * stride_k_b,
            p_v + page * stride_v_m + inside * stride_v_b,
            block * BLOCK + inside,
            end,
            sees,
            scale,
            stride_k_b,
            stride_k_h,
            stride_v_b,
            stride_v_h,
            USED_WIDTH,
            KEYS,
            WIDTH,
            DTYPE,
        )
    total = tl.where(total == 0.0, 1.0, total)
    at = token * (USED_HEADS * tl.num_programs(1)) + n
    tl.store(p_out + at[:, None] * USED_WIDTH + c[None, :], acc / total[:, None], mask=used)
    if p_lse is not None:
        LN_2: tl.constexpr = 0.6931471805599453
        tl.store(p_lse + at, (top + tl.log2(total)) * LN_2, mask=there)


@triton.jit
def _few(place, p_start, p_length, few, FEW: tl.constexpr, BY_TOKEN: tl.constexpr):
    """Request and token of a place, the token's position, the row of its partial results; whether there is such one."""
    r = place // few
    start = tl.load(p_start + r).to(tl.int32)
    stop = tl.load(p_start + r + 1).to(tl.int32)
    token = start + place % few
    position = tl.load(p_length + r).to(tl.int32) - stop + token
    row = token if BY_TOKEN else place
    return r, token, position, row.to(tl.int64), (token < stop) & (stop - start <= FEW)


@triton.jit
def _attend_split(
    p_q,
    p_k,
    p_v,
    p_page,
    p_start,
    p_length,
    p_block,
    p_part,
    p_part_lse,
    scale,
    few,
    splits,
    num_blocks,
    stride_q_t,
    stride_q_n,
    stride_q_h,
    stride_k_m,
    stride_k_g,
    stride_k_b,
    stride_k_h,
    stride_v_m,
    stride_v_g,
    stride_v_b,
    stride_v_h,
    stride_page_r,
    stride_page_p,
    stride_block_t,
    stride_block_g,
    stride_block_k,
    USED_HEADS: tl.constexpr,
    USED_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    SPLIT: tl.constexpr,
    FEW: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    DENSE: tl.constexpr,
):
    """One token, all heads of a group, over a share of its blocks: a partial result and its log-sum-exp to base 2."""
    place, g, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    r, token, position, part_row, exists = _few(place, p_start, p_length, few, FEW, BY_TOKEN)
    own = position // BLOCK
    if DENSE:
        num_blocks = own + 1
    num_blocks -= split * SPLIT
    if (num_blocks <= 0) | (exists == 0):
        return
    row = tl.arange(0, HEADS)
    c = tl.arange(0, WIDTH)
    n = g * USED_HEADS + row
    there = row < USED_HEADS
    used = there[:, None] & (c < USED_WIDTH)[None, :]
    p_rows = p_q + token.to(tl.int64) * stride_q_t + n.to(tl.int64)[:, None] * stride_q_n
    b_q = tl.load(p_rows + c[None, :] * stride_q_h, mask=used, other=0.0).to(DTYPE)
    top = tl.full([HEADS], -float("inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, WIDTH], tl.float32)
    p_k += g.to(tl.int64) * stride_k_g
    p_v += g.to(tl.int64) * stride_v_g
    p_page += r.to(tl.int64) * stride_page_r
    PARTS: tl.constexpr = BLOCK // KEYS
    for j in range(tl.minimum(num_blocks, SPLIT) * PARTS):
        block = split * SPLIT + j // PARTS
        if not DENSE:
            p_id = p_block + token.to(tl.int64) * stride_block_t + g.to(tl.int64) * stride_block_g
            block = tl.load(p_id + block * stride_block_k).to(tl.int32)
        visible = (block >= 0) & (block <= own)
        block = tl.where(visible, block, 0)
        end = tl.where(visible, position + 1, 0)
        page = tl.load(p_page + block * stride_page_p).to(tl.int64)
        inside = j % PARTS * KEYS
        top, total, acc = _step(
            top,
            total,
            acc,
            b_q,
            p_k + page * stride_k_m + inside * stride_k_b,
            p_v + page * stride_v_m + inside * stride_v_b,
            block * BLOCK + inside,
            end,
            tl.where(there, end - 1, -1),
            scale,
            stride_k_b,
            stride_k_h,
            stride_v_b,
            stride_v_h,
            USED_WIDTH,
            KEYS,
            WIDTH,
            DTYPE,
        )
    total = tl.where(total == 0.0, 1.0, total)
    at = (part_row * splits + split) * (USED_HEADS * tl.num_programs(1)) + n
    tl.store(p_part + at[:, None] * USED_WIDTH + c[None, :], acc / total[:, None], mask=used)
    tl.store(p_part_lse + at, top + tl.log2(total), mask=there)


@triton.jit
def _merge(
    p_part,
    p_part_lse,
    p_start,
    p_length,
    p_out,
    p_lse,
    few,
    splits,
    num_blocks,
    BLOCK: tl.constexpr,
    USED_WIDTH: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    FEW: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    DENSE: tl.constexpr,
):
    """One token and head: its partial results weighed by their shares of the sum, always in the same order."""
    place, n, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    _, token, position, part_row, exists = _few(place, p_start, p_length, few, FEW, BY_TOKEN)
    if exists == 0:
        return
    if DENSE:
        num_blocks = position // BLOCK + 1
    parts = (num_blocks + SPLIT - 1) // SPLIT
    part = tl.arange(0, CHUNK)
    c = tl.arange(0, WIDTH)
    base = part_row * splits * heads + n
    top = tl.full([CHUNK], -float("inf"), tl.float32)
    for first in range(0, parts, CHUNK):
        p_sum = p_part_lse + base + (first + part) * heads
        top = tl.maximum(top, tl.load(p_sum, mask=first + part < parts, other=-float("inf")))
    most = tl.max(top)
    most = tl.where(most == -float("inf"), 0.0, most)
    total = tl.zeros([CHUNK], tl.float32)
    acc = tl.zeros([CHUNK, WIDTH], tl.float32)
    for first in range(0, parts, CHUNK):
        at = base + (first + part) * heads
        weight = tl.exp2(tl.load(p_part_lse + at, mask=first + part < parts, other=-float("inf")) - most)
        used = (first + part < parts)[:, None] & (c < USED_WIDTH)[None, :]
        acc += weight[:, None] * tl.load(p_part + at[:, None] * USED_WIDTH + c[None, :], mask=used, other=0.0)
        total += weight
    sum_ = tl.sum(total)
    sum_ = tl.where(sum_ == 0.0, 1.0, sum_)
    at = token.to(tl.int64) * heads + n
    tl.store(p_out + at * USED_WIDTH + c, tl.sum(acc, axis=0) / sum_, mask=c < USED_WIDTH)
    if p_lse is not None:
        LN_2: tl.constexpr = 0.6931471805599453
        tl.store(p_lse + at, (tl.max(top) + tl.log2(sum_)) * LN_2)
