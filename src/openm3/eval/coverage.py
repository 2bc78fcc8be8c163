"""How much of the attention that a dense layer would pay, the selected blocks hold.

For sampled tokens with more than `num_selected` blocks behind them, each layer's dense attention weights are computed
from its own queries and keys, and summed over the blocks that the index branch selected; beside it over the best blocks
there are (by that same mass, the token's own block always among them) and over the newest ones. What was selected feeds
the next layer, as in use. Mass is averaged over the heads of a group, which share a selection, tokens and groups.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from openm3.config import BLOCK, ModelConfig
from openm3.errors import ConfigError, DocumentError
from openm3.eval.haystack import Counts, HaystackMaker
from openm3.eval.report import progress, table, tokens
from openm3.model.attention import Heads
from openm3.model.batch import Batch
from openm3.model.model import Model
from openm3.model.session import CHUNK

COUNTS = Counts(pass_keys=4, quotes=4, absences=0)
"""Questions in each text, answered there; their answers' tokens are all measured."""

RANDOM_TOKENS = 256
"""Other tokens measured in each text."""

_SCORES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class LayerCoverage:
    """Mean share of dense attention mass in one layer's selected, best and newest blocks, over some kind of tokens."""

    layer: int
    kind: str
    tokens: int
    selected: float
    best: float
    newest: float


def run(args: argparse.Namespace, model: Model) -> int:
    """`openm3 eval coverage`: print a row a layer."""
    with progress() as bar:
        task = bar.add_task("reading", total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        rows = measure(model, args.length, args.count, args.seed, on_progress=report)
    if args.json:
        settings = {"model": model.name, "length": args.length, "texts": args.count, "seed": args.seed}
        print(json.dumps({**settings, "layers": [asdict(row) for row in rows]}))
    else:
        print(render(rows, model.config, args.length))
    return 0


def measure(
    model: Model, length: int, count: int, seed: int, *, on_progress: Callable[[int, int], None] | None = None
) -> list[LayerCoverage]:
    """Measure over `count` texts of `length` tokens and their answered questions: a row a layer and kind of token.

    `on_progress` gets the tokens read so far and in all. Raises ConfigError for a model without sparse layers and
    DocumentError for a length that needs no selection.
    """
    if "sparse" not in model.config.layer_types:
        raise ConfigError("coverage is of selected blocks: the model has no sparse layer")
    reach = model.config.num_selected * BLOCK
    if length <= reach + BLOCK:
        raise DocumentError(
            f"up to {reach} tokens every block is selected: coverage needs a length well above, not {length}"
        )
    maker = HaystackMaker(model.tokenizer, seed)
    texts = [maker.make(length, index, COUNTS).conversation(model.tokenizer) for index in range(count)]
    total, done = sum(len(ids) for ids, _ in texts), 0
    masses: dict[tuple[str, int], list[Tensor]] = {}
    for index, (ids, answers) in enumerate(texts):
        rng = random.Random(f"{seed}-{length}-{index}-tokens")
        others = rng.sample(range(reach, length), min(RANDOM_TOKENS, length - reach))
        for read in _measure_text(model, ids, {"answers": answers, "random": others}, masses):
            done += read
            if on_progress is not None:
                on_progress(done, total)
    rows = []
    for (kind, layer), parts in sorted(masses.items()):
        shares_TG3 = torch.cat(parts)
        rows.append(LayerCoverage(layer, kind, shares_TG3.shape[0], *shares_TG3.mean((0, 1)).tolist()))
    return rows


def _measure_text(
    model: Model, ids: list[int], wanted: dict[str, list[int]], masses: dict[tuple[str, int], list[Tensor]]
) -> Iterator[int]:
    """Read a text, adding the shares of the wanted tokens to `masses`; yields the tokens read by each step."""
    session = model.session(len(ids))

    def observer(layer: int, heads: Heads, batch: Batch) -> None:
        end = int(batch.length_R[0])
        for kind, positions in wanted.items():
            here = [p for p in positions if end - batch.ids_T.shape[0] <= p < end]
            if here and heads.block_TGK is not None:
                masses.setdefault((kind, layer), []).append(covered(heads, batch, torch.tensor(here)))

    for first in range(0, len(ids), CHUNK):
        part = ids[first : first + CHUNK]
        session.read(part, observer=observer)
        yield len(part)


def covered(heads: Heads, batch: Batch, position_T: Tensor) -> Tensor:
    """Shares of dense mass in the selected, best and newest blocks, [T, G, 3], at positions of a one-request batch."""
    assert heads.block_TGK is not None
    groups, num_selected = heads.block_TGK.shape[1:]
    key_GSH = heads.pool.k_MGBH[batch.page_RP[0].long()].transpose(0, 1).flatten(1, 2).float()
    slot_S = torch.arange(key_GSH.shape[1])
    block_P = torch.arange(batch.page_RP.shape[1])
    first = int(batch.length_R[0]) - batch.ids_T.shape[0]
    shares = []
    for position_t in position_T.split(max(1, _SCORES_AT_ONCE // (heads.q_TNH.shape[1] * slot_S.shape[0]))):
        query_GhtH = heads.q_TNH[position_t - first].float().unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
        score_GhtS = (query_GhtH @ key_GSH[:, None].mT) * heads.scale
        weight_GtS = score_GhtS.masked_fill(slot_S > position_t[:, None], -torch.inf).softmax(-1).mean(1)
        mass_tGP = weight_GtS.unflatten(-1, (-1, BLOCK)).sum(-1).transpose(0, 1)
        block_tGK = heads.block_TGK[position_t - first].long()
        own_t11 = (position_t // BLOCK)[:, None, None]
        selected = mass_tGP.gather(-1, block_tGK.clamp(min=0)).where(block_tGK >= 0, 0.0).sum(-1)
        ranked_tGP = mass_tGP.where(block_P != own_t11, 2.0)
        best_tGK = ranked_tGP.topk(min(num_selected, block_P.shape[0]), dim=-1).indices
        newest = mass_tGP.where((block_P <= own_t11) & (block_P > own_t11 - num_selected), 0.0).sum(-1)
        shares.append(torch.stack((selected, mass_tGP.gather(-1, best_tGK).sum(-1), newest), dim=-1))
    return torch.cat(shares)


def render(rows: list[LayerCoverage], config: ModelConfig, length: int) -> str:
    """A table: a line a layer, and their mean, for each kind of token."""
    head = ["tokens measured", "layer", "selected", "best", "newest"]
    lines = []
    for kind in dict.fromkeys(row.kind for row in rows):
        some = [row for row in rows if row.kind == kind]
        name = {"answers": "of answers", "random": "at random"}[kind]
        for row in some:
            lines.append([f"{row.tokens:,} {name}", str(row.layer), *_percent([row])])
        lines.append([f"{some[0].tokens:,} {name}", "all", *_percent(some)])
    blocks = f"{config.num_selected} blocks of {BLOCK} tokens"
    title = f"Share of dense attention mass in {blocks}, {tokens(length)} tokens of context:"
    return f"{title}\n\n{table(head, lines, '>>>>>')}"


def _percent(rows: list[LayerCoverage]) -> list[str]:
    columns = zip(*((row.selected, row.best, row.newest) for row in rows), strict=True)
    return [f"{sum(column) / len(rows):.1%}" for column in columns]
