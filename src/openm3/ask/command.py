"""`openm3 ask`: one question about documents, for people or, with --json, for programs."""

from __future__ import annotations

import argparse
import json
from contextlib import closing, nullcontext
from dataclasses import asdict
from typing import Any

import torch

from openm3.ask.answer import Answer, Reader
from openm3.ask.documents import Collection, collect
from openm3.ask.terminal import show_answer, show_notes
from openm3.errors import PromptError
from openm3.model.model import load
from openm3.ops.dispatch import NAMES, use


def run(args: argparse.Namespace) -> int:
    """Read, answer, print. Returns 0, or 130 when Ctrl-C ended the answer. Raises OpenM3Error."""
    if args.implementation is not None and args.implementation not in NAMES:
        raise PromptError(f"--implementation must be one of {', '.join(NAMES)}, not {args.implementation!r}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    found = collect(args.file)
    model = load(args.model, dtype=getattr(torch, args.dtype), weights=args.weights)
    reader = Reader(model, found.documents, args.cache)
    limits = {"thinking": args.thinking, "max_new_tokens": args.max_new_tokens}
    with use(args.implementation) if args.implementation else nullcontext(), closing(reader):
        if args.json:
            answer = reader.answer(args.question, **limits)
            print(json.dumps(report(answer, found, args.question, args.model)))
        else:
            show_notes(found)
            answer = show_answer(reader, args.question, **limits)
    return 130 if answer.stop == "interrupted" else 0


def report(answer: Answer, found: Collection, question: str, model: str) -> dict[str, Any]:
    """What --json prints: the answer's fields, with evidence as objects, and what was read."""
    return {
        "model": model,
        "question": question,
        **asdict(answer),
        "documents": [{"name": d.name, "encoding": d.encoding} for d in found.documents],
        "skipped": [asdict(s) for s in found.skipped],
    }
