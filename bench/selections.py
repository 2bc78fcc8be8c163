"""How much neighbouring tokens share of their selections: m3-tiny on a held-out haystack, and what benchmarks draw.

python bench/selections.py --length 65536
"""

from __future__ import annotations

import argparse
import json

import torch
from torch import Tensor

from openm3.eval.bench_ops import behind
from openm3.eval.bench_selections import Sharing, correlated_blocks, sharing
from openm3.eval.haystack import Counts, HaystackMaker
from openm3.eval.report import progress, table, tokens
from openm3.model.attention import Heads
from openm3.model.batch import Batch
from openm3.model.model import Model, load
from openm3.model.session import CHUNK
from openm3.ops.cases import random_blocks

LAST = 2048
"""The tokens at the end of the haystack that are looked at."""


def traced(model: Model, length: int, seed: int) -> dict[int, Tensor]:
    """The selections of a haystack's last tokens, by layer."""
    haystack = HaystackMaker(model.tokenizer, seed).make(length, 0, Counts(pass_keys=4, quotes=4, absences=0))
    ids = haystack.prompt(model.tokenizer, haystack.asked[0].question.text)[:length]
    session = model.session(len(ids))
    blocks: dict[int, list[Tensor]] = {}

    def observer(layer: int, heads: Heads, _batch: Batch) -> None:
        if heads.block_TGK is not None:
            blocks.setdefault(layer, []).append(heads.block_TGK.clone())

    with progress() as bar:
        task = bar.add_task("reading", total=len(ids))
        for first in range(0, len(ids), CHUNK):
            part = ids[first : first + CHUNK]
            session.read(part, observer=observer if first + len(part) > len(ids) - LAST else None)
            bar.advance(task, len(part))
    return {layer: torch.cat(parts)[-LAST:] for layer, parts in blocks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="m3-tiny", metavar="PATH", help="checkpoint folder, or m3-tiny (default)")
    parser.add_argument("--length", type=int, default=65536, metavar="N", help="tokens to read (default: 65536)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of haystack and draws (default: 0)")
    args = parser.parse_args()
    model = load(args.model)
    found: dict[str, Sharing] = {}
    layers = {f"layer {i}": sharing(blocks) for i, blocks in traced(model, args.length, args.seed).items()}
    found |= layers
    columns = zip(*((s.next, s.union_64, s.union_128) for s in layers.values()), strict=True)
    found[model.name] = Sharing(*(sum(column) / len(layers) for column in columns))
    case = behind("drawn", LAST, args.length - LAST)
    for name, draw in (("correlated", correlated_blocks), ("random", random_blocks)):
        found[f"drawn, {name}"] = sharing(draw(case, torch.Generator().manual_seed(args.seed)))
    rows = [[name, f"{s.next:.1%}", f"{s.union_64:.2f}", f"{s.union_128:.2f}"] for name, s in found.items()]
    head = ["selections", "shared with the next token", "blocks of 64 tokens", "blocks of 128 tokens"]
    print(f"The last {LAST:,} of {tokens(args.length)} tokens; blocks in multiples of what one token selects\n")
    print(table(head, rows, "<>>>") + "\n")
    print(json.dumps({name: vars(s) for name, s in found.items()}))


if __name__ == "__main__":
    main()
