"""Page writes in Triton: the reference's pools bit by bit, on a GPU or in Triton's interpreter."""

import pytest
import torch

import openm3
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
from openm3.ops.norm import rotary_table

PAIRS = [(torch.float32, torch.float32), (torch.float32, torch.float8_e4m3fn), (torch.bfloat16, torch.bfloat16)]
DTYPES = pytest.mark.parametrize(("given", "stored"), PAIRS, ids=str)
HUGE = torch.tensor([447.0, 448.0, 449.0, 464.0, 465.0, -480.0, 1e30, torch.inf, -torch.inf, torch.nan, 0.0019, -0.0])


def pools(stored: torch.dtype, device: torch.device, index: bool, width: int = 37) -> Pool:
    """Slots outermost in memory, with room between rows; index keys never have eight bits."""
    keys = (torch.zeros(6, 128, 2, 40).to(device, stored)[..., :width].transpose(1, 2) for _ in range(2))
    index_dtype = torch.bfloat16 if stored == torch.float8_e4m3fn else stored
    return Pool(*keys, torch.zeros(6, 128, 20, dtype=index_dtype, device=device)[..., :17] if index else None)


def check_same(one: Pool, other: Pool) -> None:
    for x, y in zip(one.tensors(), other.tensors(), strict=True):
        torch.testing.assert_close(x.float(), y.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("index", [True, False], ids=["index", "dense"])
@pytest.mark.parametrize("tokens", [0, 1, 40])
@DTYPES
def test_writes_are_the_reference(
    given: torch.dtype, stored: torch.dtype, tokens: int, index: bool, triton_device: torch.device
) -> None:
    """Strided inputs into strided pools; infinities, NaN, and what eight bits cannot hold."""
    k_TGH, v_TGH = (torch.randn(tokens, 3, 50).to(given)[:, 1:, 3:40].to(triton_device) for _ in range(2))
    index_k_TJ = torch.randn(tokens, 30).to(given)[:, :17].to(triton_device) if index else None
    if tokens:
        k_TGH[0, 0, :12] = v_TGH[-1, 1, 5:17] = HUGE.to(triton_device, given)
    if index_k_TJ is not None and tokens:
        index_k_TJ[0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    slot_T = torch.randperm(6 * 128)[:tokens].to(triton_device)
    defined, written = (pools(stored, triton_device, index) for _ in range(2))
    with openm3.use("reference"):
        write_pages(k_TGH, v_TGH, index_k_TJ, defined, slot_T)
    write_pages(k_TGH, v_TGH, index_k_TJ, written, slot_T)
    check_same(written, defined)


def projected(
    tokens: int, dtype: torch.dtype, device: torch.device, *, index: bool
) -> tuple[Projections, HeadNorms, tuple[torch.Tensor, torch.Tensor]]:
    """Strided heads, six of queries in two groups, their norms' weights and rotary tables."""
    shapes = (6, 37), (2, 37), (2, 37), (2, 17)
    parts = [torch.randn(tokens, 2 * heads, width + 3)[:, ::2, 3:].to(device, dtype) for heads, width in shapes]
    norms = [torch.randn(2 * width)[::2].to(device, dtype) for width in (37, 37, 17, 17)]
    rope = rotary_table(torch.arange(tokens, device=device) * 999, 10, 1e4)
    if not index:
        return Projections(*parts[:3]), HeadNorms(*norms[:2]), rope
    return Projections(*parts, torch.randn(tokens, 20).to(device, dtype)[:, 1:18]), HeadNorms(*norms), rope


@pytest.mark.parametrize("index", [True, False], ids=["index", "dense"])
@pytest.mark.parametrize("tokens", [0, 1, 40])
@DTYPES
def test_heads_are_their_steps(
    given: torch.dtype, stored: torch.dtype, tokens: int, index: bool, triton_device: torch.device
) -> None:
    """Bit by bit what norm, rotation and page write give one after another, unless a GPU adds up in another order."""
    heads, norms, rope = projected(tokens, given, triton_device, index=index)
    slot_T = torch.randperm(6 * 128)[:tokens].to(triton_device)
    together, apart, defined = (pools(stored, triton_device, index) for _ in range(3))
    queries = write_heads(heads, norms, rope, 1e-6, together, slot_T)
    turned = turn_heads(heads, norms, rope, 1e-6)
    write_pages(turned.k_TGH, turned.v_TGH, turned.index_k_TJ, apart, slot_T)
    with openm3.use("reference"):
        wanted = write_heads(heads, norms, rope, 1e-6, defined, slot_T)
    exact = {"rtol": 0.0, "atol": 0.0}
    near = {"rtol": 2.0**-3, "atol": 2.0**-9} if stored == torch.float8_e4m3fn else {"rtol": 2.0**-6, "atol": 1e-5}
    if given == stored == torch.float32:
        near = {"rtol": 1e-5, "atol": 1e-5}
    for got, steps, reference in zip(
        (*queries, *together[:3]), (turned.q_TNH, turned.index_q_TGJ, *apart[:3]), (*wanted, *defined[:3]), strict=True
    ):
        if got is None:
            assert steps is None and reference is None
            continue
        assert got.dtype == reference.dtype
        torch.testing.assert_close(got.float(), steps.float(), **(near if triton_device.type == "cuda" else exact))
        torch.testing.assert_close(got.float(), reference.float(), **near)


def test_queries_of_padding_are_turned_and_its_keys_stored_nowhere(triton_device: torch.device) -> None:
    heads, norms, rope = projected(4, torch.float32, triton_device, index=True)
    pool = pools(torch.float32, triton_device, True)
    slot_T = torch.tensor([3, -1, 6 * 128, 1 << 40], device=triton_device)
    q_TNH, index_q_TGJ = write_heads(heads, norms, rope, 1e-6, pool, slot_T)
    turned = turn_heads(heads, norms, rope, 1e-6)
    torch.testing.assert_close(q_TNH, turned.q_TNH)
    torch.testing.assert_close(index_q_TGJ, turned.index_q_TGJ)
    assert all(int(x.flatten(0, -2).any(-1).sum()) == (2 if x.ndim == 4 else 1) for x in pool.tensors())


def test_refusals(triton_device: torch.device) -> None:
    pages, heads = (
        next(i for i in operator.implementations if i.name == "triton") for operator in (WRITE_PAGES, WRITE_HEADS)
    )
    parts, norms, rope = projected(1, torch.float32, triton_device, index=True)
    pool, slot_T = pools(torch.float32, triton_device, True), torch.zeros(1, dtype=torch.int64, device=triton_device)
    assert pool.index_k_MBJ is not None
    narrow = pool._replace(index_k_MBJ=pool.index_k_MBJ.to(torch.float8_e4m3fn))
    reason = "takes float32, bfloat16 and float16, not float8_e4m3fn"
    assert pages.supports(parts.k_TGH, parts.v_TGH, parts.index_k_TJ, narrow, slot_T) == reason
    assert heads.supports(parts, norms, rope, 1e-6, narrow, slot_T) == reason
    half = rope[0].half(), rope[1].half()
    assert heads.supports(parts, norms, half, 1e-6, pool, slot_T) == "takes rotary tables in float32"


def test_slots_outside_the_pool_store_nothing(triton_device: torch.device) -> None:
    pool = Pool(*(torch.zeros(5, 2, 128, 4, device=triton_device) for _ in range(2)), None)
    k_TGH = torch.ones(4, 2, 4, device=triton_device)
    write_pages(k_TGH, k_TGH, None, pool, torch.tensor([3, -1, 5 * 128, 1 << 40], device=triton_device))
    assert pool.k_MGBH[0, :, 3].eq(1).all()
    assert int(pool.k_MGBH.sum()) == int(pool.v_MGBH.sum()) == 8


def test_tiles_fill_the_machine(triton_device: torch.device) -> None:
    from openm3.ops.cache.triton import token_tile

    assert [token_tile(tokens, 9, 132) for tokens in (1, 64, 512, 8192)] == [1, 1, 8, 32]
