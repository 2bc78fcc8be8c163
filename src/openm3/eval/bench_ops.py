"""`openm3 bench ops`: the operators at M3's own geometry, case by case.

64 query heads and 4 KV groups of 128 channels, 4 index queries and an index key of 128, 16 blocks of 128 tokens, bf16
caches, pages in random order. "2048_behind_64k" is 2,048 tokens of one request behind 65,536 keys.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openm3.config import BLOCK
from openm3.errors import ConfigError
from openm3.eval.bench_peaks import READ_BYTES, Work, medians
from openm3.eval.bench_selections import correlated_blocks, union_keys, visible_keys
from openm3.eval.report import progress, tokens
from openm3.model.memory import free_bytes
from openm3.ops.attention import dense_attention, sparse_attention
from openm3.ops.cases import PackedCase, random_blocks
from openm3.ops.dispatch import use
from openm3.ops.index import encode_pages, new_codes, select_blocks
from openm3.ops.native import on_huge_pages

K, M = 1 << 10, 1 << 20
_DTYPE = torch.bfloat16
_TILE = 1_000_003
"""Random numbers drawn for a pool, repeated to fill it: a prime, so that no two pages are alike."""


@dataclass(frozen=True)
class Case:
    """One operator at one shape; `selection` says how the blocks of sparse attention are drawn."""

    operator: str
    shape: PackedCase
    selection: str = "correlated"
    quick: bool = False

    @property
    def name(self) -> str:
        return self.shape.name


@dataclass(frozen=True)
class Line:
    """What was measured of one case: median seconds of a call, and of another implementation if one was asked for."""

    name: str
    seconds: float
    work: Work
    other: float | None = None


def _shape(name: str, num_tokens: Sequence[int], lengths: Sequence[int]) -> PackedCase:
    """A packed batch in M3's geometry."""
    return PackedCase(
        name=name,
        num_tokens=tuple(num_tokens),
        lengths=tuple(lengths),
        num_groups=4,
        heads_per_group=16,
        head_dim=128,
        index_dim=128,
        num_selected=16,
    )


def behind(name: str, count: int, before: int, requests: int = 1) -> PackedCase:
    """Requests of `count` tokens, each behind `before` keys, in M3's geometry."""
    return _shape(name, [count] * requests, [before + count] * requests)


# What servers of M3 see: chunks of so many tokens behind so many keys, and batches of so many requests and keys each.
_SERVED_CHUNKS = (
    *((182, 17_536), (171, 55_168), (338, 74_240), (347, 131_200), (1623, 16_384), (1404, 45_440), (1626, 91_520)),
    *((1649, 133_888), (8897, 16_640), (9844, 39_040), (10_295, 75_520), (8476, 145_408), (16_384, 10_752)),
    *((16_384, 31_360), (16_384, 68_096), (16_384, 157_440)),
)
_SERVED_BATCHES = tuple((requests, keys) for keys in (1000, 4000, 10_000, 50_000, 100_000) for requests in (1, 8, 32))

CASES = (
    Case("select", behind("select_1_behind_1m", 1, M), quick=True),
    Case("select", behind("select_512_behind_128k", 512, 128 * K), quick=True),
    Case("select", behind("select_1_behind_128k", 1, 128 * K)),
    Case("select", behind("select_4096_behind_64k", 4096, 64 * K)),
    Case("sparse", behind("prefill_2048_behind_64k", 2048, 64 * K), quick=True),
    Case("sparse", behind("prefill_2048_behind_64k_random", 2048, 64 * K), "random", quick=True),
    Case("sparse", behind("decode_batch16", 1, 64 * K, requests=16), quick=True),
    Case("sparse", behind("decode_1_behind_1m", 1, M)),
    Case("dense", behind("dense_512_behind_8k", 512, 8 * K)),
)
"""What is measured by default."""

SERVED = (
    *(Case("sparse", behind(f"served_prefill_{count}_behind_{keys}", count, keys)) for count, keys in _SERVED_CHUNKS),
    *(
        Case("sparse", behind(f"served_decode_{requests}x8_behind_{keys}", 8, keys - 8, requests))
        for requests, keys in _SERVED_BATCHES
    ),
)
"""Shapes that servers of M3 see, by name or pattern only. Decode checks 8 drafted tokens a request."""


def choose(patterns: Sequence[str] | None, quick: bool) -> list[Case]:
    """The cases that the patterns name, in order; by default the quick ones or all of `CASES`. Raises ConfigError."""
    if not patterns:
        return [case for case in CASES if case.quick or not quick]
    chosen: dict[str, Case] = {}
    for pattern in patterns:
        found = {case.name: case for case in (*CASES, *SERVED) if fnmatch.fnmatchcase(case.name, pattern)}
        if not found:
            names = ", ".join(case.name for case in CASES)
            raise ConfigError(f"no case is named {pattern!r}; give one of {names}, or a pattern such as 'served_*'")
        chosen |= found
    return list(chosen.values())


def describe() -> str:
    """Every case in a line."""
    rows = []
    for case in (*CASES, *SERVED):
        requests, count, length = len(case.shape.lengths), case.shape.num_tokens[0], case.shape.lengths[0]
        who = f"{requests} requests of {count:,}" if requests > 1 else f"{count:,}"
        where = f"{who} token{'s' * (count > 1)} behind {tokens(length - count)}"
        kind = {"select": "select_blocks", "dense": "dense_attention"}.get(case.operator)
        rows.append(f"{case.name:<38}{kind or f'sparse_attention, {case.selection} selections'}, {where}")
    return "\n".join(rows)


def measure(cases: Sequence[Case], *, budget: float, against: str | None, seed: int = 0) -> list[Line]:
    """Time every case for about `budget` seconds, in turns with the implementation `against` if one is named."""
    lines = []
    with progress() as bar:
        task = bar.add_task("measuring", total=len(cases))
        for case in cases:
            bar.update(task, description=case.name)
            call, work = prepare(case, torch.Generator().manual_seed(seed))
            calls: dict[str, Callable[[], object]] = {"own": call}
            if against is not None:
                calls["other"] = functools.partial(_forced, against, call)
            times = medians(calls, budget)
            lines.append(Line(case.name, times["own"], work, times.get("other")))
            bar.advance(task)
    return lines


def prepare(case: Case, generator: torch.Generator) -> tuple[Callable[[], Tensor], Work]:
    """Make a case's tensors; return the call to time and what it has to do. Raises ConfigError without the memory."""
    shape = case.shape
    pages = sum(-(-length // shape.block_size) for length in shape.lengths)
    require_memory(case.name, pages * shape.block_size * _key_bytes(case) + READ_BYTES)
    where = _where(shape, generator)
    if case.operator == "select":
        index_q_TGJ = _random((sum(shape.num_tokens), shape.num_groups, shape.index_dim), generator)
        index_k_MBJ = _random((pages, shape.block_size, shape.index_dim), generator)
        codes = new_codes(index_k_MBJ)
        if codes is not None:
            encode_pages(index_k_MBJ, torch.arange(pages) * shape.block_size, codes)
        call = functools.partial(select_blocks, index_q_TGJ, index_k_MBJ, *where, codes=codes)
        return call, select_work(shape)
    heads = shape.num_groups * shape.heads_per_group
    q_TNH = _random((sum(shape.num_tokens), heads, shape.head_dim), generator)
    pool = (pages, shape.num_groups, shape.block_size, shape.head_dim)
    k_MGBH, v_MGBH = _random(pool, generator), _random(pool, generator)
    scale = shape.head_dim**-0.5
    if case.operator == "dense":
        return functools.partial(dense_attention, q_TNH, k_MGBH, v_MGBH, *where, scale=scale), dense_work(shape)
    draw = {"correlated": correlated_blocks, "random": random_blocks}[case.selection]
    block_TGK = draw(shape, generator)
    call = functools.partial(sparse_attention, q_TNH, k_MGBH, v_MGBH, *where, block_TGK, scale=scale)
    return call, sparse_work(shape, block_TGK)


def select_work(shape: PackedCase) -> Work:
    """Every index query meets every key it sees, and one byte a channel of each key's code is read once."""
    pairs = _visible_pairs(shape)
    flops = 2 * shape.num_groups * shape.index_dim * pairs
    return Work(flops, shape.index_dim * sum(shape.lengths), _limit(shape))


def sparse_work(shape: PackedCase, block_TGK: Tensor) -> Work:
    """Every query head meets the visible keys of its group's blocks; keys and values of a block are read once."""
    flops = 4 * shape.heads_per_group * shape.head_dim * int(visible_keys(shape, block_TGK).sum())
    return Work(flops, 2 * shape.head_dim * _DTYPE.itemsize * union_keys(shape, block_TGK), _limit(shape))


def dense_work(shape: PackedCase) -> Work:
    """Every query head meets every key it sees; all keys and values are read once."""
    flops = 4 * shape.num_groups * shape.heads_per_group * shape.head_dim * _visible_pairs(shape)
    size = 2 * shape.num_groups * shape.head_dim * _DTYPE.itemsize
    return Work(flops, size * sum(shape.lengths), _limit(shape))


def require_memory(name: str, wanted: int) -> None:
    """Raise ConfigError where so many bytes cannot be had."""
    available = free_bytes()
    if available is not None and wanted > available:
        raise ConfigError(f"{name} needs {wanted / 2**30:.1f} GiB of memory; {available / 2**30:.1f} GiB are free")


def _limit(shape: PackedCase) -> str:
    """One token a request reads memory; more tokens share what is read, and compute."""
    return "read" if max(shape.num_tokens) == 1 else "gemm"


def _visible_pairs(shape: PackedCase) -> int:
    """Pairs of a token and a key that it sees."""
    return sum(n * length - n * (n - 1) // 2 for n, length in zip(shape.num_tokens, shape.lengths, strict=True))


def _key_bytes(case: Case) -> int:
    """Bytes that a key takes in the case's pools, codes included."""
    if case.operator == "select":
        return case.shape.index_dim * (_DTYPE.itemsize + 2)
    return 2 * case.shape.num_groups * case.shape.head_dim * _DTYPE.itemsize


def _where(shape: PackedCase, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Page table, starts and lengths; pages stand in the pool in random order."""
    counts = [-(-length // BLOCK) for length in shape.lengths]
    order = torch.randperm(sum(counts), generator=generator).to(torch.int32)
    page_RP = torch.full((len(counts), max(counts)), -1, dtype=torch.int32)
    for r, pages in enumerate(order.split(counts)):
        page_RP[r, : pages.shape[0]] = pages
    start_R1 = torch.tensor([0, *shape.num_tokens]).cumsum(0).to(torch.int32)
    return page_RP, start_R1, torch.tensor(shape.lengths, dtype=torch.int32)


def _random(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Normal numbers in bfloat16, as keys and queries are after their norms; on huge pages, as a model's pools are."""
    x = on_huge_pages(torch.empty(tuple(shape), dtype=_DTYPE))
    tile = torch.randn(min(_TILE, x.numel()), generator=generator).to(_DTYPE)
    for part in x.view(-1).split(_TILE):
        part.copy_(tile[: part.shape[0]])
    return x


def _forced(implementation: str, call: Callable[[], Tensor]) -> Tensor:
    with use(implementation):
        return call()
