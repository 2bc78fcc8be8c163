"""`openm3 bench`: how fast operators and models run here, beside what the machine could do.

The peaks are measured in the same run: float32 matrix products and memory reads. The cost model counts operations.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from openm3.config import BLOCK, ModelConfig
from openm3.errors import ConfigError
from openm3.eval.report import table, tokens
from openm3.model import cost
from openm3.model.model import Model, load
from openm3.ops.attention import sparse_attention
from openm3.ops.index import select_blocks

CHUNK = 512
"""Tokens of the chunk that operators are timed on, at the end of the context."""

DECODED = 32


@dataclass(frozen=True)
class Peaks:
    """What this machine reached on its threads: float32 matrix products (GFLOP/s) and memory reads (GB/s)."""

    gflops: float
    gbytes: float


@dataclass(frozen=True)
class Timing:
    """One measurement: tokens a second, and the share of the peak (of `limit`: arithmetic or memory) that this is."""

    what: str
    context: int
    tokens_per_second: float
    share: float
    limit: str


def run(args: argparse.Namespace) -> int:
    """Measure, and print a table or one JSON line."""
    if args.threads:
        torch.set_num_threads(args.threads)
    model = load(args.model)
    longest, limit = max(args.lengths) + DECODED, model.config.max_positions
    if longest > limit:
        raise ConfigError(f"{longest} tokens (with {DECODED} decoded) exceed the model's limit of {limit}")
    peaks = measure_peaks()
    measure = model_timings if args.subject == "model" else operator_timings
    timings = [timing for length in args.lengths for timing in measure(model, length, peaks)]
    if args.json:
        machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
        rows = [asdict(timing) for timing in timings]
        print(
            json.dumps({"model": model.name, **machine, "torch": torch.__version__, **asdict(peaks), "timings": rows})
        )
    else:
        print(render(timings, peaks))
    return 0


def measure_peaks() -> Peaks:
    """The best of a few products of 1024 x 1024 matrices, and of a few sums over 256 MB."""
    a, b = torch.rand(1024, 1024), torch.rand(1024, 1024)
    wide = torch.rand(1 << 26)
    product = min(_seconds(lambda: a @ b) for _ in range(8))
    read = min(_seconds(lambda: wide.sum()) for _ in range(4))
    return Peaks(2 * 1024**3 / product / 1e9, wide.nbytes / read / 1e9)


def model_timings(model: Model, context: int, peaks: Peaks) -> Iterator[Timing]:
    """Reading a prompt of `context` tokens, and decoding behind it."""
    ids = torch.randint(model.config.vocab_size, (context,), generator=torch.Generator().manual_seed(0)).tolist()
    session = model.session(context + DECODED)
    begin = time.perf_counter()
    logit_V = session.read(ids)
    read = time.perf_counter() - begin
    yield Timing(
        "prefill", context, context / read, _prefill_flops(model.config, context) / read / 1e9 / peaks.gflops, "GFLOP/s"
    )
    begin = time.perf_counter()
    count = sum(1 for _ in session.decode(logit_V, DECODED))
    step = (time.perf_counter() - begin) / (count - 1)
    size = model.network.embed.weight.itemsize
    moved = cost.bytes_per_token(model.config, context, weight_bytes=size, cache_bytes=size)["total"]
    yield Timing("decode", context, 1 / step, moved / step / 1e9 / peaks.gbytes, "GB/s")


def operator_timings(model: Model, context: int, peaks: Peaks) -> Iterator[Timing]:
    """One layer's selection and sparse attention for the last chunk of `context` tokens, on random values."""
    c, generator = model.config, torch.Generator().manual_seed(0)
    count, pages = min(CHUNK, context), -(-context // BLOCK)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    where = (torch.arange(pages, dtype=torch.int32)[None], torch.tensor([0, count]), torch.tensor([context]))
    index_q_TGJ, index_k_MBJ = random(count, c.num_groups, c.index_dim), random(pages, BLOCK, c.index_dim)
    q_TNH = random(count, c.num_heads, c.head_dim)
    k_MGBH, v_MGBH = random(pages, c.num_groups, BLOCK, c.head_dim), random(pages, c.num_groups, BLOCK, c.head_dim)

    def select() -> torch.Tensor:
        return select_blocks(index_q_TGJ, index_k_MBJ, *where, num_selected=c.num_selected, num_local=c.num_local)

    block_TGK = select()
    # Where every block is taken, nothing is scanned.
    scan = 2 * c.num_groups * c.index_dim * context * count if pages > c.num_selected else 0
    attention = 4 * c.num_heads * c.head_dim * cost.attended_tokens(c, context) * count
    calls: list[tuple[str, int, Callable[[], object]]] = [
        ("select_blocks", scan, select),
        (
            "sparse_attention",
            attention,
            lambda: sparse_attention(q_TNH, k_MGBH, v_MGBH, *where, block_TGK, scale=c.head_dim**-0.5),
        ),
    ]
    for name, flops, call in calls:
        seconds = min(_seconds(call) for _ in range(3))
        yield Timing(name, context, count / seconds, flops / seconds / 1e9 / peaks.gflops, "GFLOP/s")


def render(timings: list[Timing], peaks: Peaks) -> str:
    """The measurements as a table under the machine's peaks."""
    rows = [[t.what, tokens(t.context), f"{t.tokens_per_second:,.1f}", f"{t.share:.1%} of {t.limit}"] for t in timings]
    title = f"Measured peaks: {peaks.gflops:.0f} GFLOP/s in float32 products, {peaks.gbytes:.1f} GB/s read"
    return f"{title} ({torch.get_num_threads()} threads)\n\n" + table(
        ["what", "context", "tokens/s", "share of peak"], rows, "<>>>"
    )


def _prefill_flops(config: ModelConfig, context: int) -> int:
    """Operations to read a prompt: every token at the context it sees (in steps of a block), and the head once."""
    flops = 0
    for end in range(BLOCK, context + BLOCK, BLOCK):
        parts = cost.flops_per_token(config, min(end, context))
        flops += (parts["total"] - parts["head"]) * min(BLOCK, context - end + BLOCK)
    return flops + cost.flops_per_token(config, 1)["head"]


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
