"""Block selection: bit-exact against a definition in plain numpy, and unmoved by pages, chunks and neighbours."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openm3.ops.cases import MILLION, PACKED, Packed, PackedCase, packed
from openm3.ops.dispatch import Implementation
from openm3.ops.index import SELECT_BLOCKS, block_scores, select_blocks

EXACT = [case for case in PACKED if case.index_values != "normal"]
MARGIN = 1e-4

each_implementation = pytest.mark.parametrize("implementation", SELECT_BLOCKS.implementations, ids=lambda i: i.name)


def each(chosen: list[PackedCase] | tuple[PackedCase, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


def index_args(case: PackedCase, p: Packed) -> tuple[Any, ...]:
    return p.index_q_TGJ, p.index_k_MBJ, *p.where, case.num_selected, case.num_local


def defined_scores(p: Packed) -> list[list[np.ndarray]]:
    """For each token and group the scores of its visible blocks, float64, straight from the definition."""
    block_size = p.index_k_MBJ.shape[1]
    key_MBJ, q_TGJ = p.index_k_MBJ.double().numpy(), p.index_q_TGJ.double().numpy()
    starts, scores = p.start_R1.tolist(), []
    for r, length in enumerate(p.length_R.tolist()):
        key_SJ = key_MBJ[p.page_RP[r, : -(-length // block_size)].numpy()].reshape(-1, key_MBJ.shape[2])
        for t in range(starts[r], starts[r + 1]):
            visible = length - (starts[r + 1] - t) + 1
            with np.errstate(invalid="ignore"):
                score_GS = q_TGJ[t] @ key_SJ[:visible].T
            score_GS[np.isnan(score_GS)] = -np.inf
            scores.append([np.maximum.reduceat(score_S, range(0, visible, block_size)) for score_S in score_GS])
    return scores


def defined_blocks(p: Packed, num_selected: int, num_local: int) -> Tensor:
    """The selection that the contract asks for, one Python sort a token and group."""
    rows = []
    for groups in defined_scores(p):
        for score_P in groups:
            own = len(score_P) - 1
            forced = range(max(0, own - num_local + 1), own + 1)
            others = sorted(set(range(own)) - set(forced), key=lambda b: (-score_P[b], b))
            best = sorted([*forced, *others[: num_selected - len(forced)]])
            rows.append(best + [-1] * (num_selected - len(best)))
    shape = (*p.index_q_TGJ.shape[:2], num_selected)
    return torch.tensor(rows, dtype=torch.int32).reshape(shape)


@each_implementation
@each([*EXACT, MILLION])
def test_selection_is_the_definition(case: PackedCase, implementation: Implementation, run: Callable[..., Any]) -> None:
    p = packed(case)
    block_TGK = run(implementation, *index_args(case, p))
    assert block_TGK.dtype == torch.int32
    assert torch.equal(block_TGK, defined_blocks(p, case.num_selected, case.num_local))


@each_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_selection_in_every_dtype(dtype: torch.dtype, implementation: Implementation, run: Callable[..., Any]) -> None:
    case = next(case for case in PACKED if case.name == "mixed_batch")
    p = packed(case, dtype=dtype)
    block_TGK = run(implementation, *index_args(case, p))
    assert torch.equal(block_TGK, defined_blocks(p, case.num_selected, case.num_local))


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_selection_with_a_margin(dtype: torch.dtype, implementation: Implementation, run: Callable[..., Any]) -> None:
    """On real numbers: the sets agree wherever the last block taken and the first left differ by more than rounding."""
    case = next(case for case in PACKED if case.index_values == "normal")
    p = packed(case, dtype=dtype)
    block_TGK = run(implementation, *index_args(case, p))
    wanted_TGK = defined_blocks(p, case.num_selected, case.num_local)
    decided = 0
    for t, groups in enumerate(defined_scores(p)):
        for g, score_P in enumerate(groups):
            taken = set(wanted_TGK[t, g].tolist()) - {-1}
            left = set(range(len(score_P))) - taken
            free = taken - set(range(len(score_P) - case.num_local, len(score_P)))
            if left and free and min(score_P[list(free)]) - max(score_P[list(left)]) < MARGIN:
                continue
            decided += 1
            assert set(block_TGK[t, g].tolist()) - {-1} == taken
    assert decided > 0.9 * wanted_TGK.shape[0] * wanted_TGK.shape[1]


@each_implementation
def test_ties_take_the_smaller_blocks(implementation: Implementation, run: Callable[..., Any]) -> None:
    """Equal scores everywhere, and zeros of either sign, leave the order to the block numbers alone."""
    case = PackedCase(name="", num_tokens=(1,), lengths=(2304,), num_groups=1, num_selected=16)
    for index_k in (
        torch.zeros(18, 128, 8),
        -torch.zeros(18, 128, 8),
        torch.zeros(18, 128, 8).copysign(torch.randn(18, 1, 1)),
    ):
        p = packed(case)._replace(index_k_MBJ=index_k, page_RP=torch.arange(18)[None].int())
        assert run(implementation, *index_args(case, p)).tolist() == [[[*range(15), 17]]]


@each_implementation
def test_blocks_of_nan_come_last_but_are_taken_while_slots_are_free(
    implementation: Implementation, run: Callable[..., Any]
) -> None:
    case = PackedCase(name="", num_tokens=(1,), lengths=(6 * 128,), num_groups=1, index_dim=1)
    index_k = torch.full((6, 128, 1), torch.nan)
    index_k[3, 5], index_k[1] = -1000.0, -torch.inf
    p = packed(case)._replace(index_q_TGJ=torch.ones(1, 1, 1), index_k_MBJ=index_k, page_RP=torch.arange(6)[None].int())
    assert run(implementation, *index_args(case, p)).tolist() == [[[0, 1, 3, 5]]]


@each(PACKED)
def test_default_and_reference_agree(case: PackedCase) -> None:
    if case.index_values == "normal":
        case = replace(case, index_values="integer")
    p = packed(case, seed=1)
    reference = SELECT_BLOCKS.implementations[-1]
    assert reference.name == "reference"
    got = select_blocks(*index_args(case, p)[:5], num_selected=case.num_selected, num_local=case.num_local)
    assert torch.equal(got, reference.run(*index_args(case, p)))


@each([*PACKED, MILLION])
def test_block_scores_are_the_definition(case: PackedCase) -> None:
    p = packed(case)
    score_TGP = block_scores(p.index_q_TGJ, p.index_k_MBJ, *p.where)
    assert score_TGP.dtype == torch.float32
    wanted_TGP = torch.full(score_TGP.shape, -torch.inf)
    for t, groups in enumerate(defined_scores(p)):
        for g, score_P in enumerate(groups):
            wanted_TGP[t, g, : len(score_P)] = torch.from_numpy(score_P)
    tolerance = 1e-5 if case.index_values == "normal" else 0.0
    torch.testing.assert_close(score_TGP, wanted_TGP, rtol=tolerance, atol=tolerance)


def test_block_scores_carry_gradients_and_float64() -> None:
    p = packed(PackedCase(name="", num_tokens=(3,), lengths=(20,), block_size=8), dtype=torch.float64)
    q = p.index_q_TGJ.requires_grad_()
    score_TGP = block_scores(q, p.index_k_MBJ, *p.where)
    assert score_TGP.dtype == torch.float64
    score_TGP[2].sum().backward()
    key_SJ = p.index_k_MBJ[p.page_RP[0].long()].flatten(0, 1)[:20]
    for g in range(2):
        best = [key_SJ[b * 8 : b * 8 + 8][(key_SJ[b * 8 : b * 8 + 8] @ q[2, g]).argmax()] for b in range(3)]
        score = torch.stack(best) @ q[2, g]
        assert torch.equal(score, score_TGP[2, g])
    assert q.grad is not None and q.grad[:2].abs().sum() == 0 and q.grad[2].isfinite().all()


@each_implementation
@each([case for case in EXACT if sum(case.num_tokens)])
def test_batch_composition_changes_nothing(
    case: PackedCase, implementation: Implementation, run: Callable[..., Any]
) -> None:
    p = packed(case)
    together = run(implementation, *index_args(case, p))
    for r, (first, last) in enumerate(zip(p.start_R1.tolist(), p.start_R1.tolist()[1:], strict=False)):
        alone = p._replace(
            index_q_TGJ=p.index_q_TGJ[first:last],
            page_RP=p.page_RP[r : r + 1],
            start_R1=torch.tensor([0, last - first], dtype=torch.int32),
            length_R=p.length_R[r : r + 1],
        )
        assert torch.equal(run(implementation, *index_args(case, alone)), together[first:last])


@each_implementation
@pytest.mark.parametrize("chunk", [1, 7, 128, 200])
def test_chunks_of_a_prompt_change_nothing(chunk: int, implementation: Implementation, run: Callable[..., Any]) -> None:
    case = PackedCase(name="", num_tokens=(900,), lengths=(900,), num_selected=3)
    p = packed(case)
    whole = run(implementation, *index_args(case, p))
    for first in range(700 if chunk == 1 else 0, 900, chunk):
        last = min(first + chunk, 900)
        part = p._replace(
            index_q_TGJ=p.index_q_TGJ[first:last],
            start_R1=torch.tensor([0, last - first], dtype=torch.int32),
            length_R=torch.tensor([last], dtype=torch.int32),
        )
        assert torch.equal(run(implementation, *index_args(case, part)), whole[first:last])


@each_implementation
def test_page_order_and_memory_layout_change_nothing(implementation: Implementation, run: Callable[..., Any]) -> None:
    case = next(case for case in PACKED if case.name == "mixed_batch")
    p = packed(case)
    wanted = run(implementation, *index_args(case, p))
    order = torch.randperm(p.index_k_MBJ.shape[0])
    moved = torch.empty_like(p.index_k_MBJ).index_copy_(0, order, p.index_k_MBJ)
    page_RP = torch.where(p.page_RP >= 0, order[p.page_RP.long()], -1)
    strided_MBJ = moved.transpose(1, 2).contiguous().transpose(1, 2)
    strided_TGJ = p.index_q_TGJ.transpose(0, 1).contiguous().transpose(0, 1)
    for pages in (page_RP.int(), page_RP):
        q = p._replace(index_q_TGJ=strided_TGJ, index_k_MBJ=strided_MBJ, page_RP=pages)
        assert torch.equal(run(implementation, *index_args(case, q)), wanted)


@st.composite
def small_cases(draw: st.DrawFn) -> PackedCase:
    requests = draw(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 40)), max_size=4))
    num_selected = draw(st.integers(1, 7))
    return PackedCase(
        name="drawn",
        num_tokens=tuple(count for count, _ in requests),
        lengths=tuple(count + prefix for count, prefix in requests),
        num_groups=draw(st.integers(1, 3)),
        index_dim=draw(st.integers(1, 4)),
        block_size=draw(st.sampled_from([1, 3, 4, 8, 16, 32])),
        num_selected=num_selected,
        num_local=draw(st.integers(1, num_selected)),
        index_values=draw(st.sampled_from(["integer", "equal", "nonfinite"])),
    )


@given(case=small_cases(), seed=st.integers(0, 2**32))
def test_any_small_batch_selects_by_the_definition(case: PackedCase, seed: int) -> None:
    p = packed(case, seed)
    wanted = defined_blocks(p, case.num_selected, case.num_local)
    for implementation in SELECT_BLOCKS.implementations:
        if implementation.supports(*index_args(case, p)) is None:
            assert torch.equal(implementation.run(*index_args(case, p)), wanted), implementation.name
    visible = (wanted >= 0).sum(-1)
    assert torch.equal(
        visible,
        torch.tensor([[min(case.num_selected, len(s)) for s in row] for row in defined_scores(p)]).reshape(
            visible.shape
        ),
    )


def test_selection_needs_no_gradient() -> None:
    p = packed(PACKED[0])
    assert not select_blocks(p.index_q_TGJ.requires_grad_(), p.index_k_MBJ, *p.where).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index_q_TGJ": torch.zeros(5, 2, 7)}, r"index_q \[T, G, J\]"),
        ({"index_q_TGJ": torch.zeros(4, 2, 8)}, "from 0 to the 4 tokens"),
        ({"start_R1": torch.tensor([1, 5])}, "from 0 to the 5 tokens"),
        ({"start_R1": torch.tensor([0, 2, 5])}, r"start_R1 \[2\]"),
        ({"length_R": torch.tensor([4])}, "request 0 has 5 tokens in this step, but a key length of 4"),
        ({"length_R": torch.tensor([4000])}, "request 0 has 4000 keys, more than its 6 pages hold"),
        ({"page_RP": torch.zeros(2, 6)}, r"page_RP \[1, P\]"),
    ],
)
def test_inconsistent_batches_are_refused(change: dict[str, Tensor], message: str) -> None:
    case = PackedCase(name="", num_tokens=(5,), lengths=(700,))
    p = packed(case)._replace(**change)
    for operator in (select_blocks, block_scores):
        with pytest.raises(ValueError, match=message):
            operator(p.index_q_TGJ, p.index_k_MBJ, *p.where)


def test_decreasing_starts_are_refused() -> None:
    p = packed(PackedCase(name="", num_tokens=(5, 1), lengths=(700, 700)))
    with pytest.raises(ValueError, match="request 1 has -1 tokens"):
        select_blocks(p.index_q_TGJ[:6], p.index_k_MBJ, p.page_RP, torch.tensor([0, 7, 6]), p.length_R)


@pytest.mark.parametrize(("num_selected", "num_local"), [(4, 0), (4, 5), (0, 1), (0, 0)])
def test_impossible_counts_are_refused(num_selected: int, num_local: int) -> None:
    p = packed(PACKED[0])
    with pytest.raises(ValueError, match="num_local must be between 1 and num_selected"):
        select_blocks(p.index_q_TGJ, p.index_k_MBJ, *p.where, num_selected=num_selected, num_local=num_local)
