"""The sparse attention operators on a CUDA GPU: one layer of M3, against what people run today.

python bench/gpu/operators.py [--only PATTERN] [--out FILE] [--profile DIR] [--smoke]

Scan, selection and attention of one layer, a shard of four (16 query heads, one group) or the whole (64 and four), in
bfloat16. Calls are captured as CUDA graphs over several sets of queries, replayed in turns with the baselines, timed by
events on the device; medians. Neighbouring tokens' index queries are correlated, as real ones are, or random. Peaks are
measured in the same run: a product of 8,192 x 8,192 matrices, and a copy, counting bytes read and written.

--smoke runs tiny cases once, also on the CPU under TRITON_INTERPRET=1: whether it works, not how fast.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openm3.eval.report import table
from openm3.ops.attention import sparse_attention
from openm3.ops.dispatch import use
from openm3.ops.index import IndexCodes, encode_pages, new_codes, select_blocks
from openm3.ops.triton import described

sys.path.insert(0, str(Path(__file__).parent))
import baselines

BLOCK, WIDTH, SELECTED = 128, 128, 16
M = 1 << 20
SHARD, WHOLE = (16, 1), (64, 4)
Calls = Sequence[Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """`requests` of `tokens` tokens each behind `before` keys, and the milliseconds asked for, if any are."""

    name: str
    tokens: int
    requests: int
    before: int
    heads_and_groups: tuple[int, int]
    most_ms: float | None = None
    alike: bool = True
    width: int = WIDTH
    dtype: torch.dtype = torch.bfloat16

    @property
    def decodes(self) -> bool:
        return self.tokens <= 8

    @property
    def length(self) -> int:
        return self.before + self.tokens

    @property
    def scan_operations(self) -> int:
        """Of the index scan: every visible key against every group's query."""
        seen = self.tokens * self.before + self.tokens * (self.tokens + 1) // 2
        return 2 * self.requests * self.heads_and_groups[1] * self.width * seen

    @property
    def attention_operations(self) -> int:
        return (
            4 * self.requests * self.tokens * self.heads_and_groups[0] * self.width * min(SELECTED * BLOCK, self.length)
        )

    def bytes_read(self, index_bytes: float) -> float:
        """What decoding has to read: the index keys, at so many bytes a number, and the selected blocks."""
        keys = 2 * min(SELECTED * BLOCK, self.length) * self.heads_and_groups[1] * self.tokens
        return self.requests * self.width * (self.length * index_bytes + keys * self.dtype.itemsize)


CASES = (
    Case("shard_512_behind_1m", 512, 1, M - 512, SHARD, 1.0),
    Case("shard_512_behind_1m_random", 512, 1, M - 512, SHARD, alike=False),
    Case("shard_8192_behind_1m", 8192, 1, M - 8192, SHARD, 6.0),
    Case("shard_8192_behind_1m_random", 8192, 1, M - 8192, SHARD, alike=False),
    Case("shard_prefill_32k", 32768, 1, 0, SHARD, 2.0),
    Case("shard_decode_64_at_128k", 1, 64, 128 * 1024 - 1, SHARD, 0.30, alike=False),
    Case("shard_decode_1_at_1m", 1, 1, M - 1, SHARD, 0.08, alike=False),
    Case("whole_512_behind_1m", 512, 1, M - 512, WHOLE),
    Case("whole_8192_behind_1m", 8192, 1, M - 8192, WHOLE),
    Case("whole_prefill_32k", 32768, 1, 0, WHOLE),
    Case("whole_decode_64_at_128k", 1, 64, 128 * 1024 - 1, WHOLE, alike=False),
    Case("whole_decode_1_at_1m", 1, 1, M - 1, WHOLE, alike=False),
)
SMOKE = (
    Case("smoke_chunk", 10, 1, 2300, (4, 2), 1e9, width=16, dtype=torch.float32),
    Case("smoke_decode", 1, 2, 2399, (4, 2), alike=False, width=16, dtype=torch.float32),
)


@dataclass(frozen=True)
class Inputs:
    """One layer's pools and a batch, with several sets of queries to take turns."""

    q_TNH: list[Tensor]
    index_q_TGJ: list[Tensor]
    k_MGBH: Tensor
    v_MGBH: Tensor
    index_k_MBJ: Tensor
    codes: IndexCodes | None
    page_RP: Tensor
    start_R1: Tensor
    length_R: Tensor

    @property
    def where(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.page_RP, self.start_R1, self.length_R


def inputs(case: Case, device: torch.device, sets: int) -> Inputs:
    """Normal numbers; pages in random order."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=case.dtype)

    (heads, groups), pages = case.heads_and_groups, -(-case.length // BLOCK)
    total, count = case.tokens * case.requests, pages * case.requests
    index_k_MBJ = normal(count, BLOCK, case.width)
    codes = new_codes(index_k_MBJ) if case.decodes else None
    if codes is not None:
        encode_pages(index_k_MBJ, torch.arange(0, count * BLOCK, BLOCK, device=device), codes)
    order = torch.randperm(count, generator=generator, device=device).to(torch.int32)
    return Inputs(
        [normal(total, heads, case.width) for _ in range(sets)],
        [
            _neighbours(normal(total, groups, case.width)) if case.alike else normal(total, groups, case.width)
            for _ in range(sets)
        ],
        normal(count, groups, BLOCK, case.width),
        normal(count, groups, BLOCK, case.width),
        index_k_MBJ,
        codes,
        order.view(case.requests, pages),
        torch.arange(0, total + 1, case.tokens, device=device, dtype=torch.int32),
        torch.full((case.requests,), case.length, device=device, dtype=torch.int32),
    )


def _neighbours(x_TGJ: Tensor) -> Tensor:
    """Queries that turn slowly from token to token: a walk whose directions keep 0.5 of themselves over 64 tokens."""
    keep = 0.5 ** (1 / 64)
    span = min(512, x_TGJ.shape[0])
    weight_S = keep ** torch.arange(span, device=x_TGJ.device, dtype=torch.float32)
    flat_1XT = x_TGJ.float().flatten(1).T[:, None]
    padded = torch.nn.functional.pad(flat_1XT, (span - 1, 0))
    mixed_XT = torch.nn.functional.conv1d(padded, weight_S.flip(0)[None, None])[:, 0]
    return (mixed_XT.T * (1 - keep**2) ** 0.5).contiguous().view(x_TGJ.shape).to(x_TGJ.dtype)


@dataclass
class Result:
    """What was measured of one case, in milliseconds a call by name, and what it was held against."""

    case: str
    ms: dict[str, float]
    sharing: float
    agrees: bool
    largest_difference: float
    shares: dict[str, float] = field(default_factory=dict)


def measure(case: Case, device: torch.device, repeats: int, profile: Path | None = None) -> Result:
    """Times the operators and the baselines on one case, after checking that they agree."""
    data = inputs(case, device, sets=4 if device.type == "cuda" else 1)
    scale, sets = case.width**-0.5, range(len(data.q_TNH))
    keys = data.k_MGBH, data.v_MGBH

    def select(i: int, codes: IndexCodes | None) -> Tensor:
        return select_blocks(data.index_q_TGJ[i], data.index_k_MBJ, *data.where, num_selected=SELECTED, codes=codes)

    def attend(i: int, block_TGK: Tensor) -> Tensor:
        return sparse_attention(data.q_TNH[i], *keys, *data.where, block_TGK, scale=scale)

    def block_major(i: int, block_TGK: Tensor) -> Tensor:
        with baselines.block_major_everywhere():
            return attend(i, block_TGK)

    def theirs(i: int) -> Tensor:
        block_TGK = baselines.query_major_blocks(
            data.index_q_TGJ[i], data.index_k_MBJ, data.page_RP, case.length, SELECTED
        )
        return their_attention(i, block_TGK)

    def their_attention(i: int, block_TGK: Tensor) -> Tensor:
        return baselines.query_major_attention(data.q_TNH[i], *keys, data.page_RP, case.length, block_TGK, scale)

    def each(call: Callable[[int], object]) -> Calls:
        return [functools.partial(call, i) for i in sets]

    blocks = [select(i, data.codes) for i in sets]
    their_blocks = baselines.query_major_blocks(
        data.index_q_TGJ[0], data.index_k_MBJ, data.page_RP, case.length, SELECTED
    )
    difference = (attend(0, blocks[0]).float() - their_attention(0, blocks[0]).float()).abs().max()
    same = torch.equal(blocks[0], their_blocks) and torch.equal(select(0, None), their_blocks)
    named = {
        "total": each(lambda i: attend(i, select(i, data.codes))),
        "select": each(lambda i: select(i, data.codes)),
        "attend": each(lambda i: attend(i, blocks[i])),
        "query-major": each(theirs),
        "query-major attend": each(lambda i: their_attention(i, blocks[i])),
    }
    if not case.decodes:
        named["block-major attend"] = each(lambda i: block_major(i, blocks[i]))
    if data.codes is not None:
        named["select without codes"] = each(lambda i: select(i, None))
    if profile is not None:
        _profiled(named["total"], profile / f"{case.name}.json")
    return Result(case.name, timed(named, device, repeats), sharing(blocks[0], case.tokens), same, float(difference))


def sharing(block_TGK: Tensor, tokens: int) -> float:
    """How many different blocks eight neighbours of a request and group choose, over what one chooses."""
    tokens = min(tokens, block_TGK.shape[0]) // 8 * 8
    if tokens == 0:
        return 1.0
    united = [
        len(set(block_TGK[first : first + 8, 0].flatten().tolist()) - {-1}) for first in range(0, min(tokens, 512), 8)
    ]
    return sum(united) / len(united) / block_TGK.shape[2]


def timed(named: Mapping[str, Calls], device: torch.device, repeats: int) -> dict[str, float]:
    """Milliseconds of one call of each, medians over turns."""
    runs = {name: _captured(calls) if device.type == "cuda" else _in_turn(calls) for name, calls in named.items()}
    seconds: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(_clocked(run, device) / len(named[name]))
    return {name: 1000 * sorted(times)[len(times) // 2] for name, times in seconds.items()}


def _in_turn(calls: Calls) -> Callable[[], object]:
    return lambda: [call() for call in calls]


def _captured(calls: Calls) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _clocked(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    run()
    end_event.record()
    end_event.synchronize()
    return float(begin_event.elapsed_time(end_event)) / 1000


def _profiled(calls: Calls, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profile:
        _in_turn(calls)()
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(path))


def peaks(device: torch.device, repeats: int) -> dict[str, float]:
    """TFLOP/s of a bfloat16 product and GB/s of a copy."""
    on_gpu = device.type == "cuda"
    n, size = (8192, 1 << 32) if on_gpu else (256, 1 << 20)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source, target = (torch.empty(size, device=device, dtype=torch.uint8) for _ in range(2))
    ms = timed({"product": [lambda: a @ b] * 4, "copy": [lambda: target.copy_(source)] * 4}, device, repeats)
    return {"tflops": 2 * n**3 / ms["product"] / 1e9, "gbs": 2 * size / ms["copy"] / 1e6}


def against_dense(device: torch.device, repeats: int, small: bool) -> dict[str, dict[str, float]]:
    """Milliseconds behind a million tokens: sparse in M3's geometry, dense in its predecessor's, 48 and 8 heads."""
    length, width = (300, 16) if small else (M, WIDTH)
    dtype = torch.float32 if small else torch.bfloat16
    found = {}
    for name, tokens in (("prefill", 10 if small else 512), ("decode", 1)):
        shape = (4, 2) if small else WHOLE
        case = Case(name, tokens, 1, length - tokens, shape, width=width, dtype=dtype)
        sparse = measure(case, device, repeats).ms["total"]
        k_SGH, v_SGH = (torch.randn(length, 8, width, device=device, dtype=dtype) for _ in range(2))
        q_TNH = torch.randn(tokens, 48, width, device=device, dtype=dtype)
        ways: dict[str, Calls] = {}
        if device.type == "cuda":
            ways["flash"] = [functools.partial(baselines.dense_flash, q_TNH, k_SGH, v_SGH)]
            if baselines.has_flash_3():
                ways["flash 3"] = [functools.partial(baselines.dense_flash_3, q_TNH, k_SGH, v_SGH)]
        found[name] = {"sparse": sparse, **timed(ways, device, repeats)}
    return found


def report(
    results: Sequence[Result], cases: Sequence[Case], peak: Mapping[str, float], dense: Mapping[str, Any]
) -> str:
    """The tables, and what was asked with what was reached."""
    rows = []
    for result, case in zip(results, cases, strict=True):
        ms = result.ms
        if case.decodes:
            coded = 1.0 if "select without codes" in ms else case.dtype.itemsize
            result.shares["bandwidth"] = case.bytes_read(coded) / ms["total"] / 1e6 / peak["gbs"]
            share = f"{result.shares['bandwidth']:.0%} of copy"
        else:
            operations = case.scan_operations + case.attention_operations
            result.shares["products"] = operations / ms["total"] / 1e9 / peak["tflops"]
            result.shares["attention products"] = case.attention_operations / ms["attend"] / 1e9 / peak["tflops"]
            share = f"{result.shares['products']:.0%} of products"
        asked = "" if case.most_ms is None else f"{case.most_ms:g}"
        reached = "" if case.most_ms is None else ("yes" if ms["total"] <= case.most_ms else "NO")
        numbers = (f"{ms[name]:.3f}" for name in ("select", "attend", "total"))
        pairs = ("query-major", "total"), ("query-major attend", "attend"), ("block-major attend", "attend")
        ratios = (f"{ms[theirs] / ms[ours]:.1f}x" if theirs in ms else "" for theirs, ours in pairs)
        agrees = "yes" if result.agrees else "NO"
        rows.append((case.name, *numbers, asked, reached, *ratios, share, f"{result.sharing:.1f}", agrees))
    head = (
        "case",
        "select ms",
        "attend ms",
        "total ms",
        "asked",
        "reached",
        "over query-major",
        "attention alone",
        "over block-major",
        "share",
        "union/K",
        "agrees",
    )
    lines = [table(head, rows, "<>>>>^>>>>>^"), ""]
    lines += [f"peaks: {peak['tflops']:.0f} TFLOP/s of bfloat16 products, {peak['gbs']:.0f} GB/s copied", ""]
    for name, asked in (("prefill", 9.7), ("decode", 15.6)):
        ms = dense[name]
        ways = ", ".join(
            f"{way} {time:.2f} ms ({time / ms['sparse']:.1f}x)" for way, time in ms.items() if way != "sparse"
        )
        lines.append(f"{name} behind 1M: sparse {ms['sparse']:.3f} ms, dense {ways or 'not measured'}; asked {asked}x")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", default="*", help="cases whose name fits, such as 'shard_decode*'")
    parser.add_argument("--out", metavar="FILE", type=Path, help="also write the JSON line here")
    parser.add_argument("--profile", metavar="DIR", type=Path, help="write a trace of each case for chrome://tracing")
    parser.add_argument("--repeats", metavar="N", type=int, default=15, help="turns a median is taken of (default: 15)")
    parser.add_argument("--smoke", action="store_true", help="tiny cases, once, also without a GPU")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA GPU (--smoke runs on a CPU, under TRITON_INTERPRET=1)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = [case for case in (SMOKE if args.smoke else CASES) if fnmatch.fnmatchcase(case.name, args.only)]
    repeats = 1 if args.smoke else args.repeats
    with use("triton") if device.type == "cpu" else nullcontext(), torch.inference_mode():
        peak = peaks(device, repeats)
        results = []
        for case in cases:
            print(f"measuring {case.name}", file=sys.stderr, flush=True)
            results.append(measure(case, device, repeats, args.profile))
            if device.type == "cuda":
                torch.cuda.empty_cache()
        dense = against_dense(device, repeats, args.smoke)
    print(report(results, cases, peak, dense))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, interpreted"
    line = {
        "benchmark": "gpu operators",
        "device": name,
        "torch": torch.__version__,
        "triton": described(),
        "peaks": peak,
        "cases": [asdict(result) for result in results],
        "dense": dense,
    }
    text = json.dumps(line)
    if args.out is not None:
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
