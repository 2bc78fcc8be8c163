"""What the engine adds to its operators, and what it gains by serving many requests at a time.

- 16 requests behind one prefix of 8K, the first of them alone: how much sooner the others get their first token
- decoding 16 of them against one, and the part of a step that is spent outside of operators
- a turn of 500 tokens behind 128K cached ones, against the sum of its operators' times
- 8 prompts of 8K, 64 tokens each, against transformers' `generate` on the same weights, where it is installed

    pip install transformers==5.23.0
    python bench/serving.py [--model PATH] [--rounds N]

Prompts are random tokens, weights and cache float32. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
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

BATCH, PREFIX, TURN, CACHED = 16, 8192, 500, 128 << 10
GREEDY = SamplingParams(max_tokens=64, ignore_eos=True)


def words(model: Model, count: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(model.tokenizer.vocab_size) for _ in range(count)]


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
    """Tokens a second of some requests behind one prefix, and the part of a step outside of operators."""
    engine = Engine(model, EngineConfig(cache_tokens=60_000))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="m3-tiny", metavar="PATH", help="checkpoint folder, or m3-tiny (default)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns a median is taken of (default: 3)")
    args = parser.parse_args()
    model = load(args.model)
    rounds = range(args.rounds)
    found: dict[str, Any] = {"benchmark": "serving", "model": model.name, "threads": torch.get_num_threads()}
    firsts = [first_tokens(model) for _ in rounds]
    found["first_token"] = {name: statistics.median(run[name] for run in firsts) for name in firsts[0]}
    decoded = [{batch: decoding(model, batch) for batch in (1, BATCH)} for _ in rounds]
    for batch in (1, BATCH):
        found[f"decode_{batch}"] = {
            name: statistics.median(run[batch][name] for run in decoded) for name in decoded[0][1]
        }
    found["turn"] = turn(model)
    f, one, many = found["first_token"], found["decode_1"], found[f"decode_{BATCH}"]
    print(f"first token behind {PREFIX:,} cached tokens: alone {f['alone'] / f['cold']:.1%} of the cold one's "
          f"{f['cold']:.2f} s, {BATCH - 1} together {f['together'] / f['cold']:.1%}")  # fmt: skip
    print(f"decoding: {one['tokens_per_second']:,.0f} tokens a second, {BATCH} at a time "
          f"{many['tokens_per_second']:,.0f}, {many['tokens_per_second'] / one['tokens_per_second']:.1f}x; "
          f"outside of operators {many['outside_operators']:.1%}")  # fmt: skip
    print(f"{TURN} tokens behind {CACHED:,}: {found['turn']['whole']:.2f} s, "
          f"{found['turn']['whole'] / found['turn']['operators']:.2f}x its operators")  # fmt: skip
    if importlib.util.find_spec("transformers") is not None:
        prompts = [words(model, 8192, 100 + i) for i in range(8)]
        generate, seconds = theirs(model), {"openm3": [], "transformers": []}
        for _ in rounds:
            for name, way in (("openm3", lambda p: ours(model, p)), ("transformers", generate)):
                spent, replies = way(prompts)
                seconds[name].append(spent)
                found.setdefault("replies", {})[name] = replies
        mine, its = (found["replies"].pop(name) for name in ("openm3", "transformers"))
        found.pop("replies")
        same = sum(a == b for row, other in zip(mine, its, strict=True) for a, b in zip(row, other, strict=True))
        found["against_transformers"] = {
            **{name: 8 * GREEDY.max_tokens / statistics.median(times) for name, times in seconds.items()},
            "same_tokens": same / (8 * GREEDY.max_tokens),
        }
        t = found["against_transformers"]
        print(f"8 prompts of 8K: {t['openm3']:.1f} tokens a second, transformers {t['transformers']:.1f}, "
              f"{t['openm3'] / t['transformers']:.1f}x; {t['same_tokens']:.0%} of the tokens are the same")  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
