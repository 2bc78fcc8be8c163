"""What a model loses with smaller weights: its logits beside those in float32, on held-out texts with questions.

Every form computes what it would in use: bfloat16 rounds activations too, the others compute in float32 with weights
that one byte holds.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from openm3.eval.haystack import Counts, HaystackMaker
from openm3.eval.report import progress, table, tokens
from openm3.model import mxfp8
from openm3.model.batch import Batch
from openm3.model.linear import Linear
from openm3.model.model import Model, load
from openm3.model.moe import Experts
from openm3.model.network import Network

FORMS = ("float32", "bfloat16", "int8", "int8-channel", "mxfp8")
"""How weights are kept: as `load` takes them, and rounded to MXFP8."""

COUNTS = Counts(pass_keys=4, quotes=4, absences=2)
"""Questions in each text, answered there."""

_TOKENS_AT_ONCE = 512


@dataclass(frozen=True)
class Quality:
    """One form of the weights: bytes, changes of the logits, tokens whose largest logit stays, and losses in nats."""

    weights: str
    bytes: int
    mean_change: float
    largest_change: float
    same_choice: float
    loss: float
    answer_loss: float


def run(args: argparse.Namespace) -> int:
    """`openm3 eval quantisation`: print a row a form."""
    with progress() as bar:
        task = bar.add_task("reading", total=len(FORMS) * args.count * args.length)
        rows = measure(
            args.model, args.length, args.count, args.seed, on_progress=lambda read: bar.update(task, advance=read)
        )
    if args.json:
        settings = {"model": args.model, "length": args.length, "texts": args.count, "seed": args.seed}
        print(json.dumps({**settings, "forms": [asdict(row) for row in rows]}))
    else:
        print(render(rows, args.length, args.count))
    return 0


def measure(
    path: str, length: int, count: int, seed: int, *, on_progress: Callable[[int], None] | None = None
) -> list[Quality]:
    """Measure every form over `count` texts of about `length` tokens, answered questions included.

    `on_progress` gets the tokens read since its last call. Raises what `load` does, and DocumentError for lengths that
    no text can have.
    """
    exact = load(path)
    maker = HaystackMaker(exact.tokenizer, seed)
    texts = [maker.make(length, index, COUNTS).conversation(exact.tokenizer) for index in range(count)]
    expected = [_hidden(exact, ids) for ids, _ in texts]
    rows = []
    for form in FORMS:
        model = opened(path, form)
        parts = []
        for (ids, answers), hidden_TD in zip(texts, expected, strict=True):
            parts.append(_compare(exact.network, hidden_TD, model.network, _hidden(model, ids), ids, answers))
            if on_progress is not None:
                on_progress(length)
        rows.append(_quality(form, model.network, parts))
    return rows


def opened(path: str, form: str) -> Model:
    """The model with its weights in one of `FORMS`; those in MXFP8 are widened again."""
    if form == "mxfp8":
        model = load(path)
        for weight in _layer_weights(model.network):
            weight.copy_(mxfp8.decode(*mxfp8.encode(weight)))
        return model
    if form == "bfloat16":
        return load(path, dtype=torch.bfloat16)
    return load(path, weights=None if form == "float32" else form)


def _layer_weights(network: Network) -> list[Tensor]:
    modules = [module for module in network.layers.modules() if isinstance(module, Linear | Experts)]
    return [weight for module in modules for weight in module.parameters(recurse=False)]


@torch.inference_mode()
def _hidden(model: Model, ids: list[int]) -> Tensor:
    return model.network.hidden(Batch.whole([torch.tensor(ids)]))


@torch.inference_mode()
def _compare(
    exact: Network, exact_TD: Tensor, other: Network, other_TD: Tensor, ids: list[int], answers: list[int]
) -> Tensor:
    """A column a token: mean and largest change of its logits, does the largest stay, its loss, is it an answer's."""
    next_T = torch.tensor(ids[1:])
    answer_T = torch.zeros(len(ids) - 1).index_fill(0, torch.tensor(answers), 1.0)
    columns = []
    for first in range(0, len(ids) - 1, _TOKENS_AT_ONCE):
        part = slice(first, min(first + _TOKENS_AT_ONCE, len(ids) - 1))
        exact_tV, other_tV = exact.head(exact_TD[part]).float(), other.head(other_TD[part]).float()
        change_tV = (other_tV - exact_tV).abs()
        same_t = (other_tV.argmax(-1) == exact_tV.argmax(-1)).float()
        loss_t = F.cross_entropy(other_tV, next_T[part], reduction="none")
        columns.append(torch.stack((change_tV.mean(-1), change_tV.amax(-1), same_t, loss_t, answer_T[part])))
    return torch.cat(columns, dim=1).double()


def _quality(form: str, network: Network, parts: list[Tensor]) -> Quality:
    mean_T, largest_T, same_T, loss_T, answer_T = torch.cat(parts, dim=1)
    size = sum(x.nbytes for x in (*network.parameters(), *network.buffers()))
    if form == "mxfp8":
        for weight in _layer_weights(network):
            size += weight.numel() + math.prod(mxfp8.scale_shape(weight.shape)) - weight.nbytes
    return Quality(
        weights=form,
        bytes=size,
        mean_change=float(mean_T.mean()),
        largest_change=float(largest_T.max()),
        same_choice=float(same_T.mean()),
        loss=float(loss_T.mean()),
        answer_loss=float(loss_T[answer_T > 0].mean()),
    )


def render(rows: list[Quality], length: int, count: int) -> str:
    """A table: a line a form."""
    head = ["weights", "MB", "logits change", "at most", "same choice", "loss", "loss of answers"]
    lines = [
        [
            row.weights,
            f"{row.bytes / 1e6:,.1f}",
            f"{row.mean_change:.4f}",
            f"{row.largest_change:.3f}",
            f"{row.same_choice:.2%}",
            f"{row.loss:.4f}",
            f"{row.answer_loss:.4f}",
        ]
        for row in rows
    ]
    title = f"{count} held-out texts of {tokens(length)} tokens with questions; losses in nats a token:"
    return f"{title}\n\n{table(head, lines, '<>>>>>>')}"
