"""The cases that hold every implementation of an operator to its contract, and the shapes that benchmarks time.

A case is a frozen description; `packed` and `routed` turn one into tensors from a seed. Pages stand in the pool in
random order, and whatever a call must not read is poisoned: NaN in pages of nobody and in slots after the last key,
page -1 after a request's last block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from openm3.config import BLOCK

SPARE_PAGES = 3
"""Pages of the pool that belong to nobody."""


@dataclass(frozen=True, kw_only=True)
class PackedCase:
    """A packed batch over a paged cache, for block selection and attention.

    Request r has `num_tokens[r]` tokens in this step, the last of its `lengths[r]` keys. Queries, keys and values are
    normal; `index_values` says what index queries and keys are: "normal" too, small "integer" numbers, whose sums are
    exact, "equal" ones, so that every score ties, or "nonfinite", integers with NaN and both infinities among the keys.
    """

    name: str
    num_tokens: tuple[int, ...]
    lengths: tuple[int, ...]
    num_groups: int = 2
    heads_per_group: int = 2
    head_dim: int = 16
    index_dim: int = 8
    block_size: int = BLOCK
    num_selected: int = 4
    num_local: int = 1
    index_values: str = "integer"


class Packed(NamedTuple):
    """The tensors of a `PackedCase`. `block_TGK` is a random selection, valid, the token's own block included."""

    q_TNH: Tensor
    k_MGBH: Tensor
    v_MGBH: Tensor
    index_q_TGJ: Tensor
    index_k_MBJ: Tensor
    page_RP: Tensor
    start_R1: Tensor
    length_R: Tensor
    block_TGK: Tensor

    @property
    def where(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three tensors that say which keys belong to whom."""
        return self.page_RP, self.start_R1, self.length_R


@dataclass(frozen=True, kw_only=True)
class ExpertCase:
    """Tokens and a mixture of experts; `crowded` sends every token to the first ones and leaves the others idle."""

    name: str
    num_tokens: int
    num_experts: int = 8
    num_active: int = 2
    width: int = 16
    inner: int = 12
    crowded: bool = False


class Routed(NamedTuple):
    """The tensors of an `ExpertCase`, in the order that `experts` takes them."""

    x_TD: Tensor
    expert_TA: Tensor
    weight_TA: Tensor
    gate_up_E2FD: Tensor
    down_EDF: Tensor


_DOCUMENTS = (33, 65, 70, *(1, 2, 3) * 10), (257, 320, 513, *(2, 4, 6, 5, 3, 5, 4, 6, 4, 3, 5, 7) * 2, 2, 4, 6, 5, 3, 5)

PACKED = (
    PackedCase(name="one_token", num_tokens=(1,), lengths=(1,)),
    PackedCase(name="no_tokens", num_tokens=(0, 0), lengths=(0, 300)),
    PackedCase(name="no_requests", num_tokens=(), lengths=()),
    PackedCase(name="some_requests_empty", num_tokens=(0, 5, 0, 3, 0), lengths=(0, 700, 900, 3, 128)),
    PackedCase(name="exact_blocks", num_tokens=(256, 128), lengths=(1024, 128)),
    PackedCase(name="partial_last_block", num_tokens=(7, 130), lengths=(1025, 899)),
    PackedCase(name="block_edges", num_tokens=(1, 1, 1, 2, 3), lengths=(127, 128, 129, 641, 769)),
    PackedCase(name="more_slots_than_blocks", num_tokens=(40, 2), lengths=(300, 129), num_selected=16),
    PackedCase(name="as_many_slots_as_blocks", num_tokens=(6,), lengths=(512,), num_selected=4),
    PackedCase(name="whole_prompt", num_tokens=(520,), lengths=(520,), num_selected=3),
    PackedCase(name="chunk_behind_prefix", num_tokens=(300,), lengths=(4700,), num_groups=1, head_dim=8),
    PackedCase(name="mixed_batch", num_tokens=(1, 70, 3, 0, 129), lengths=(900, 70, 3, 256, 1025)),
    PackedCase(name="verify_eight_tokens", num_tokens=(8, 8), lengths=(1030, 2049), num_selected=16),
    PackedCase(name="as_many_tokens_as_groups", num_tokens=(4,), lengths=(1500,), num_groups=4, num_selected=4),
    PackedCase(name="three_groups_of_one", num_tokens=(9,), lengths=(777,), num_groups=3, heads_per_group=1),
    PackedCase(name="one_group_of_sixteen", num_tokens=(9,), lengths=(777,), num_groups=1, heads_per_group=16),
    PackedCase(name="odd_widths", num_tokens=(5, 21), lengths=(650, 21), head_dim=5, index_dim=3),
    PackedCase(name="one_slot", num_tokens=(150,), lengths=(600,), num_selected=1),
    PackedCase(name="two_local", num_tokens=(30, 140), lengths=(1100, 140), num_local=2),
    PackedCase(name="three_local", num_tokens=(300, 1), lengths=(900, 1300), num_local=3),
    PackedCase(name="all_local", num_tokens=(300,), lengths=(900,), num_selected=3, num_local=3),
    PackedCase(name="small_blocks", num_tokens=(50, 1, 17), lengths=(333, 90, 17), block_size=16),
    PackedCase(name="documents", num_tokens=_DOCUMENTS[0], lengths=_DOCUMENTS[1], num_selected=2),
    PackedCase(name="decode_batch", num_tokens=(1,) * 40, lengths=tuple(37 * i % 900 + 1 for i in range(40))),
    PackedCase(name="all_equal", num_tokens=(1, 140), lengths=(2304, 1000), num_selected=16, index_values="equal"),
    PackedCase(name="nonfinite", num_tokens=(70, 3), lengths=(1500, 800), index_values="nonfinite"),
    PackedCase(name="normal", num_tokens=(130, 1), lengths=(1400, 2000), index_dim=32, index_values="normal"),
)
"""Batches that every implementation of block selection and attention must get right."""

MILLION = PackedCase(
    name="million",
    num_tokens=(3,),
    lengths=((1 << 20) + 389,),
    num_groups=1,
    head_dim=4,
    index_dim=2,
    num_selected=16,
)
"""A context of more than a million tokens, narrow enough for a test."""

EXPERTS = (
    ExpertCase(name="one_token", num_tokens=1),
    ExpertCase(name="no_tokens", num_tokens=0),
    ExpertCase(name="idle_experts", num_tokens=40, crowded=True),
    ExpertCase(name="every_expert", num_tokens=33, num_active=8),
    ExpertCase(name="one_expert", num_tokens=5, num_experts=1, num_active=1),
    ExpertCase(name="many_tokens", num_tokens=150, num_experts=5, num_active=3, width=7, inner=9),
)
"""Token and expert counts that every implementation of the experts must get right."""


def packed(case: PackedCase, seed: int = 0, dtype: torch.dtype = torch.float32) -> Packed:
    """The tensors of a case; the same seed gives the same numbers in every dtype, up to its rounding."""
    generator = torch.Generator().manual_seed(seed)
    c, total = case, sum(case.num_tokens)
    counts = [-(-length // c.block_size) for length in c.lengths]
    num_pages = sum(counts) + SPARE_PAGES
    order = torch.randperm(num_pages, generator=generator).to(torch.int32)
    page_RP = torch.full((len(counts), max(counts, default=0)), -1, dtype=torch.int32)
    shape = (num_pages, c.num_groups, c.block_size, c.head_dim)
    k_MGBH, v_MGBH = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    index_k_MBJ = torch.full((num_pages, c.block_size, c.index_dim), torch.nan)
    for r, (length, count) in enumerate(zip(c.lengths, counts, strict=True)):
        page_RP[r, :count] = order[sum(counts[:r]) : sum(counts[: r + 1])]
        slot_S = torch.arange(length)
        page_S, offset_S = page_RP[r].long()[slot_S // c.block_size], slot_S % c.block_size
        for pool in (k_MGBH, v_MGBH):
            pool[page_S, :, offset_S] = torch.randn((length, c.num_groups, c.head_dim), generator=generator)
        index_k_MBJ[page_S, offset_S] = _index_values((length, c.index_dim), c.index_values, generator)
    start_R1 = torch.tensor([0, *c.num_tokens]).cumsum(0).to(torch.int32)
    length_R = torch.tensor(c.lengths, dtype=torch.int32)
    queries = "integer" if c.index_values == "nonfinite" else c.index_values
    return Packed(
        torch.randn((total, c.num_groups * c.heads_per_group, c.head_dim), generator=generator).to(dtype),
        k_MGBH.to(dtype),
        v_MGBH.to(dtype),
        _index_values((total, c.num_groups, c.index_dim), queries, generator).to(dtype),
        index_k_MBJ.to(dtype),
        page_RP,
        start_R1,
        length_R,
        random_blocks(case, generator),
    )


def random_blocks(case: PackedCase, generator: torch.Generator) -> Tensor:
    """A random valid selection, `block_TGK`: the token's own block and others before it."""
    parts = [torch.empty((0, case.num_groups, case.num_selected), dtype=torch.int32)]
    for count, length in zip(case.num_tokens, case.lengths, strict=True):
        own_t11 = torch.arange(length - count, length)[:, None, None] // case.block_size
        width = max(case.num_selected, -(-length // case.block_size))
        block_P = torch.arange(width)
        score_tGP = torch.rand((count, case.num_groups, width), generator=generator)
        score_tGP = score_tGP.masked_fill(block_P == own_t11, 2.0).masked_fill(block_P > own_t11, -1.0)
        best = score_tGP.topk(case.num_selected, dim=-1)
        block_tGK = best.indices.masked_fill(best.values < 0, width).sort(dim=-1).values
        parts.append(block_tGK.masked_fill(block_tGK == width, -1).to(torch.int32))
    return torch.cat(parts)


def routed(case: ExpertCase, seed: int = 0, dtype: torch.dtype = torch.float32) -> Routed:
    """The tensors of a case; the same seed gives the same numbers in every dtype, up to its rounding."""
    generator = torch.Generator().manual_seed(seed)
    c = case
    order_TE = torch.rand((c.num_tokens, c.num_experts), generator=generator).argsort(-1)
    if c.crowded:
        order_TE = torch.arange(c.num_experts).expand(c.num_tokens, -1)
    weight_TA = torch.rand((c.num_tokens, c.num_active), generator=generator).softmax(-1)
    return Routed(
        # Wide enough that the activation's limits are reached.
        (torch.randn((c.num_tokens, c.width), generator=generator) * 3).to(dtype),
        order_TE[:, : c.num_active].to(torch.int32),
        weight_TA,
        torch.randn((c.num_experts, 2 * c.inner, c.width), generator=generator).to(dtype),
        torch.randn((c.num_experts, c.width, c.inner), generator=generator).to(dtype),
    )


def _index_values(shape: tuple[int, ...], values: str, generator: torch.Generator) -> Tensor:
    if values == "normal":
        return torch.randn(shape, generator=generator)
    if values == "equal":
        return torch.ones(shape)
    x = torch.randint(-3, 4, shape, generator=generator).float()
    if values == "nonfinite":
        kind = torch.randint(0, 40, shape[:1], generator=generator)
        for code, value in ((0, torch.nan), (1, torch.inf), (2, -torch.inf)):
            x[kind == code, 0] = value
        x[3 * BLOCK : 4 * BLOCK] = torch.nan
    return x
