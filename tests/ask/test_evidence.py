"""Attention added up: against a brute-force sum, and lines chosen from known masses."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from openm3.ask.documents import Document
from openm3.ask.evidence import MAX_LINE_CHARS, MAX_LINES, Evidence, Witness, attention_weights, rank
from openm3.ask.places import Places
from openm3.config import BLOCK
from openm3.model.attention import Heads
from openm3.model.batch import Batch
from openm3.ops.attention import sparse_attention
from openm3.ops.cache import Pool

GROUPS, HEADS, WIDTH = 2, 4, 8


def step(length: int, num_tokens: int, *, selected: list[list[int]] | None, seed: int = 0) -> tuple[Heads, Batch]:
    """The last tokens of a sequence in shuffled pages, every token and group with the block ids given for the group."""
    generator = torch.Generator().manual_seed(seed)
    num_pages = -(-length // BLOCK)
    page_P = torch.randperm(num_pages + 2, generator=generator)[:num_pages]
    k_MGBH, v_MGBH = torch.randn((2, num_pages + 2, GROUPS, BLOCK, WIDTH), generator=generator)
    q_TNH = torch.randn((num_tokens, HEADS, WIDTH), generator=generator)
    block_TGK = None
    if selected is not None:
        block_TGK = torch.tensor(selected, dtype=torch.int32).expand(num_tokens, GROUPS, -1)
    index_q = None if selected is None else torch.zeros((num_tokens, GROUPS, WIDTH))
    batch = Batch.step(torch.zeros(num_tokens, dtype=torch.long), length - num_tokens, page_P)
    return Heads(q_TNH, Pool(k_MGBH, v_MGBH, None), index_q, block_TGK, 0.5), batch


def brute_force(heads: Heads, batch: Batch, length: int) -> tuple[NDArray[np.float64], float]:
    """Squared attention to each token, summed over queries, averaged over heads; and the share of tokens attended."""
    mass = np.zeros(length)
    shares = []
    for t, position in enumerate(batch.position_T.tolist()):
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            blocks = range(-(-length // BLOCK)) if heads.block_TGK is None else heads.block_TGK[t, group].tolist()
            seen = [s for b in blocks if b >= 0 for s in range(b * BLOCK, (b + 1) * BLOCK) if s <= position]
            page = batch.page_RP[0].tolist()
            keys = [heads.pool.k_MGBH[page[s // BLOCK], group, s % BLOCK] for s in seen]
            scores = np.array([float(heads.q_TNH[t, head] @ key) * heads.scale for key in keys])
            weights = np.exp(scores - scores.max())
            mass[seen] += (weights / weights.sum()) ** 2 / HEADS
            shares.append(len(seen) / (position + 1))
    return mass, float(np.mean(shares))


@pytest.mark.parametrize("selected", [None, [[0, 2, 4], [1, 3, 4]], [[4, -1, -1], [0, 4, -1]]])
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_mass_is_the_sum_of_attention(selected: list[list[int]] | None, num_tokens: int) -> None:
    length = 4 * BLOCK + 17
    heads, batch = step(length, num_tokens, selected=selected)
    witness = Witness(length)
    witness(0, heads, batch)
    expected, share = brute_force(heads, batch, length)
    np.testing.assert_allclose(witness.mass_S.numpy(), expected, rtol=1e-4, atol=1e-7)
    assert witness.attended_share == pytest.approx(share)


@pytest.mark.parametrize("selected", [None, [[0, 2, 4], [1, 3, 4]]])
def test_weights_are_those_of_the_operator(selected: list[list[int]] | None) -> None:
    heads, batch = step(4 * BLOCK + 17, 3, selected=selected)
    weight_TGhS, slot_TGS, _ = attention_weights(heads, batch)
    page_TGS = batch.page_RP[0].long()[slot_TGS // BLOCK]
    value_TGSH = heads.pool.v_MGBH[page_TGS, torch.arange(GROUPS)[:, None], slot_TGS % BLOCK]
    out_TNH = (weight_TGhS @ value_TGSH).flatten(1, 2)
    every = torch.arange(5, dtype=torch.int32).expand(3, GROUPS, 5)
    where = (batch.page_RP, batch.start_R1, batch.length_R, every if selected is None else heads.block_TGK)
    expected = sparse_attention(heads.q_TNH, heads.pool.k_MGBH, heads.pool.v_MGBH, *where, scale=heads.scale)
    torch.testing.assert_close(out_TNH, expected)


def test_a_witness_that_does_not_watch_counts_nothing() -> None:
    witness = Witness(200)
    witness.watching = False
    witness(0, *step(200, 1, selected=[[0, 1]]))
    assert float(witness.mass_S.sum()) == 0
    assert witness.attended_share is None


def test_steps_and_layers_add_up() -> None:
    first, second, both = Witness(300), Witness(300), Witness(300)
    one, other = step(290, 1, selected=[[0, 2]]), step(291, 1, selected=None, seed=1)
    first(0, *one)
    second(1, *other)
    both(0, *one)
    both(1, *other)
    torch.testing.assert_close(both.mass_S, first.mass_S + second.mass_S)
    assert both.attended_share == pytest.approx(((128 + 290 - 256) / 290 + 1) / 2)


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
