"""What the compiler makes of the Triton kernels for a Hopper GPU, wherever this runs: no GPU is needed.

python bench/kernels.py [--json] [--only NAME]

Programs at once are those that registers and shared memory allow on one of 132 multiprocessors; stack bytes are
registers that did not fit. Products and copies are counted where they stand in the code.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from openm3.eval.report import table
from openm3.ops.attention import dense_attention, sparse_attention
from openm3.ops.cache import HeadNorms, Pool, Projections, write_heads, write_pages
from openm3.ops.dispatch import use
from openm3.ops.experts import experts, route, swiglu
from openm3.ops.index import IndexCodes, select_blocks
from openm3.ops.norm import norm_rotate, rms_norm
from openm3.ops.sample import SAMPLE, SampleParams

WIDTH, SELECTED, HIDDEN = 128, 16, 6144
"""M3's head and index width, selected blocks, and model width."""

EXPERTS, ACTIVE, INNER, VOCABULARY = 128, 4, 3072, 200_064
"""Its experts, how many a token takes, and how wide they are where a shard does not hold a fourth of each."""

SHAPES = {
    "shard: 512 tokens behind 1M": (512, 1, 8192, 16, 1),
    "shard: 8,192 tokens behind 1M": (8192, 1, 8192, 16, 1),
    "whole: 512 tokens behind 128K": (512, 1, 1024, 64, 4),
    "shard: 64 requests at 128K": (64, 64, 1024, 16, 1),
    "whole: 1 request at 1M": (1, 1, 8192, 64, 4),
}
"""Tokens, requests, blocks of a request, query heads, groups: one shard of four, or the whole model."""


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(tokens: int, requests: int, blocks: int, heads: int, groups: int) -> dict[str, Callable[[], Any]]:
    """What one sparse layer and the sampler do with a step of these sizes, by operator."""
    pages = requests * blocks
    where = tuple(meta(*shape, dtype=torch.int32) for shape in ((requests, blocks), (requests + 1,), (requests,)))
    q_TNH, k_TGH, index_q_TGJ = meta(tokens, heads, WIDTH), meta(tokens, groups, WIDTH), meta(tokens, groups, WIDTH)
    codes = IndexCodes(meta(pages, 128 * WIDTH, dtype=torch.int8), meta(pages, 3, dtype=torch.float32))
    pool = Pool(*(meta(pages, groups, 128, WIDTH) for _ in range(2)), meta(pages, 128, WIDTH), codes)
    rope = [meta(tokens, WIDTH // 4, dtype=torch.float32) for _ in range(2)]
    chosen = meta(tokens, groups, SELECTED, dtype=torch.int32)
    keys = q_TNH, pool.k_MGBH, pool.v_MGBH, *where
    slot_T = meta(tokens, dtype=torch.int64)
    heads = Projections(q_TNH, k_TGH, k_TGH, index_q_TGJ, index_q_TGJ[:, 0])
    norms = HeadNorms(*(meta(WIDTH) for _ in range(4)))
    x_TD, inner = meta(tokens, HIDDEN), INNER * groups // 4
    router_ED = meta(EXPERTS, HIDDEN, dtype=torch.float32)
    routed = (meta(tokens, ACTIVE, dtype=dtype) for dtype in (torch.int32, torch.float32))
    weights = meta(EXPERTS, 2 * inner, HIDDEN), meta(EXPERTS, HIDDEN, inner)
    logit_RV = meta(requests, VOCABULARY, dtype=torch.float32)
    return {
        "rms_norm": lambda: rms_norm(x_TD, meta(HIDDEN), 1e-6),
        "norm_rotate": lambda: norm_rotate(q_TNH, meta(WIDTH), *rope, 1e-6),
        "write_pages": lambda: write_pages(k_TGH, k_TGH, index_q_TGJ[:, 0], pool, slot_T),
        "select_blocks": lambda: select_blocks(index_q_TGJ, pool.index_k_MBJ, *where),  # type: ignore[arg-type]
        "select_blocks by codes": lambda: select_blocks(index_q_TGJ, pool.index_k_MBJ, *where, codes=codes),  # type: ignore[arg-type]
        "sparse_attention": lambda: sparse_attention(*keys, chosen, scale=0.1),
        "dense_attention": lambda: dense_attention(*keys, scale=0.1),
        "write_heads": lambda: write_heads(heads, norms, (rope[0], rope[1]), 1e-6, pool, slot_T),
        "route": lambda: route(x_TD, router_ED, router_ED[:, 0], ACTIVE),
        "experts": lambda: experts(x_TD, *routed, *weights, alpha=1.702, limit=7.0),
        "swiglu": lambda: swiglu(meta(tokens, 2 * inner), alpha=1.702, limit=7.0),
        "sample": lambda: SAMPLE(logit_RV, SampleParams().values(logit_RV), (), ()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--only", metavar="NAME", help="only the operators whose name holds this")
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    from openm3.ops.triton.crosscompile import compiling

    found = []
    for shape, sizes in SHAPES.items():
        for operator, call in calls(*sizes).items():
            if args.only and args.only not in operator:
                continue
            with compiling() as kernels, use("triton"):
                call()
            found += [{"shape": shape, "operator": operator, "at_once": k.at_once, **asdict(k)} for k in kernels]
    if not args.json:
        for shape in SHAPES:
            rows = [_row(k) for k in found if k["shape"] == shape]
            head = "kernel", "programs", "warps", "registers", "stack bytes", "shared", "at once", "products", "copies"
            print(f"{shape}\n\n{table(head, rows, '<<>>>>><>')}\n")
    print(json.dumps({"benchmark": "kernels", "target": "sm_90", "kernels": found}))


def _row(kernel: dict[str, Any]) -> tuple[str, ...]:
    products = ", ".join(f"{count} {name}" for name, count in kernel["products"].items()) or "-"
    programs = " x ".join(map(str, kernel["grid"]))
    numbers = (str(kernel[name]) for name in ("num_warps", "registers", "stack_bytes", "shared_bytes", "at_once"))
    return kernel["name"].lstrip("_"), programs, *numbers, products, str(kernel["copies"])


if __name__ == "__main__":
    main()
