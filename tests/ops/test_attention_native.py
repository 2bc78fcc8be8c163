"""Native attention at every instruction-set level, in both dtypes, with its log-sum-exp and whatever the threads."""

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from openm3.ops import native
from openm3.ops.attention import native as own
from openm3.ops.attention import reference
from openm3.ops.cases import PACKED, Packed, PackedCase, packed

pytestmark = pytest.mark.skipif(native.missing() is not None, reason="needs the native operators")

SCALE = 0.3


@pytest.fixture(params=native.levels(), autouse=True)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each level that this processor runs, in place of the best one."""
    monkeypatch.setattr(native, "loaded", lambda: native.module(request.param))
    return str(request.param)


def keys(p: Packed) -> tuple[Any, ...]:
    return p.q_TNH, p.k_MGBH, p.v_MGBH, *p.where


def wide(p: Packed) -> Packed:
    return p._replace(q_TNH=p.q_TNH.double(), k_MGBH=p.k_MGBH.double(), v_MGBH=p.v_MGBH.double())


def assert_as_good(got: Tensor, plain: Tensor, truth: Tensor) -> None:
    """At most twice the error of plain PyTorch in the same dtype, plus two units in the largest value's last place."""
    unit = torch.finfo(got.dtype).eps * float(truth.abs().max()) if truth.numel() else 0.0
    assert error(got, truth) <= 2 * error(plain, truth) + 2 * unit


def error(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).abs().max()) if truth.numel() else 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
def test_error_is_at_most_twice_that_of_the_reference(case: PackedCase, dtype: torch.dtype) -> None:
    p = packed(case, dtype=dtype)
    truth_TNH, truth_TN = reference.sparse_attention(*keys(wide(p)), p.block_TGK, SCALE)
    plain_TNH, _ = reference.sparse_attention(*keys(p), p.block_TGK, SCALE)
    out_TNH, lse_TN = own.sparse_attention_lse(*keys(p), p.block_TGK, SCALE)
    assert out_TNH.dtype == dtype
    assert_as_good(out_TNH, plain_TNH, truth_TNH)
    torch.testing.assert_close(lse_TN.double(), truth_TN, rtol=0, atol=1e-5)
    truth_TNH, _ = reference.dense_attention(*keys(wide(p)), SCALE)
    plain_TNH, _ = reference.dense_attention(*keys(p), SCALE)
    assert_as_good(own.dense_attention(*keys(p), SCALE), plain_TNH, truth_TNH)


@pytest.mark.parametrize("mixed", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_queries_and_cache_may_differ_in_dtype(mixed: tuple[torch.dtype, torch.dtype]) -> None:
    p = packed(next(case for case in PACKED if case.name == "mixed_batch"))
    query, cache = mixed
    p = p._replace(q_TNH=p.q_TNH.to(query), k_MGBH=p.k_MGBH.to(cache), v_MGBH=p.v_MGBH.to(cache))
    truth_TNH, _ = reference.sparse_attention(*keys(wide(p)), p.block_TGK, SCALE)
    plain_TNH, _ = reference.sparse_attention(*keys(p), p.block_TGK, SCALE)
    out_TNH = own.sparse_attention(*keys(p), p.block_TGK, SCALE)
    assert out_TNH.dtype == query
    assert_as_good(out_TNH, plain_TNH, truth_TNH)


WIDE = PackedCase(
    name="wide", num_tokens=(1, 5, 40, 0), lengths=(400, 300, 333, 40), num_selected=3, heads_per_group=16
)


@pytest.mark.parametrize("query", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("head_dim", "heads"), [(32, 16), (64, 16), (96, 16), (128, 16), (192, 3), (64, 20), (128, 1)])
def test_widths_that_fill_matrix_tiles(head_dim: int, heads: int, query: torch.dtype) -> None:
    p = packed(dataclasses.replace(WIDE, head_dim=head_dim, heads_per_group=heads), dtype=torch.bfloat16)
    p = p._replace(q_TNH=p.q_TNH.to(query))
    truth_TNH, truth_TN = reference.sparse_attention(*keys(wide(p)), p.block_TGK, SCALE)
    plain_TNH, _ = reference.sparse_attention(*keys(p), p.block_TGK, SCALE)
    out_TNH, lse_TN = own.sparse_attention_lse(*keys(p), p.block_TGK, SCALE)
    assert_as_good(out_TNH, plain_TNH, truth_TNH)
    torch.testing.assert_close(lse_TN.double(), truth_TN, rtol=0, atol=1e-5)
    truth_TNH, _ = reference.dense_attention(*keys(wide(p)), SCALE)
    plain_TNH, _ = reference.dense_attention(*keys(p), SCALE)
    assert_as_good(own.dense_attention(*keys(p), SCALE), plain_TNH, truth_TNH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 4, 40])
def test_what_lies_behind_the_last_key_is_never_seen(num_tokens: int, dtype: torch.dtype) -> None:
    case = PackedCase(name="stale", num_tokens=(num_tokens,), lengths=(1000,), head_dim=64, heads_per_group=16)
    p = packed(case, dtype=dtype)
    wanted = own.sparse_attention(*keys(p), p.block_TGK, SCALE)
    last = int(p.where[0][0, 1000 // 128])
    k_MGBH, v_MGBH = p.k_MGBH.clone(), p.v_MGBH.clone()
    k_MGBH[last, :, 1000 % 128 :] = math.nan
    v_MGBH[last, :, 1000 % 128 :] = math.inf
    stale = p._replace(k_MGBH=k_MGBH, v_MGBH=v_MGBH)
    assert torch.equal(own.sparse_attention(*keys(stale), p.block_TGK, SCALE), wanted)


def test_pages_may_lie_in_any_order_of_axes() -> None:
    p = packed(next(case for case in PACKED if case.name == "chunk_behind_prefix"))
    wanted = own.sparse_attention(*keys(p), p.block_TGK, SCALE)
    strided = p._replace(
        q_TNH=p.q_TNH.transpose(0, 1).contiguous().transpose(0, 1),
        k_MGBH=p.k_MGBH.transpose(1, 2).contiguous().transpose(1, 2),
        v_MGBH=p.v_MGBH.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
    )
    assert torch.equal(own.sparse_attention(*keys(strided), p.block_TGK, SCALE), wanted)


@pytest.mark.parametrize("heads", [1, 3, 5, 8, 16, 20, 33])
def test_any_number_of_heads_fills_the_lanes(heads: int) -> None:
    case = PackedCase(name="heads", num_tokens=(21, 1), lengths=(700, 300), heads_per_group=heads)
    p = packed(case)
    truth_TNH, _ = reference.sparse_attention(*keys(wide(p)), p.block_TGK, SCALE)
    assert error(own.sparse_attention(*keys(p), p.block_TGK, SCALE), truth_TNH) <= 2e-6


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads_is_right(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "threads", lambda: threads)
    p = packed(PackedCase(name="threads", num_tokens=(1, 40), lengths=(2000, 1500), num_groups=1, num_selected=9))
    truth_TNH, truth_TN = reference.sparse_attention(*keys(wide(p)), p.block_TGK, SCALE)
    out_TNH, lse_TN = own.sparse_attention_lse(*keys(p), p.block_TGK, SCALE)
    assert error(out_TNH, truth_TNH) <= 2e-6
    torch.testing.assert_close(lse_TN.double(), truth_TN, rtol=0, atol=1e-5)


SHARED = PackedCase(
    name="shared", num_tokens=(1,) * 20 + (2, 3, 40), lengths=(*range(700, 900, 10), 760, 1100, 800), head_dim=64
)


@pytest.mark.parametrize("heads", [2, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_requests_that_share_pages_get_what_they_get_alone(dtype: torch.dtype, heads: int) -> None:
    """To the last bit: they meet the pages together, but each reckons for itself."""
    p = packed(dataclasses.replace(SHARED, heads_per_group=heads), dtype=dtype)
    p.page_RP[:, :4] = p.page_RP[0, :4]
    together_TNH, lse_TN = own.sparse_attention_lse(*keys(p), p.block_TGK, SCALE)
    dense_TNH = own.dense_attention(*keys(p), SCALE)
    for r, (start, stop) in enumerate(pairwise(p.start_R1.tolist())):
        where = p.page_RP[r : r + 1], torch.tensor([0, stop - start]), p.length_R[r : r + 1]
        alone = p.q_TNH[start:stop], p.k_MGBH, p.v_MGBH, *where
        out_TNH, out_TN = own.sparse_attention_lse(*alone, p.block_TGK[start:stop], SCALE)
        assert torch.equal(out_TNH, together_TNH[start:stop])
        assert torch.equal(out_TN, lse_TN[start:stop])
        assert torch.equal(own.dense_attention(*alone, SCALE), dense_TNH[start:stop])


def test_large_scores_do_not_overflow() -> None:
    p = packed(next(case for case in PACKED if case.name == "partial_last_block"))
    p = p._replace(q_TNH=p.q_TNH * 1000)
    truth_TNH, truth_TN = reference.sparse_attention(*keys(wide(p)), p.block_TGK, SCALE)
    plain_TNH, _ = reference.sparse_attention(*keys(p), p.block_TGK, SCALE)
    out_TNH, lse_TN = own.sparse_attention_lse(*keys(p), p.block_TGK, SCALE)
    assert error(out_TNH, truth_TNH) <= 2 * error(plain_TNH, truth_TNH) + 1e-5
    torch.testing.assert_close(lse_TN.double(), truth_TN, rtol=1e-6, atol=1e-5)


def test_exp_is_within_two_units_in_the_last_place() -> None:
    """Far below a larger score, the weight of a value of one is the exponential itself: the sum rounds to one."""
    exponent_T = torch.linspace(-87, -18, 20_000)
    k_MGBH, v_MGBH = torch.zeros(2, 1, 1, 16, 1)
    k_MGBH[0, 0, 1], v_MGBH[0, 0, 1] = 1, 1
    q_TNH = exponent_T[:, None, None]
    alone = torch.arange(len(exponent_T) + 1), torch.full((len(exponent_T),), 2)
    out_TNH = own.dense_attention(
        q_TNH, k_MGBH, v_MGBH, torch.zeros(len(exponent_T), 1, dtype=torch.int32), *alone, 1.0
    )
    exact_T = exponent_T.double().exp()
    unit_T = torch.nextafter(exact_T.float(), torch.tensor(torch.inf)).double() - exact_T.float().double()
    assert ((out_TNH[:, 0, 0].double() - exact_T).abs() / unit_T).max() < 2


def test_nan_and_infinity_stay_in_their_own_rows() -> None:
    p = packed(next(case for case in PACKED if case.name == "exact_blocks"))
    wanted = own.sparse_attention(*keys(p), p.block_TGK, SCALE)
    q_TNH = p.q_TNH.clone()
    q_TNH[5, 2, 0] = math.nan
    got = own.sparse_attention(q_TNH, *keys(p)[1:], p.block_TGK, SCALE)
    assert got[5, 2].isnan().all()
    got[5, 2] = wanted[5, 2]
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("block", [-2, -(2**31)])
def test_block_ids_below_minus_one_raise(block: int) -> None:
    p = packed(next(case for case in PACKED if case.name == "exact_blocks"))
    block_TGK = p.block_TGK.clone()
    block_TGK[3, 1, 0] = block
    with pytest.raises(ValueError, match=f"block ids must be -1 or more, not {block}"):
        own.sparse_attention(*keys(p), block_TGK, SCALE)
