"""What drafts out of the text gain: questions that ask for a quote, and text that goes on, with and without drafts.

python bench/drafts.py [--model PATH] [--length N] [--questions N]

Each reply is written once for each number of draft tokens, in turns; what is compared are the seconds after the first
token. The replies are the same. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics

from openm3.config import EngineConfig
from openm3.engine.engine import Engine
from openm3.engine.request import SamplingParams
from openm3.eval.haystack import Counts, HaystackMaker
from openm3.eval.report import table
from openm3.model.model import load

DRAFTS = (0, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="m3-tiny", metavar="PATH", help="checkpoint folder, or m3-tiny (default)")
    parser.add_argument("--length", type=int, default=8192, metavar="N", help="tokens of a prompt (default: 8192)")
    parser.add_argument("--questions", type=int, default=10, metavar="N", help="of each kind (default: 10)")
    args = parser.parse_args()
    model = load(args.model)
    haystack = HaystackMaker(model.tokenizer, 0).make(args.length, 0, Counts(0, args.questions, 0))
    quotes = [haystack.prompt(model.tokenizer, asked.question.text) for asked in haystack.asked]
    plain = [ids[: args.length - 97 * i - 200] for i, ids in enumerate(quotes)]
    engines = {drafts: Engine(model, EngineConfig(cache_tokens=40_000, draft_tokens=drafts)) for drafts in DRAFTS}
    rows, found = [], {}
    for name, prompts, params in (
        ("quotes", quotes, SamplingParams(max_tokens=64)),
        ("source code that goes on", plain, SamplingParams(max_tokens=64, ignore_eos=True)),
    ):
        speeds: dict[int, list[float]] = {drafts: [] for drafts in DRAFTS}
        accepted: dict[int, list[float]] = {drafts: [] for drafts in DRAFTS}
        for prompt in prompts:
            replies = {drafts: engine.generate([prompt], params)[0] for drafts, engine in engines.items()}
            assert len({tuple(reply.ids) for reply in replies.values()}) == 1, "a draft changed a reply"
            for drafts, reply in replies.items():
                seconds = sum(reply.timings.between)
                if seconds:
                    speeds[drafts].append((reply.usage.completion_tokens - 1) / seconds)
                    accepted[drafts].append(reply.usage.accepted / max(1, reply.usage.drafted))
        median = {drafts: statistics.median(row) for drafts, row in speeds.items()}
        found[name] = {str(drafts): speed for drafts, speed in median.items()}
        for drafts in DRAFTS:
            share = f"{statistics.mean(accepted[drafts]):.0%}" if drafts else ""
            rows.append((name, str(drafts), f"{median[drafts]:.0f}", f"{median[drafts] / median[0]:.2f}x", share))
    print(table(("replies", "draft tokens", "tokens/s", "of none", "of the drafts right"), rows, "<>>>>"))
    print(json.dumps({"benchmark": "drafts", "model": model.name, "tokens_per_second": found}))


if __name__ == "__main__":
    main()
