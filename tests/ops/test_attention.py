"""Attention: every implementation against the definition in float64, forward and backward, and its invariances."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from openm3.ops.attention import DENSE, SPARSE, dense_attention, reference, sparse_attention, sparse_attention_lse
from openm3.ops.cases import MILLION, PACKED, Packed, PackedCase, packed
from openm3.ops.dispatch import Implementation, use

SCALE = 0.3
COMPILED = {"no_tokens", "mixed_batch", "odd_widths"}
"""The cases that also run through torch.compile, whose first call takes seconds."""


def by_name(name: str) -> PackedCase:
    return next(case for case in PACKED if case.name == name)


def runs(cases: tuple[PackedCase, ...], *, dense: bool = False) -> pytest.MarkDecorator:
    """Every case with every implementation of sparse (or dense) attention."""
    implementations = (DENSE if dense else SPARSE).implementations
    pairs = [
        pytest.param(case, implementation, id=f"{case.name}-{implementation.name}")
        for case in cases
        for implementation in implementations
        if implementation.name != "compiled" or case.name in COMPILED
    ]
    return pytest.mark.parametrize(("case", "implementation"), pairs)


def sparse_args(p: Packed) -> tuple[Any, ...]:
    return p.q_TNH, p.k_MGBH, p.v_MGBH, *p.where, p.block_TGK, SCALE


def dense_args(p: Packed) -> tuple[Any, ...]:
    return p.q_TNH, p.k_MGBH, p.v_MGBH, *p.where, SCALE


def widened(p: Packed) -> Packed:
    return p._replace(q_TNH=p.q_TNH.double(), k_MGBH=p.k_MGBH.double(), v_MGBH=p.v_MGBH.double())


def defined(p: Packed, *, dense: bool = False) -> tuple[Tensor, Tensor]:
    """Output and lse, token by token and head by head, in float64."""
    p = widened(p)
    groups, block_size = p.k_MGBH.shape[1:3]
    out_TNH = torch.zeros_like(p.q_TNH)
    lse_TN = torch.full(p.q_TNH.shape[:2], -torch.inf, dtype=torch.float64)
    starts = p.start_R1.tolist()
    for r, length in enumerate(p.length_R.tolist()):
        for t in range(starts[r], starts[r + 1]):
            position = length - (starts[r + 1] - t)
            for n in range(p.q_TNH.shape[1]):
                g = n * groups // p.q_TNH.shape[1]
                blocks = range(position // block_size + 1) if dense else p.block_TGK[t, g].tolist()
                slots = [b * block_size + i for b in blocks if b >= 0 for i in range(block_size)]
                seen = torch.tensor([s for s in slots if s <= position], dtype=torch.long)
                if seen.numel() == 0:
                    continue
                page, offset = p.page_RP[r].long()[seen // block_size], seen % block_size
                score_S = p.k_MGBH[page, g, offset] @ p.q_TNH[t, n] * SCALE
                lse_TN[t, n] = score_S.logsumexp(0)
                out_TNH[t, n] = (score_S - lse_TN[t, n]).exp() @ p.v_MGBH[page, g, offset]
    return out_TNH, lse_TN


def assert_as_good(got: Tensor, own: Tensor, truth: Tensor, units: int = 2) -> None:
    """At most twice the error of plain PyTorch in the same dtype, plus some units in the largest value's last place."""
    assert got.dtype == own.dtype and got.shape == truth.shape
    if truth.numel() == 0:
        return
    unit = torch.finfo(own.dtype).eps * truth.abs().max()
    assert (got.double() - truth).abs().max() <= 2 * (own.double() - truth).abs().max() + units * unit


@runs(PACKED)
def test_sparse_error(case: PackedCase, implementation: Implementation, run: Callable[..., Any]) -> None:
    p = packed(case)
    out_TNH = run(implementation, *sparse_args(p))
    own_TNH, _ = reference.sparse_attention(*sparse_args(p))
    truth_TNH, _ = reference.sparse_attention(*sparse_args(widened(p)))
    assert_as_good(out_TNH, own_TNH, truth_TNH)


@runs(PACKED, dense=True)
def test_dense_error(case: PackedCase, implementation: Implementation, run: Callable[..., Any]) -> None:
    p = packed(case)
    out_TNH = run(implementation, *dense_args(p))
    own_TNH, _ = reference.dense_attention(*dense_args(p))
    truth_TNH, _ = reference.dense_attention(*dense_args(widened(p)))
    assert_as_good(out_TNH, own_TNH, truth_TNH)


@pytest.mark.parametrize("name", ["one_token", "some_requests_empty", "block_edges", "small_blocks", "odd_widths"])
def test_the_reference_is_the_definition(name: str) -> None:
    p = packed(by_name(name))
    for dense in (False, True):
        wanted_TNH, wanted_TN = defined(p, dense=dense)
        if dense:
            out_TNH, lse_TN = reference.dense_attention(*dense_args(widened(p)))
        else:
            out_TNH, lse_TN = reference.sparse_attention(*sparse_args(widened(p)))
        torch.testing.assert_close(out_TNH, wanted_TNH, rtol=0, atol=1e-13)
        torch.testing.assert_close(lse_TN, wanted_TN, rtol=0, atol=1e-13)


@pytest.mark.parametrize("implementation", SPARSE.implementations[:2], ids=lambda i: i.name)
def test_a_million_tokens(implementation: Implementation, run: Callable[..., Any]) -> None:
    p = packed(MILLION)
    truth_TNH, _ = reference.sparse_attention(*sparse_args(widened(p)))
    torch.testing.assert_close(run(implementation, *sparse_args(p)).double(), truth_TNH, rtol=0, atol=1e-6)
    assert int(p.block_TGK[0, 0, -1]) == (1 << 13) + 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@runs((by_name("mixed_batch"),))
def test_other_dtypes(
    case: PackedCase, implementation: Implementation, dtype: torch.dtype, run: Callable[..., Any]
) -> None:
    """Computed in float32 (float64) whatever comes in: only the result is rounded, to the dtype of q."""
    p = packed(case, dtype=dtype)
    out_TNH = run(implementation, *sparse_args(p))
    truth_TNH, _ = reference.sparse_attention(*sparse_args(widened(p)))
    assert out_TNH.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out_TNH.double(), truth_TNH, rtol=eps, atol=2e-6 if eps > 1e-9 else 1e-13)


@runs((by_name("mixed_batch"),))
def test_cached_keys_may_be_narrower_than_queries(
    case: PackedCase, implementation: Implementation, run: Callable[..., Any]
) -> None:
    p = packed(case, dtype=torch.bfloat16)
    p = p._replace(q_TNH=p.q_TNH.float())
    truth_TNH, _ = reference.sparse_attention(*sparse_args(widened(p)))
    torch.testing.assert_close(run(implementation, *sparse_args(p)).double(), truth_TNH, rtol=0, atol=2e-6)
    dense_TNH = dense_attention(*dense_args(p)[:-1], scale=SCALE)
    truth_TNH, _ = reference.dense_attention(*dense_args(widened(p)))
    torch.testing.assert_close(dense_TNH.double(), truth_TNH, rtol=0, atol=2e-6)


def every_block(p: Packed) -> Packed:
    """The same batch with all blocks selected: ids after the token's own block are there too, and hold nothing."""
    block_P = torch.arange(p.page_RP.shape[1], dtype=torch.int32)
    return p._replace(block_TGK=block_P.expand(*p.block_TGK.shape[:2], -1))


@runs(PACKED)
def test_all_blocks_selected_is_dense(
    case: PackedCase, implementation: Implementation, run: Callable[..., Any]
) -> None:
    p = packed(case)
    out_TNH = run(implementation, *sparse_args(every_block(p)))
    wanted_TNH, _ = reference.dense_attention(*dense_args(p))
    torch.testing.assert_close(out_TNH, wanted_TNH, rtol=0, atol=2e-6)


@runs(tuple(by_name(name) for name in ("block_edges", "mixed_batch", "small_blocks", "documents")))
def test_order_of_pages_and_ids_changes_nothing(
    case: PackedCase, implementation: Implementation, run: Callable[..., Any]
) -> None:
    p = packed(case)
    wanted_TNH = run(implementation, *sparse_args(p))
    order = torch.randperm(p.k_MGBH.shape[0])
    k, v = (torch.empty_like(x).index_copy_(0, order, x) for x in (p.k_MGBH, p.v_MGBH))
    moved = p._replace(k_MGBH=k, v_MGBH=v, page_RP=torch.where(p.page_RP >= 0, order[p.page_RP.long()], -1))
    assert torch.equal(run(implementation, *sparse_args(moved)), wanted_TNH)
    shuffled = p._replace(block_TGK=p.block_TGK.flip(-1))
    torch.testing.assert_close(run(implementation, *sparse_args(shuffled)), wanted_TNH, rtol=0, atol=1e-6)


@runs((by_name("mixed_batch"), by_name("three_groups_of_one")))
def test_memory_layout_changes_nothing(
    case: PackedCase, implementation: Implementation, run: Callable[..., Any]
) -> None:
    p = packed(case)
    strided = p._replace(
        q_TNH=p.q_TNH.transpose(0, 1).contiguous().transpose(0, 1),
        k_MGBH=p.k_MGBH.transpose(1, 2).contiguous().transpose(1, 2),
        v_MGBH=p.v_MGBH.transpose(1, 2).contiguous().transpose(1, 2),
        block_TGK=p.block_TGK.transpose(0, 1).contiguous().transpose(0, 1),
    )
    wanted_TNH = run(implementation, *sparse_args(p))
    torch.testing.assert_close(run(implementation, *sparse_args(strided)), wanted_TNH, rtol=0, atol=1e-6)


def part(p: Packed, r: int, first: int, last: int) -> Packed:
    """Some consecutive tokens of request r as a batch of their own."""
    start, end, length = int(p.start_R1[r]), int(p.start_R1[r + 1]), int(p.length_R[r])
    return p._replace(
        q_TNH=p.q_TNH[start + first : start + last],
        block_TGK=p.block_TGK[start + first : start + last],
        page_RP=p.page_RP[r : r + 1],
        start_R1=torch.tensor([0, last - first], dtype=torch.int32),
        length_R=torch.tensor([length - (end - start) + last], dtype=torch.int32),
    )


@pytest.mark.parametrize("chunk", [3, 64, 128, 500])
@pytest.mark.parametrize("implementation", SPARSE.implementations[:2], ids=lambda i: i.name)
def test_chunks_of_a_prompt_change_nothing(chunk: int, implementation: Implementation, run: Callable[..., Any]) -> None:
    dense = next(i for i in DENSE.implementations if i.name == implementation.name)
    p = packed(by_name("whole_prompt"))
    sparse_TNH, dense_TNH = run(implementation, *sparse_args(p)), run(dense, *dense_args(p))
    for first in range(300 if chunk == 3 else 0, 520, chunk):
        q = part(p, 0, first, last := min(first + chunk, 520))
        torch.testing.assert_close(run(implementation, *sparse_args(q)), sparse_TNH[first:last], rtol=0, atol=1e-6)
        torch.testing.assert_close(run(dense, *dense_args(q)), dense_TNH[first:last], rtol=0, atol=1e-6)


@runs(tuple(by_name(name) for name in ("mixed_batch", "documents", "decode_batch", "some_requests_empty")))
def test_batch_composition_changes_nothing(
    case: PackedCase, implementation: Implementation, run: Callable[..., Any]
) -> None:
    p = packed(case)
    together_TNH = run(implementation, *sparse_args(p))
    for r, count in enumerate(case.num_tokens):
        first = int(p.start_R1[r])
        alone_TNH = run(implementation, *sparse_args(part(p, r, 0, count)))
        assert torch.equal(alone_TNH, together_TNH[first : first + count])


@runs((by_name("mixed_batch"), by_name("odd_widths")))
def test_tokens_without_a_visible_key_give_zeros(
    case: PackedCase, implementation: Implementation, run: Callable[..., Any]
) -> None:
    """All -1, or blocks of the future only: zeros, and no gradient from them or to them that is not finite."""
    p = packed(case)
    block_TGK = p.block_TGK.clone()
    block_TGK[::2] = -1
    block_TGK[3::4] = torch.tensor([100, 1 << 30, 2**31 - 1, 77], dtype=torch.int32)
    block_TGK[1::4, 0] = -1
    p = p._replace(block_TGK=block_TGK)
    q, k, v = (x.clone().requires_grad_() for x in p[:3])
    out_TNH = run(implementation, q, k, v, *p.where, block_TGK, SCALE)
    out_TNH.square().sum().backward()
    heads = p.q_TNH.shape[1] // block_TGK.shape[1]
    assert not out_TNH[::2].any() and not out_TNH[3::4].any() and not out_TNH[1::4, :heads].any()
    assert out_TNH[1::4, heads:].abs().amin() > 0
    _, lse_TN = reference.sparse_attention(*sparse_args(p))
    assert (lse_TN[::2] == -torch.inf).all() and lse_TN[1::4, heads:].isfinite().all()
    for x in (q, k, v):
        assert x.grad is not None and x.grad.isfinite().all()
    assert q.grad is not None and not q.grad[::2].any() and q.grad[1::4, heads:].any()


@runs((by_name("mixed_batch"), by_name("verify_eight_tokens"), by_name("small_blocks")))
def test_missing_ids_may_stand_anywhere(
    case: PackedCase, implementation: Implementation, run: Callable[..., Any]
) -> None:
    p = packed(case)
    gaps_TGK = torch.full((*p.block_TGK.shape[:2], 2 * case.num_selected), -1, dtype=torch.int32)
    gaps_TGK[..., 1::2] = p.block_TGK
    gaps_TGK[..., 0] = 1 << 20
    out_TNH = run(implementation, *sparse_args(p._replace(block_TGK=gaps_TGK)))
    torch.testing.assert_close(out_TNH, run(implementation, *sparse_args(p)), rtol=0, atol=1e-6)


@runs(tuple(by_name(name) for name in ("mixed_batch", "whole_prompt", "small_blocks", "odd_widths")))
def test_gradients(case: PackedCase, implementation: Implementation, run: Callable[..., Any]) -> None:
    """As good as PyTorch's own in float32; exactly zero where nothing was read, NaN or not."""
    p = packed(case)
    towards_TNH = torch.randn_like(p.q_TNH)

    def gradients(function: Callable[..., Any], p: Packed) -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for x in p[:3]]
        out = function(*inputs, *p.where, p.block_TGK, SCALE)
        out = out[0] if isinstance(out, tuple) else out
        return list(torch.autograd.grad(out, inputs, towards_TNH.to(out.dtype)))

    got = gradients(lambda *args: run(implementation, *args), p)
    own, truth = gradients(reference.sparse_attention, p), gradients(reference.sparse_attention, widened(p))
    for x, x_own, x_truth in zip(got, own, truth, strict=True):
        assert_as_good(x, x_own, x_truth, units=8)
    unread = p.k_MGBH.isnan()
    assert unread.any() and not got[1][unread].any() and not got[2][unread].any()


@runs((by_name("mixed_batch"),), dense=True)
def test_dense_gradients(case: PackedCase, implementation: Implementation, run: Callable[..., Any]) -> None:
    p = packed(case)
    inputs = [x.clone().requires_grad_() for x in p[:3]]
    truths = [x.double().requires_grad_() for x in p[:3]]
    run(implementation, *inputs, *p.where, SCALE).square().sum().backward()
    reference.dense_attention(*truths, *p.where, SCALE)[0].square().sum().backward()
    for x, truth in zip(inputs, truths, strict=True):
        assert x.grad is not None and truth.grad is not None
        torch.testing.assert_close(x.grad.double(), truth.grad, rtol=0, atol=3e-6 * float(truth.grad.abs().max()))


def test_gradients_of_the_reference_are_derivatives() -> None:
    case = PackedCase(name="", num_tokens=(3, 1), lengths=(7, 4), head_dim=2, block_size=2, num_selected=2)
    p = packed(case, dtype=torch.float64)
    inputs = tuple(x.nan_to_num(0.5).requires_grad_() for x in p[:3])

    def sparse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return reference.sparse_attention(q, k, v, *p.where, p.block_TGK, SCALE)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return reference.dense_attention(q, k, v, *p.where, SCALE)

    assert torch.autograd.gradcheck(sparse, inputs) and torch.autograd.gradcheck(dense, inputs)


def test_shared_pages_collect_gradients_of_all_readers() -> None:
    """Two requests over one prefix page: its gradient is the sum of what each alone would give."""
    case = PackedCase(name="", num_tokens=(2, 3), lengths=(130, 131))
    p = packed(case)
    page_RP = p.page_RP.clone()
    page_RP[1, 0] = page_RP[0, 0]
    p = p._replace(page_RP=page_RP)

    def key_gradient(q: Packed) -> Tensor:
        k = q.k_MGBH.clone().requires_grad_()
        out = sparse_attention(q.q_TNH, k, q.v_MGBH, *q.where, q.block_TGK, scale=SCALE)
        return torch.autograd.grad(out.square().sum(), k)[0]

    wanted = key_gradient(part(p, 0, 0, 2)) + key_gradient(part(p, 1, 0, 3))
    torch.testing.assert_close(key_gradient(p), wanted, rtol=0, atol=1e-6)


def test_lse_is_natural_float32_and_merges_parts() -> None:
    """Attention over disjoint selections, merged by their lse, is attention over both."""
    case = by_name("verify_eight_tokens")
    p = packed(case)
    public = (*sparse_args(p)[:-1],)
    out_TNH, lse_TN = sparse_attention_lse(*public, scale=SCALE)
    assert lse_TN.dtype == torch.float32
    wanted_TNH, wanted_TN = defined(p)
    torch.testing.assert_close(lse_TN.double(), wanted_TN, rtol=0, atol=2e-6)
    torch.testing.assert_close(out_TNH.double(), wanted_TNH, rtol=0, atol=2e-6)
    near = p.block_TGK >= 5
    parts = [sparse_attention_lse(*public[:-1], p.block_TGK.where(keep, -1), scale=SCALE) for keep in (near, ~near)]
    weight = torch.stack([lse for _, lse in parts]).softmax(0)
    merged_TNH = sum(w[..., None] * out for w, (out, _) in zip(weight, parts, strict=True))
    torch.testing.assert_close(merged_TNH, out_TNH, rtol=0, atol=2e-6)
    bf16 = sparse_attention_lse(*(x.bfloat16() for x in p[:3]), *p.where, p.block_TGK, scale=SCALE)
    assert bf16[0].dtype == torch.bfloat16 and bf16[1].dtype == torch.float32


def test_each_token_uses_its_own_selection() -> None:
    """Neighbouring tokens with disjoint selections do not see each other's blocks."""
    case = PackedCase(name="", num_tokens=(8,), lengths=(1152,), num_groups=1, heads_per_group=1, num_selected=1)
    p = packed(case)
    p = p._replace(block_TGK=torch.arange(8, dtype=torch.int32)[:, None, None])
    for name in ("blocked", "reference"):
        v = p.v_MGBH.clone()
        for b in range(8):
            v[p.page_RP[0, b]] = float(b)
        with use(name):
            out_TNH = sparse_attention(p.q_TNH, p.k_MGBH, v, *p.where, p.block_TGK, scale=SCALE)
        torch.testing.assert_close(out_TNH, torch.arange(8.0)[:, None, None].expand(8, 1, 16), rtol=0, atol=1e-5)


def test_large_scores_stay_finite() -> None:
    p = packed(by_name("block_edges"))
    p = p._replace(q_TNH=p.q_TNH * 1e4)
    truth_TNH, _ = reference.sparse_attention(*sparse_args(widened(p)))
    for implementation in SPARSE.implementations[:2]:
        out_TNH = implementation.run(*sparse_args(p))
        torch.testing.assert_close(out_TNH.double(), truth_TNH, rtol=0, atol=2e-2)


@given(data=st.data(), seed=st.integers(0, 2**32))
def test_any_small_batch_attends_by_the_definition(data: st.DataObject, seed: int) -> None:
    requests = data.draw(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 20)), max_size=3))
    case = PackedCase(
        name="drawn",
        num_tokens=tuple(count for count, _ in requests),
        lengths=tuple(count + prefix for count, prefix in requests),
        num_groups=data.draw(st.integers(1, 3)),
        heads_per_group=data.draw(st.integers(1, 3)),
        head_dim=data.draw(st.integers(1, 5)),
        block_size=data.draw(st.sampled_from([1, 4, 8])),
        num_selected=data.draw(st.integers(1, 4)),
    )
    p = packed(case, seed)
    hidden_TGK = torch.rand(p.block_TGK.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    p = p._replace(block_TGK=p.block_TGK.masked_fill(hidden_TGK, -1))
    for dense in (False, True):
        wanted_TNH, _ = defined(p, dense=dense)
        for implementation in (DENSE if dense else SPARSE).implementations[:2]:
            out_TNH = implementation.run(*(dense_args(p) if dense else sparse_args(p)))
            torch.testing.assert_close(out_TNH.double(), wanted_TNH, rtol=0, atol=3e-6, msg=implementation.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_MGBH": torch.zeros(9, 2, 128, 8)}, r"k and v \[M, G, B, H\]"),
        ({"q_TNH": torch.zeros(5, 4, 8)}, r"q \[T, N, 16\]"),
        ({"q_TNH": torch.zeros(5, 3, 16)}, "N a multiple of 2"),
        ({"block_TGK": torch.zeros(5, 4, 4)}, r"blocks \[5, 2, K\]"),
        ({"length_R": torch.tensor([4])}, "key length of 4"),
    ],
)
def test_wrong_shapes_are_refused(change: dict[str, Tensor], message: str) -> None:
    p = packed(PackedCase(name="", num_tokens=(5,), lengths=(700,)))._replace(**change)
    for operator in (sparse_attention, sparse_attention_lse):
        with pytest.raises(ValueError, match=message):
            operator(*sparse_args(p)[:-1], scale=SCALE)
    if "block_TGK" not in change:
        with pytest.raises(ValueError, match=message):
            dense_attention(*dense_args(p)[:-1], scale=SCALE)
