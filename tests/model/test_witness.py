"""Attention added up: against a brute-force sum, alone and among the requests of a batch."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from openm3.config import BLOCK
from openm3.model import witness as module
from openm3.model.attention import Heads
from openm3.model.batch import Batch
from openm3.model.witness import Witness, attention_weights
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
def test_keys_copied_a_few_at_a_time(selected: list[list[int]] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    heads, batch = step(4 * BLOCK + 17, 2, selected=selected)
    whole, _, _ = attention_weights(heads, batch)
    monkeypatch.setattr(module, "BLOCKS_AT_ONCE", 2)
    torch.testing.assert_close(attention_weights(heads, batch)[0], whole)


@pytest.mark.parametrize("dense", [False, True])
def test_a_token_of_one_request_among_others(dense: bool) -> None:
    """Two requests in the same pool, of which the second one's page table is the wider."""
    one, first = step(2 * BLOCK + 5, 3, selected=None if dense else [[0, 2], [1, 2]])
    two, second = step(4 * BLOCK + 17, 2, selected=None if dense else [[0, 4], [1, 3]], seed=1)
    pages = one.pool.k_MGBH.shape[0]
    page_RP = torch.zeros((2, 5), dtype=torch.int32)
    page_RP[0, :3], page_RP[1] = first.page_RP[0], second.page_RP[0] + pages
    batch = Batch(
        ids_T=torch.zeros(5, dtype=torch.long),
        position_T=torch.cat([first.position_T, second.position_T]),
        slot_T=torch.cat([first.slot_T, second.slot_T + pages * BLOCK]),
        page_RP=page_RP,
        start_R1=torch.tensor([0, 3, 5], dtype=torch.int32),
        length_R=torch.cat([first.length_R, second.length_R]),
    )
    pool = Pool(*(torch.cat([a, b]) for a, b in zip(one.pool[:2], two.pool[:2], strict=True)), None)
    block_TGK = None if dense else torch.cat([one.block_TGK, two.block_TGK])
    heads = Heads(torch.cat([one.q_TNH, two.q_TNH]), pool, None, block_TGK, one.scale)
    for request, token, length, (own, alone) in ((0, 1, 250, (one, first)), (1, 4, 529, (two, second))):
        own_token = token - [0, 3][request]
        expected = Witness(length, tokens=slice(own_token, own_token + 1))
        expected(0, own, alone)
        found = Witness(length, request=request, tokens=slice(token, token + 1))
        found(0, heads, batch)
        torch.testing.assert_close(found.mass_S, expected.mass_S)
        assert found.attended_share == pytest.approx(expected.attended_share)
        assert float(found.mass_S.sum()) > 0


def test_attention_beyond_the_length_is_not_kept() -> None:
    heads, batch = step(300, 1, selected=[[0, 2]])
    short, whole = Witness(260), Witness(300)
    short(0, heads, batch)
    whole(0, heads, batch)
    torch.testing.assert_close(short.mass_S, whole.mass_S[:260])
    assert short.attended_share == whole.attended_share


def test_what_is_forgotten_does_not_count() -> None:
    witness, expected = Witness(300), Witness(300)
    witness(0, *step(290, 1, selected=[[0, 2]]))
    witness.forget()
    for one in (witness, expected):
        one(0, *step(291, 1, selected=[[1, 2]], seed=1))
    torch.testing.assert_close(witness.mass_S, expected.mass_S)
    assert witness.attended_share == expected.attended_share


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
