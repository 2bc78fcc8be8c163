"""Attention to a prompt's tokens, as `openm3.model.witness` adds it up, turned into quoted lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from openm3.config import BLOCK
from openm3.evidence.places import Named, Places

NUM_EVIDENCE = 3
MAX_LINES = 6
MAX_LINE_CHARS = 200
PEAK_PART = 0.25
"""Neighbours of a block's most attended line are quoted with it from this part of its attention on."""

CHANGED = "the model's chat template or tokenizer changes the documents, so their lines cannot be told"
UNATTENDED = "the answer attended to nothing in the documents"
"""Why there may be no evidence."""


@dataclass(frozen=True)
class Evidence:
    """Lines that the answer's tokens attended to: `share` of all their attention to the documents, weights squared."""

    file: str
    first_line: int
    last_line: int
    text: str
    share: float


def rank(
    mass_S: NDArray[np.float64], places: Places, documents: Sequence[Named], limit: int = NUM_EVIDENCE
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
        return bool(places.document_L[row] == places.document_L[best] and mass_L[row] >= least)

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
    documents: Sequence[Named],
    total: float,
) -> Evidence:
    first, last = span
    document = documents[int(places.document_L[first])]
    numbers = int(places.number_L[first]), int(places.number_L[last])
    lines = document.text.split("\n")[numbers[0] - 1 : numbers[1]]
    text = "\n".join(line if len(line) <= MAX_LINE_CHARS else line[: MAX_LINE_CHARS - 1] + "…" for line in lines)
    return Evidence(document.name, *numbers, text, float(mass_L[first : last + 1].sum() / total))
