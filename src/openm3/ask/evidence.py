"""Where an answer came from: the attention of its tokens, added up by key, block and line.

`Witness` watches a model write and keeps one number a token of the context; `rank` turns these into quoted lines. It
looks at the selected blocks only, which is all that the model itself looked at. Weights are squared before they are
added: an answer is copied by the few heads that point at single tokens, and these must not be outvoted by the many that
spread thinly over everything or rest on line ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from openm3.ask.documents import Document
from openm3.ask.places import Places
from openm3.config import BLOCK
from openm3.model.attention import Heads
from openm3.model.batch import Batch

NUM_EVIDENCE = 3
MAX_LINES = 6
MAX_LINE_CHARS = 200
PEAK_PART = 0.25
"""Neighbours of a block's most attended line are quoted with it from this part of its attention on."""


@dataclass(frozen=True)
class Evidence:
    """Lines that the answer's tokens attended to: `share` of all their attention to the documents, weights squared."""

    file: str
    first_line: int
    last_line: int
    text: str
    share: float


class Witness:
    """An observer of one sequence of at most `length` tokens that counts while `watching`.

    `mass_S[s]` is the squared attention that the tokens of the steps seen so far paid to token s, averaged over heads
    and summed over layers. `attended_share` is the part of the visible tokens that was selected, averaged.
    """

    def __init__(self, length: int) -> None:
        self.mass_S = torch.zeros(length, dtype=torch.float64)
        self.watching = True
        self._shares: list[float] = []

    def __call__(self, layer: int, heads: Heads, batch: Batch) -> None:
        """Add one layer's attention of one step of one request."""
        if not self.watching:
            return
        weight_TGhS, slot_TGS, seen_TGS = attention_weights(heads, batch)
        square_TGS = weight_TGhS.double().square().mean(2) / weight_TGhS.shape[1]
        self.mass_S.index_add_(0, slot_TGS[seen_TGS], square_TGS[seen_TGS])
        visible_T = batch.position_T + 1
        self._shares.append(float((seen_TGS.sum(-1) / visible_T[:, None]).mean()))

    @property
    def attended_share(self) -> float | None:
        """None before anything was seen."""
        return sum(self._shares) / len(self._shares) if self._shares else None


def attention_weights(heads: Heads, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """What each token attends to: the weights of each group's h heads, the positions, and which are visible.

    S counts the tokens of the selected blocks (of all blocks in a dense layer); rows of weights sum to 1. Memory grows
    with T times S: meant for the few tokens of a decoding step. `batch` must hold one request.
    """
    num_groups = heads.pool.k_MGBH.shape[1]
    num_blocks = batch.page_RP.shape[1]
    block_TGK = heads.block_TGK
    if block_TGK is None:
        block_TGK = torch.arange(num_blocks).expand(heads.q_TNH.shape[0], num_groups, num_blocks)
    block_TGK = block_TGK.long()
    page_TGK = batch.page_RP[0].long()[block_TGK.clamp(min=0)]
    key_TGSH = heads.pool.k_MGBH[page_TGK, torch.arange(num_groups)[:, None]].flatten(2, 3)
    slot_TGS = (block_TGK[..., None] * BLOCK + torch.arange(BLOCK)).flatten(2)
    seen_TGS = (block_TGK >= 0).repeat_interleave(BLOCK, 2) & (slot_TGS <= batch.position_T[:, None, None])
    query_TGhH = heads.q_TNH.unflatten(1, (num_groups, -1))
    score_TGhS = (query_TGhH.float() @ key_TGSH.float().mT) * heads.scale
    weight_TGhS = score_TGhS.masked_fill(~seen_TGS[:, :, None], -torch.inf).softmax(-1)
    return weight_TGhS, slot_TGS, seen_TGS


def rank(
    mass_S: NDArray[np.float64], places: Places, documents: Sequence[Document], limit: int = NUM_EVIDENCE
) -> tuple[Evidence, ...]:
    """The most attended lines of the most attended blocks, at most `limit`, most attended first.

    Only attention to the documents' text counts. Equal blocks stand in the order of the prompt; blocks whose lines
    touch are one piece of evidence.
    """
    row_T = places.row_T
    mass_T = np.where(row_T >= 0, mass_S[: len(row_T)], 0.0)
    total = mass_T.sum()
    if not total > 0:
        return ()
    mass_P = np.add.reduceat(mass_T, np.arange(0, len(mass_T), BLOCK))
    mass_L: NDArray[np.float64] = np.bincount(
        row_T[row_T >= 0], mass_T[row_T >= 0], minlength=len(places.number_L)
    ).astype(np.float64)
    spans: list[tuple[int, int]] = []
    for block in np.argsort(-mass_P, kind="stable"):
        if len(spans) == limit or mass_P[block] <= 0:
            break
        inside = slice(block * BLOCK, (block + 1) * BLOCK)
        spans = _merged(spans, _peak(row_T[inside], mass_T[inside], mass_L, places))
    found = [_evidence(span, mass_L, places, documents, total) for span in spans]
    return tuple(sorted(found, key=lambda evidence: -evidence.share))


def _peak(
    row_t: NDArray[np.int64], mass_t: NDArray[np.float64], mass_L: NDArray[np.float64], places: Places
) -> tuple[int, int]:
    """First and last row of one block's evidence: its most attended line, and what follows on it above and below."""
    rows = np.unique(row_t[row_t >= 0])
    inside = np.bincount(row_t[row_t >= 0], mass_t[row_t >= 0], minlength=len(mass_L))
    best = first = last = int(rows[inside[rows].argmax()])
    least = PEAK_PART * mass_L[best]

    def joins(row: int) -> bool:
        same = places.document_L[row] == places.document_L[best]
        return bool(same and places.number_L[row] > 0 and mass_L[row] >= least)

    while first > rows[0] and joins(first - 1) and last - first + 1 < MAX_LINES:
        first -= 1
    while last < rows[-1] and joins(last + 1) and last - first + 1 < MAX_LINES:
        last += 1
    return first, last


def _merged(spans: list[tuple[int, int]], new: tuple[int, int]) -> list[tuple[int, int]]:
    """The spans with one more; those that share a row with it become one with it."""
    touching = [span for span in spans if span[0] <= new[1] and new[0] <= span[1]]
    whole = (min(s[0] for s in [*touching, new]), max(s[1] for s in [*touching, new]))
    return [*(span for span in spans if span not in touching), whole]


def _evidence(
    span: tuple[int, int],
    mass_L: NDArray[np.float64],
    places: Places,
    documents: Sequence[Document],
    total: float,
) -> Evidence:
    first, last = span
    document = documents[int(places.document_L[first])]
    numbers = int(places.number_L[first]), int(places.number_L[last])
    lines = document.text.split("\n")[numbers[0] - 1 : numbers[1]]
    text = "\n".join(line if len(line) <= MAX_LINE_CHARS else line[: MAX_LINE_CHARS - 1] + "…" for line in lines)
    return Evidence(document.name, *numbers, text, float(mass_L[first : last + 1].sum() / total))
