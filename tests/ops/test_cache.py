"""Page writes: each token lands in its slot, nothing else moves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import openm3
from openm3.ops import native
from openm3.ops.cache import (
    WRITE_HEADS,
    WRITE_PAGES,
    HeadNorms,
    Pool,
    Projections,
    turn_heads,
    write_heads,
    write_pages,
)
from openm3.ops.cache import native as kernels
from openm3.ops.dispatch import Implementation
from openm3.ops.norm import rotary_table

each_implementation = pytest.mark.parametrize("implementation", WRITE_PAGES.implementations, ids=lambda i: i.name)


@pytest.fixture(params=native.LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has native code run at one instruction-set level; skips those that this machine lacks."""
    if native.missing() or request.param not in native.levels():
        pytest.skip(native.missing() or f"{request.param} is not compiled, or not what this processor runs")
    monkeypatch.setattr(native, "loaded", lambda: native.module(request.param))
    return str(request.param)


def pools(dtype: torch.dtype = torch.float32, *, index: bool = True) -> Pool:
    index_k_MBJ = torch.full((5, 128, 3), torch.nan, dtype=dtype) if index else None
    return Pool(*(torch.full((5, 2, 128, 4), torch.nan, dtype=dtype) for _ in range(2)), index_k_MBJ)


@each_implementation
def test_tokens_land_in_their_slots_and_nothing_else_moves(
    implementation: Implementation, run: Callable[..., Any]
) -> None:
    pool = pools()
    slots = [4 * 128, 4 * 128 + 127, 127, 128, 2 * 128 + 5]
    k_TGH, v_TGH, index_k_TJ = torch.randn(5, 2, 4), torch.randn(5, 2, 4), torch.randn(5, 3)
    run(implementation, k_TGH, v_TGH, index_k_TJ, pool, torch.tensor(slots))
    assert pool.index_k_MBJ is not None
    for t, slot in enumerate(slots):
        page, offset = divmod(slot, 128)
        assert torch.equal(pool.k_MGBH[page, :, offset], k_TGH[t])
        assert torch.equal(pool.v_MGBH[page, :, offset], v_TGH[t])
        assert torch.equal(pool.index_k_MBJ[page, offset], index_k_TJ[t])
    parts = (pool.k_MGBH, pool.v_MGBH, pool.index_k_MBJ)
    assert [int((~x.isnan()).sum()) for x in parts] == [5 * 8, 5 * 8, 5 * 3]


@each_implementation
def test_the_pool_keeps_its_dtype(implementation: Implementation, run: Callable[..., Any]) -> None:
    pool = pools(torch.bfloat16)
    k_TGH = torch.randn(1, 2, 4)
    run(implementation, k_TGH, k_TGH, torch.randn(1, 3), pool, torch.tensor([7], dtype=torch.int32))
    assert torch.equal(pool.k_MGBH[0, :, 7], k_TGH[0].bfloat16())


def test_eight_bits_keep_the_largest_they_have() -> None:
    """PyTorch's own conversion makes NaN of numbers from 465 on. Native code leaves such pools to the reference."""
    pool = Pool(*(torch.zeros(5, 2, 128, 4).to(torch.float8_e4m3fn) for _ in range(2)), None)
    k_TGH = torch.tensor([[447.0, 465.0, -1e30, torch.inf], [-torch.inf, torch.nan, 0.3, -0.0]])[None]
    for given in (k_TGH, k_TGH.bfloat16()):
        write_pages(given, -given, None, pool, torch.tensor([130]))
        wanted_GH = torch.tensor([[448.0, 448.0, -448.0, 448.0], [-448.0, torch.nan, 0.3125, -0.0]])
        torch.testing.assert_close(pool.k_MGBH[1, :, 2].float(), wanted_GH, equal_nan=True)
        torch.testing.assert_close(pool.v_MGBH[1, :, 2].float(), -wanted_GH, equal_nan=True)


def test_dense_layers_have_no_index_keys_and_no_tokens_are_fine() -> None:
    pool = pools(index=False)
    write_pages(torch.ones(1, 2, 4), torch.ones(1, 2, 4), None, pool, torch.tensor([9]))
    assert pool.k_MGBH[0, :, 9].eq(1).all()
    before = pool.k_MGBH.nan_to_num(2.0)
    write_pages(torch.ones(0, 2, 4), torch.ones(0, 2, 4), None, pool, torch.empty(0, dtype=torch.int64))
    assert torch.equal(pool.k_MGBH.nan_to_num(2.0), before)


def test_writing_again_overwrites() -> None:
    pool = pools(index=False)
    for value in (1.0, 2.0):
        write_pages(torch.full((1, 2, 4), value), torch.full((1, 2, 4), value), None, pool, torch.tensor([300]))
    assert pool.v_MGBH[2, :, 300 - 256].eq(2).all()


def test_half_given_index_keys_are_refused() -> None:
    k_TGH, slot_T = torch.ones(1, 2, 4), torch.tensor([0])
    with pytest.raises(ValueError, match="given together or not at all"):
        write_pages(k_TGH, k_TGH, None, pools(), slot_T)
    with pytest.raises(ValueError, match="given together or not at all"):
        write_pages(k_TGH, k_TGH, torch.ones(1, 3), pools(index=False), slot_T)


def test_slots_must_be_as_many_as_tokens() -> None:
    with pytest.raises(ValueError, match="1 tokens need as many slots"):
        write_pages(torch.ones(1, 2, 4), torch.ones(1, 2, 4), None, pools(index=False), torch.tensor([0, 1]))


@each_implementation
@pytest.mark.parametrize("slot", [-1, 5 * 128, 1 << 40])
def test_slots_outside_the_pool_are_refused(slot: int, implementation: Implementation, run: Callable[..., Any]) -> None:
    k_TGH, pool = torch.ones(2, 2, 4), pools(index=False)
    with pytest.raises(ValueError, match=f"slot {slot} is outside the pool of 5 pages of 128 tokens"):
        run(implementation, k_TGH, k_TGH, None, pool, torch.tensor([3, slot]))
    assert pool.k_MGBH.isnan().all()


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("tokens", [1, 5, 700])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_native_writes_are_the_reference(
    given: torch.dtype, stored: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Strided inputs into strided pools, bit by bit, infinities and NaN included."""
    monkeypatch.setattr(native, "threads", lambda: 3)
    k_TGH, v_TGH = (torch.randn(tokens, 3, 100).to(given)[:, 1:, 3:90] for _ in range(2))
    index_k_TJ = torch.randn(tokens, 90).to(given)[:, :37]
    index_k_TJ[0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    slot_T = torch.randperm(6 * 128)[:tokens]
    written = []
    for name in ("reference", "native"):
        # Slots outermost, as pages that training makes: the pool's axes stand in another order than its memory.
        k_MGBH, v_MGBH = (torch.zeros(6, 128, 2, 90, dtype=stored)[..., :87].transpose(1, 2) for _ in range(2))
        pool = Pool(k_MGBH, v_MGBH, torch.zeros(6, 128, 40, dtype=stored)[..., :37])
        with openm3.use(name):
            write_pages(k_TGH, v_TGH, index_k_TJ, pool, slot_T)
        written.append(pool)
    for x, y in zip(written[0][:3], written[1][:3], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))
def test_native_refuses_pools_it_cannot_write() -> None:
    k_TGH, pool = torch.ones(1, 2, 4), pools(index=False)
    across = pool._replace(k_MGBH=torch.zeros(5, 2, 4, 128).transpose(2, 3))
    supports = WRITE_PAGES.implementations[0].supports
    assert supports(k_TGH, k_TGH, None, pool, torch.tensor([0])) is None
    reason = "needs pools that are dense in their last axis"
    assert supports(k_TGH, k_TGH, None, across, torch.tensor([0])) == reason


def projected(tokens: int, dtype: torch.dtype, *, index: bool = True) -> tuple[Projections, HeadNorms]:
    """Strided heads, six of queries in two groups, and their norms' weights."""
    parts = [
        torch.randn(tokens, 2 * heads, width)[:, ::2].to(dtype) for heads, width in ((6, 4), (2, 4), (2, 4), (2, 3))
    ]
    index_k_TJ = torch.randn(tokens, 5).to(dtype)[:, 1:4]
    norms = [torch.randn(width).to(dtype) for width in (4, 4, 3, 3)]
    if not index:
        return Projections(*parts[:3]), HeadNorms(*norms[:2])
    return Projections(*parts, index_k_TJ), HeadNorms(*norms)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_native_heads_are_their_steps(given: torch.dtype, stored: torch.dtype, tokens: int, index: bool) -> None:
    """Bit by bit what the native norm, rotation and page write give one after another; near to the reference."""
    heads, norms = projected(tokens, given, index=index)
    rope, slot_T = rotary_table(torch.arange(tokens) * 999, 2, 1e4), torch.randperm(5 * 128)[:tokens]
    together, apart, defined = (pools(stored, index=index) for _ in range(3))
    assert WRITE_HEADS.choose(heads, norms, rope, 1e-6, together, slot_T).name == "native"
    queries = write_heads(heads, norms, rope, 1e-6, together, slot_T)
    turned = turn_heads(heads, norms, rope, 1e-6)
    write_pages(turned.k_TGH, turned.v_TGH, turned.index_k_TJ, apart, slot_T)
    with openm3.use("reference"):
        wanted = write_heads(heads, norms, rope, 1e-6, defined, slot_T)
    close = {"rtol": 1e-5, "atol": 1e-5} if torch.bfloat16 not in (given, stored) else {"rtol": 2**-7, "atol": 1e-6}
    for got, steps, reference in zip(
        (*queries, *together[:3]), (turned.q_TNH, turned.index_q_TGJ, *apart[:3]), (*wanted, *defined[:3]), strict=True
    ):
        if got is None:
            assert steps is None and reference is None
            continue
        torch.testing.assert_close(got, steps, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(got, reference, **close, equal_nan=True)


def test_heads_are_checked_before_anything_is_written() -> None:
    heads, norms = projected(2, torch.float32)
    rope, pool = rotary_table(torch.arange(2), 2, 1e4), pools()
    with pytest.raises(ValueError, match="given together or not at all"):
        write_heads(heads, norms, rope, 1e-6, pools(index=False), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="2 tokens need as many slots"):
        write_heads(heads, norms, rope, 1e-6, pool, torch.tensor([0]))
    # On a GPU, for which Triton's is, the host does not look at slots.
    for name in {i.name for i in WRITE_HEADS.implementations} - {"triton"}:
        with openm3.use(name), pytest.raises(ValueError, match="slot 640 is outside the pool"):
            write_heads(heads, norms, rope, 1e-6, pool, torch.tensor([0, 640]))
    assert all(x is not None and x.isnan().all() for x in pool[:3])


@pytest.mark.usefixtures("level")
def test_native_heads_need_whole_parts() -> None:
    heads, norms = projected(1, torch.float32)
    rope, slot_T = rotary_table(torch.arange(1), 2, 1e4), torch.tensor([0])
    with pytest.raises(ValueError, match="given together or not at all"):
        kernels.write_heads(heads, HeadNorms(*norms[:2]), rope, 1e-6, pools(), slot_T)
    with pytest.raises(ValueError, match="weights do not fit"):
        kernels.write_heads(heads, norms._replace(k_H=torch.ones(3)), rope, 1e-6, pools(), slot_T)
