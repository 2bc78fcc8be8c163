"""m3-tiny on a CUDA GPU: tokens a second of prefill, and of decoding by captured steps and step by step.

python bench/gpu/decoding.py [--model PATH] [--length N]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from openm3.model.attention import Heads
from openm3.model.batch import Batch
from openm3.model.model import load

NEW = 128


def ignore(_layer: int, _heads: Heads, _batch: Batch) -> None:
    """An observer that sees nothing: observed steps are not captured."""


def seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="m3-tiny", metavar="PATH", help="checkpoint folder, or m3-tiny (default)")
    parser.add_argument("--length", type=int, default=32768, metavar="N", help="tokens to read (default: 32768)")
    args = parser.parse_args()
    model = load(args.model, device="cuda", dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.tokenizer.vocab_size, (args.length,), generator=generator).tolist()
    session = model.session(len(ids) + NEW)
    found: dict[str, float] = {}
    for _ in range(2):  # Kernels are compiled and steps captured in the first round.
        session.rewind(0)
        found["prefill"] = len(ids) / seconds(lambda: session.read(ids, chunk=8192))
        for name, observer in (("captured", None), ("step by step", ignore)):
            session.rewind(len(ids) - 1)
            logit_V = session.read(ids[-1:])
            spent = seconds(lambda logit_V=logit_V, observer=observer: list(session.decode(logit_V, NEW, observer)))
            found[name] = (NEW - 1) / spent
    for name, speed in found.items():
        print(f"{name}: {speed:,.0f} tokens a second")
    print(
        json.dumps({"benchmark": "gpu decoding", "model": model.name, "length": len(ids), "tokens_per_second": found})
    )


if __name__ == "__main__":
    main()
