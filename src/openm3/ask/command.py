"""`openm3 ask`: one question about documents, for people or, with --json, for programs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from typing import Any

import torch

from openm3.ask.answer import Answer, Reader
from openm3.ask.documents import Collection, collect
from openm3.ask.media import Shown, look
from openm3.ask.terminal import show_answer, show_notes, write
from openm3.errors import PromptError
from openm3.model.model import load
from openm3.ops.dispatch import NAMES, use
from openm3.tokens.media import Kind


def run(args: argparse.Namespace) -> int:
    """Read, answer, print. Returns 0, or 130 when Ctrl-C ended the answer. Raises OpenM3Error."""
    if args.implementation is not None and args.implementation not in NAMES:
        raise PromptError(f"--implementation must be one of {', '.join(NAMES)}, not {args.implementation!r}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if not (args.file or args.image or args.video):
        raise PromptError("nothing to ask about: give --file, --image or --video")
    found = collect(args.file) if args.file else Collection((), ())
    paths: list[tuple[Kind, str]] = [("image", path) for path in args.image or ()]
    paths += [("video", path) for path in args.video or ()]
    shown = [_looked(path, kind, quiet=args.json) for kind, path in paths]
    model = load(args.model, dtype=getattr(torch, args.dtype), weights=args.weights)
    reader = Reader(model, found.documents, args.cache, shown)
    limits = {"thinking": args.thinking, "max_new_tokens": args.max_new_tokens}
    with use(args.implementation) if args.implementation else nullcontext(), closing(reader):
        if args.json:
            answer = reader.answer(args.question, **limits)
            print(json.dumps(report(answer, found, args.question, args.model, shown)))
        else:
            show_notes(found)
            answer = show_answer(reader, args.question, **limits)
    return 130 if answer.stop == "interrupted" else 0


def _looked(path: str, kind: Kind, *, quiet: bool) -> Shown:
    """A picture or video; people are told of each as it is read, since videos take a while."""
    shown = look(path, kind)
    if not quiet:
        write(f"{shown.line()}\n", sys.stderr)
    return shown


def report(answer: Answer, found: Collection, question: str, model: str, shown: Sequence[Shown] = ()) -> dict[str, Any]:
    """What --json prints: the answer's fields, with evidence as objects, and what was read."""
    return {
        "model": model,
        "question": question,
        **asdict(answer),
        "documents": [{"name": d.name, "encoding": d.encoding} for d in found.documents],
        "media": [one.report() for one in shown],
        "skipped": [asdict(s) for s in found.skipped],
    }
