"""What this machine can do: float32 matrix products, memory reads, and how a call's time is taken beside them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

GEMM_SIZES = (1024, 1536, 2048)
READ_BYTES = 1 << 29
"""More than caches hold: what is summed to measure reads, and read before each timed call so that it starts cold."""


@dataclass(frozen=True)
class Peaks:
    """What this machine reached on its threads: float32 matrix products (GFLOP/s) and memory reads (GB/s)."""

    gflops: float
    gbytes: float

    def better(self, other: Peaks) -> Peaks:
        """The best of two measurements."""
        return Peaks(max(self.gflops, other.gflops), max(self.gbytes, other.gbytes))


@dataclass(frozen=True)
class Work:
    """What a call has to do: arithmetic operations, bytes read at least once, and which of them is its limit."""

    flops: int
    nbytes: int
    limit: str

    def share(self, seconds: float, peaks: Peaks) -> float:
        """The share of its limit's peak that a call of this length reached."""
        if self.limit == "gemm":
            return self.flops / seconds / 1e9 / peaks.gflops
        return self.nbytes / seconds / 1e9 / peaks.gbytes


def measure_peaks() -> Peaks:
    """The best of several products of square matrices, and of several sums over 512 MB."""
    best = 0.0
    with _exact_products():
        for size in GEMM_SIZES:
            a, b = torch.rand(size, size), torch.rand(size, size)
            product = partial(torch.mm, a, b, out=torch.empty(size, size))
            seconds = min(seconds_of(product) for _ in range(6))
            best = max(best, 2 * size**3 / seconds / 1e9)
    read = min(seconds_of(evict) for _ in range(6))
    return Peaks(best, READ_BYTES / read / 1e9)


def medians(
    calls: Mapping[str, Callable[[], object]], budget: float, *, least: int = 3, most: int = 50
) -> dict[str, float]:
    """Median seconds of each call: they take turns, each from cold caches, until `budget` seconds are spent.

    Every call runs once before, then `least` to `most` times. One that takes longer than the budget runs only once.
    """
    times: dict[str, list[float]] = {}
    for name, call in calls.items():
        seconds = seconds_of(call)
        if seconds > budget:
            times[name] = [seconds]
    waiting = {name: call for name, call in calls.items() if name not in times}
    begin, rounds = time.perf_counter(), 0
    while waiting and rounds < most and (rounds < least or time.perf_counter() - begin < budget):
        for name, call in waiting.items():
            evict()
            times.setdefault(name, []).append(seconds_of(call))
        rounds += 1
    return {name: statistics.median(times[name]) for name in calls}


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def evict() -> Tensor:
    """Read 512 MB, so that no earlier call's data is left in a cache."""
    return _wide().sum()


@cache
def _wide() -> Tensor:
    return torch.ones(READ_BYTES // 4)


@contextmanager
def _exact_products() -> Iterator[None]:
    """Products in float32 proper, whatever shortcuts the process allows elsewhere."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
