"""What the engine adds to its operators, and what it gains by serving many requests at a time.

- 16 requests behind one prefix of 8K, the first of them alone: how much sooner the others get their first token
- decoding 16 of them against one, and the part of a step that is spent outside of operators
- a turn of 500 tokens behind 128K cached ones, against the sum of its operators' times
- 8 prompts of 8K, 64 tokens each, against transformers' `generate` on the same weights, where it is installed

    pip install transformers==5.23.0
    python bench/serving.py [--model PATH] [--rounds N]

Prompts are source code, weights and cache float32. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import random
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from openm3.config import EngineConfig
from openm3.engine.engine import Engine
from openm3.engine.request import SamplingParams
from openm3.eval.bench_model import fill
from openm3.model.model import Model, load
from openm3.model.session import Session
from openm3.ops.dispatch import timed
from openm3.train.corpus import standard_library

BATCH, PREFIX, TURN, CACHED = 16, 8192, 500, 128 << 10
GREEDY = SamplingParams(max_tokens=64, ignore_eos=True)


@functools.cache
def text(model: Model) -> list[int]:
    """Source code that m3-tiny was not trained on."""
    ids: list[int] = []
    for source in standard_library(held_out=True, tests=False):
        ids += model.tokenizer.encode(source.text)
        if len(ids) > 300_000:
            break
    return ids


def words(model: Model, count: int, seed: int) -> list[int]:
    """Some of it, from a place that the seed chooses."""
    ids = text(model)
    first = random.Random(seed).randrange(len(ids) - count)
    return ids[first : first + count]


def first_tokens(model: Model) -> dict[str, float]:
    """Seconds to the first token: cold, and of 15 requests that come together behind the cached prefix."""
    engine = Engine(model, EngineConfig(cache_tokens=60_000))
    prefix = words(model, PREFIX, 1)
    prompts = [prefix + words(model, 60, 10 + i) for i in range(BATCH)]
    (cold,) = engine.generate(prompts[:1], GREEDY)
    warm = engine.generate(prompts[1:], GREEDY)
    alone = engine.generate([prefix + words(model, 60, 99)], GREEDY)[0]
    return {
        "cold": cold.timings.first_token,
        "together": statistics.median(reply.timings.first_token for reply in warm),
        "alone": alone.timings.first_token,
    }


def decoding(model: Model, batch: int, steps: int = 30) -> dict[str, float]:
    """Tokens a second of requests behind one prefix, without drafts, and the part of a step outside of operators."""
    engine = Engine(model, EngineConfig(cache_tokens=60_000, draft_tokens=0))
    prefix = words(model, PREFIX, 1)
    engine.generate([prefix], SamplingParams(max_tokens=1))
    for i in range(batch):
        engine.add(prefix + words(model, 60, 10 + i), SamplingParams(max_tokens=3 * steps, ignore_eos=True))
    while any(request.remaining > 1 for request in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    for _ in range(3):
        engine.step()
    whole = [clocked(engine.step) for _ in range(steps)]
    shares = []
    for _ in range(steps):
        with timed() as seconds:
            spent = clocked(engine.step)
        shares.append(1 - sum(seconds.values()) / spent)
    return {"tokens_per_second": batch / statistics.median(whole), "outside_operators": statistics.median(shares)}


def turn(model: Model) -> dict[str, float]:
    """Seconds of 500 tokens behind 128K, and of the operators in it."""
    session = Session(model.network, CACHED + TURN)
    fill(session, CACHED)
    ids = words(model, TURN, 5)
    found: dict[str, list[float]] = {"whole": [], "operators": []}
    for _ in range(5):
        session.rewind(CACHED)
        found["whole"].append(clocked(lambda: session.read(ids)))
        session.rewind(CACHED)
        with timed() as seconds:
            session.read(ids)
        found["operators"].append(sum(seconds.values()))
    return {name: statistics.median(times) for name, times in found.items()}


def clocked(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def ours(model: Model, prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
    engine = Engine(model, EngineConfig(cache_tokens=80_000))
    begin = time.perf_counter()
    replies = engine.generate(prompts, GREEDY)
    return time.perf_counter() - begin, [reply.ids for reply in replies]


def theirs(model: Model) -> Callable[[list[list[int]]], tuple[float, list[list[int]]]]:
    """transformers' `generate` of a batch, its prompts read in chunks of 512 tokens: all at once needs 20 GiB."""
    from engines.hugging_face import _NAMES
    from transformers.models.minimax_m3_vl.configuration_minimax_m3_vl import MiniMaxM3VLTextConfig
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLForCausalLM

    values = dict(model.config.to_hf()["text_config"])
    del values["architectures"]
    peer = MiniMaxM3VLForCausalLM(MiniMaxM3VLTextConfig(**values, attn_implementation="sdpa")).eval()
    weights = {}
    for name, value in model.network.state_dict().items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        weights[name] = value
    peer.load_state_dict(weights)

    def generate(prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
        begin = time.perf_counter()
        with torch.inference_mode():
            ids = peer.generate(
                torch.tensor(prompts),
                max_new_tokens=GREEDY.max_tokens,
                min_new_tokens=GREEDY.max_tokens,
                do_sample=False,
                prefill_chunk_size=512,
            )
        return time.perf_counter() - begin, ids[:, len(prompts[0]) :].tolist()

    return generate


def against_transformers(model: Model, rounds: int) -> dict[str, float]:
    """Tokens a second of both, and the part of the tokens that are the same."""
    prompts, generate = [words(model, 8192, 100 + i) for i in range(8)], theirs(model)
    seconds: dict[str, list[float]] = {"openm3": [], "transformers": []}
    for _ in range(rounds):
        spent, mine = ours(model, prompts)
        seconds["openm3"].append(spent)
        spent, its = generate(prompts)
        seconds["transformers"].append(spent)
    written = len(prompts) * GREEDY.max_tokens
    same = sum(a == b for row, other in zip(mine, its, strict=True) for a, b in zip(row, other, strict=True))
    return {name: written / statistics.median(times) for name, times in seconds.items()} | {"same": same / written}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="m3-tiny", metavar="PATH", help="checkpoint folder, or m3-tiny (default)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns a median is taken of (default: 3)")
    args = parser.parse_args()
    model = load(args.model)

    def median(measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        runs = [measure() for _ in range(args.rounds)]
        return {name: statistics.median(run[name] for run in runs) for name in runs[0]}

    first, one = median(lambda: first_tokens(model)), median(lambda: decoding(model, 1))
    many, behind = median(lambda: decoding(model, BATCH)), turn(model)
    speeds = one["tokens_per_second"], many["tokens_per_second"]
    cold, cached, together = (first[name] for name in ("cold", "alone", "together"))
    print(f"first token behind {PREFIX:,} tokens: {cold:.2f} s cold, cached {cached / cold:.1%} of that;")
    print(f"{together / cold:.1%} each when {BATCH - 1} come together")
    print(f"decoding: {speeds[0]:,.0f} tokens a second, {speeds[1]:,.0f} for {BATCH}: {speeds[1] / speeds[0]:.1f}x;")
    print(f"outside of operators {one['outside_operators']:.1%} and {many['outside_operators']:.1%} of a step")
    ratio = behind["whole"] / behind["operators"]
    print(f"{TURN} tokens behind {CACHED:,}: {behind['whole']:.2f} s, {ratio:.2f}x the time of their operators")
    found = {"first_token": first, "decode_1": one, f"decode_{BATCH}": many, "turn": behind}
    if importlib.util.find_spec("transformers") is not None:
        both = found["against_transformers"] = against_transformers(model, args.rounds)
        mine, its = both["openm3"], both["transformers"]
        print(f"8 prompts of 8K: {mine:.1f} tokens a second, transformers {its:.1f}, {mine / its:.1f}x;")
        print(f"{both['same']:.0%} of the tokens are the same")
    print(json.dumps({"benchmark": "serving", "model": model.name, "threads": torch.get_num_threads(), **found}))


if __name__ == "__main__":
    main()
