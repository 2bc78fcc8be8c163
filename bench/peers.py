"""openm3, llama.cpp and transformers on the same weights, context and tokens, in turns.

Each engine runs in a process of its own on as many threads: an M3 of 8 layers (the first one dense), random bfloat16
weights, behind a context of random keys and values, the same in all three. What is timed: reading a chunk of 512 tokens
behind it, and decoding. Whether the engines computed the same thing is said by the cosine of their logits with those of
openm3 in float32, the median of some tokens: rounding changes near ties of a selection, and then all that follows.

    pip install transformers==5.23.0 llama-cpp-python==0.3.36 gguf
    python bench/peers.py --lengths 2048 8192 32768 131072

An engine that is not installed is left out. The last line of the output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from engines import CONFIG, Engine
from torch import Tensor

import openm3
from openm3.eval.bench_model import CHUNK, random_ids
from openm3.eval.report import progress, table, tokens

DECODED = 8
CHUNKS = ("scattered", "shared")
"""A chunk of random tokens, whose selections scatter, and one of a single repeated token, whose selections agree."""

REFERENCE = "openm3 in float32"
"""What every engine's logits are compared with."""

PACKAGES = {"openm3": ("torch",), "llama.cpp": ("llama-cpp-python", "gguf"), "transformers": ("transformers",)}
"""What an engine needs."""


def chunk_ids(kind: str, round_number: int) -> list[int]:
    ids = random_ids(CONFIG, CHUNK, seed=100 + round_number)
    return ids if kind == "scattered" else ids[:1] * CHUNK


def start(name: str) -> Engine:
    """An engine; its package is imported here and in no other process."""
    if name == "llama.cpp":
        from engines.llama import LlamaCpp

        return LlamaCpp()
    if name == "transformers":
        from engines.hugging_face import Transformers

        return Transformers()
    from engines.ours import OpenM3

    return OpenM3(torch.float32 if name == REFERENCE else torch.bfloat16)


def serve(name: str) -> None:
    """Be one engine: answer each line of standard input with one of standard output, both JSON."""
    # What a package prints goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = start(name)
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any] = {}
        if order["do"] == "fill":
            engine.fill(order["length"])
            # What only a first call does is not timed.
            engine.read(random_ids(CONFIG, 16))
            _forget_peak()
        elif order["do"] == "read":
            engine.rewind()
            begin = time.perf_counter()
            engine.read(order["ids"])
            answer = {"seconds": time.perf_counter() - begin}
        elif order["do"] == "decode":
            engine.rewind()
            times = []
            for token in order["ids"]:
                begin = time.perf_counter()
                engine.read([token])
                times.append(time.perf_counter() - begin)
            answer = {"seconds": times}
        elif order["do"] == "judge":
            answer = {"logits": [_logits_after(engine, token) for token in order["ids"]]}
        answer["peak"] = _peak_bytes()
        print(json.dumps(answer), file=answers, flush=True)


def _logits_after(engine: Engine, token: int) -> list[float]:
    engine.rewind()
    engine.read([token])
    return engine.logits()


def _forget_peak() -> None:
    """Let the peak of resident memory start anew, where the system can."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024


class Worker:
    """An engine in its own process."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, __file__, "--serve", name, "--threads", str(threads)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, text=True)

    def ask(self, **order: Any) -> dict[str, Any]:
        """Send an order, wait for its answer. Raises RuntimeError if the process ended instead."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps(order), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"{self.name} ended with code {self.process.wait()}; its own words are above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def missing(name: str) -> str | None:
    """What has to be installed for an engine, None if nothing."""
    for package in PACKAGES[name]:
        try:
            version(package)
        except PackageNotFoundError:
            return package
    return None


def reference_logits(length: int, threads: int) -> Tensor:
    """The logits of some single tokens behind `length` tokens, in float32."""
    worker = Worker(REFERENCE, threads)
    try:
        worker.ask(do="fill", length=length)
        return torch.tensor(worker.ask(do="judge", ids=random_ids(CONFIG, DECODED))["logits"])
    except RuntimeError as error:
        raise SystemExit(f"error: {error}") from None
    finally:
        worker.close()


def measure_length(workers: dict[str, Worker], length: int, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every worker's figures behind `length` tokens; one that fails is closed and left out from then on."""
    results: dict[str, dict[str, Any]] = {}
    times: dict[str, dict[str, list[float]]] = {}
    wanted = reference_logits(length, args.threads)

    def turn(name: str, order: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return workers[name].ask(**order)
        except RuntimeError as error:
            if name == "openm3":
                raise SystemExit(f"error: {error}") from None
            print(f"error: {error}; going on without it", file=sys.stderr)
            workers.pop(name).close()
            times.pop(name, None)
            return None

    for name in list(workers):
        if turn(name, {"do": "fill", "length": length}) is not None:
            times[name] = {what: [] for what in (*CHUNKS, "decode")}
    for round_number in range(args.rounds):
        begin = time.perf_counter()
        for what in (*CHUNKS, "decode"):
            ids = random_ids(CONFIG, DECODED, seed=round_number)
            order = {"do": "decode", "ids": ids}
            if what != "decode":
                order = {"do": "read", "ids": chunk_ids(what, round_number)}
            for name in list(times):
                if (answer := turn(name, order)) is None:
                    continue
                seconds = answer["seconds"]
                times[name][what] += seconds if isinstance(seconds, list) else [seconds]
                results[name] = {"peak_bytes": answer["peak"]}
        if time.perf_counter() - begin > args.patience:
            break
    for name in list(times):
        if (answer := turn(name, {"do": "judge", "ids": random_ids(CONFIG, DECODED)})) is not None:
            cosines = torch.cosine_similarity(torch.tensor(answer["logits"]), wanted, dim=1)
            results[name]["agreement"] = cosines.median().item()
    for name, measured in times.items():
        medians = {what: statistics.median(values) for what, values in measured.items()}
        results[name] |= {what: CHUNK / medians[what] for what in CHUNKS} | {"decode": 1 / medians["decode"]}
        if max(medians[what] for what in CHUNKS) > args.patience:
            workers.pop(name).close()
    return {name: results[name] for name in times}


def render(length: int, found: dict[str, dict[str, Any]], names: Sequence[str]) -> str:
    """A table of one length: a line for each thing timed, tokens a second of each engine, ours to theirs."""
    peers = [name for name in names if name != "openm3"]
    rows = []
    for what in (*CHUNKS, "decode"):
        title = "decode, tokens/s" if what == "decode" else f"read {CHUNK} {what}, tokens/s"
        rates = [f"{found[name][what]:,.1f}" if name in found else "" for name in names]
        ratios = [f"{found['openm3'][what] / found[name][what]:.1f}x" if name in found else "" for name in peers]
        rows.append([title, *rates, *ratios])
    for title, key, unit in (("peak memory, GiB", "peak_bytes", 2**30), ("cosine of logits", "agreement", 1)):
        values = [f"{found[name][key] / unit:.{2 if unit > 1 else 4}f}" if name in found else "" for name in names]
        rows.append([title, *values, *[""] * len(peers)])
    head = [f"behind {tokens(length)} tokens", *names, *(f"openm3 to {name}" for name in peers)]
    return table(head, rows, "<" + ">" * (len(head) - 1))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[2048, 8192, 32768, 131072], metavar="N", help="tokens of context"
    )
    parser.add_argument("--engines", nargs="+", choices=PACKAGES, default=list(PACKAGES), help="which (default: all)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of each engine")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every engine at every length (default: 3)")
    parser.add_argument(
        "--patience",
        type=float,
        default=120,
        metavar="SECONDS",
        help="no second turn after one this long, and no longer context after such a chunk (default: 120)",
    )
    parser.add_argument("--serve", choices=[*PACKAGES, REFERENCE], help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    torch.set_num_threads(args.threads)
    if args.serve:
        serve(args.serve)
        return
    names = ["openm3", *(name for name in args.engines if name != "openm3")]
    for name in list(names):
        if (package := missing(name)) is not None:
            print(f"{name} is left out: `pip install {package}` adds it", file=sys.stderr)
            names.remove(name)
    workers = {name: Worker(name, args.threads) for name in names}
    results: dict[int, dict[str, dict[str, Any]]] = {}
    try:
        with progress() as bar:
            task = bar.add_task("measuring", total=len(args.lengths))
            for length in sorted(args.lengths):
                if "openm3" not in workers:
                    break
                bar.update(task, description=f"behind {tokens(length)}")
                results[length] = measure_length(workers, length, args)
                print(render(length, results[length], names) + "\n", flush=True)
                bar.advance(task)
    finally:
        for worker in workers.values():
            worker.close()
    versions = {"openm3": openm3.__version__} | {p: version(p) for name in names for p in PACKAGES[name]}
    machine = {"machine": platform.machine(), "cpus": os.cpu_count(), "threads": args.threads}
    print(json.dumps({**machine, "versions": versions, "results": results}))


if __name__ == "__main__":
    main()
