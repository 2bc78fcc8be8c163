"""Lines chosen from known masses."""

import numpy as np
import pytest
from numpy.typing import NDArray

from openm3.ask.documents import Document
from openm3.config import BLOCK
from openm3.evidence.places import Places
from openm3.evidence.quotes import MAX_LINE_CHARS, MAX_LINES, Evidence, rank


def places(*lengths: int, lead: int = 3, tail: int = 5, header: int = 2) -> Places:
    """One document for each list of token counts a line, after `lead` tokens of template, before `tail` of question."""
    return documents_of([list(lengths)], lead, tail, header)


def documents_of(counts: list[list[int]], lead: int = 3, tail: int = 5, header: int = 2) -> Places:
    row_T, document, number = [-1] * lead, [], []
    for index, lines in enumerate(counts):
        document += [index] * (len(lines) + 2)
        row_T += [-1] * header
        first = len(number) + 1
        number += [0, *range(1, len(lines) + 1), 0]
        for k, count in enumerate(lines):
            row_T += [first + k] * count
        row_T += [-1]
    return Places(np.array(row_T + [-1] * tail), np.array(document), np.array(number))


def texts(*counts: int) -> list[Document]:
    return [
        Document(f"{i}.txt", "".join(f"{i}:{n}\n" for n in range(1, count + 1)), "utf-8")
        for i, count in enumerate(counts)
    ]


def mass_on(where: Places, **lines: float) -> NDArray[np.float64]:
    """Mass on the first token of each line named d0_5 (document 0, line 5)."""
    mass = np.zeros(len(where.row_T) + 10)
    for name, value in lines.items():
        document, number = map(int, name[1:].split("_"))
        row = next(
            i for i, at in enumerate(zip(where.document_L, where.number_L, strict=True)) if at == (document, number)
        )
        mass[np.flatnonzero(where.row_T == row)[0]] = value
    return mass


def test_the_most_attended_line_comes_first() -> None:
    where = documents_of([[40] * 20, [40] * 20])
    mass = mass_on(where, d1_15=6.0, d0_4=3.0, d0_18=1.0)
    assert rank(mass, where, texts(20, 20)) == (
        Evidence("1.txt", 15, 15, "1:15", 0.6),
        Evidence("0.txt", 4, 4, "0:4", 0.3),
        Evidence("0.txt", 18, 18, "0:18", 0.1),
    )
    assert len(rank(mass, where, texts(20, 20), limit=2)) == 2


def test_attention_outside_of_the_documents_does_not_count() -> None:
    where = places(*[10] * 8)
    mass = mass_on(where, d0_3=1e-6)
    mass[0] = mass[4] = mass[-12] = 100.0
    assert rank(mass, where, texts(8)) == (Evidence("0.txt", 3, 3, "0:3", 1.0),)
    assert rank(np.zeros_like(mass), where, texts(8)) == ()


def test_neighbours_that_matter_are_quoted_too() -> None:
    where = places(*[10] * 8)
    found = rank(mass_on(where, d0_3=0.2, d0_4=4.0, d0_5=1.0, d0_7=1.0), where, texts(8))
    assert found == (Evidence("0.txt", 4, 5, "0:4\n0:5", pytest.approx(5 / 6.2)),)


def test_a_line_on_a_block_border_is_one_piece() -> None:
    where = places(100, 60, 100)
    mass = np.zeros(len(where.row_T))
    line = np.flatnonzero(where.row_T == 2)
    assert line[0] < BLOCK <= line[-1]
    mass[line[0]] = mass[line[-1]] = 1.0
    assert rank(mass, where, texts(3)) == (Evidence("0.txt", 2, 2, "0:2", 1.0),)


def test_equal_blocks_stand_in_the_order_of_the_prompt() -> None:
    where = places(*[32] * 40)
    found = rank(mass_on(where, d0_2=1.0, d0_30=1.0, d0_14=1.0, d0_22=1.0), where, texts(40))
    assert [e.first_line for e in found] == [2, 14, 22]


def test_evidence_stays_within_a_file_and_a_few_lines() -> None:
    where = documents_of([[3] * 10, [3] * 30], header=1)
    mass = np.where(where.row_T >= 0, 1.0, 0.0)
    for found in rank(mass, where, texts(10, 30)):
        assert found.last_line - found.first_line < MAX_LINES
        assert found.text.split("\n")[0] == f"{found.file[0]}:{found.first_line}"
        assert len(set(line[0] for line in found.text.split("\n"))) == 1


def test_long_lines_are_cut() -> None:
    where = places(5, 5)
    document = Document("0.txt", "x" * 1000 + "\ny\n", "utf-8")
    (found,) = rank(mass_on(where, d0_1=1.0), where, [document])
    assert found.text == "x" * (MAX_LINE_CHARS - 1) + "…"
