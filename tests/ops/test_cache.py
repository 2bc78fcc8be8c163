"""Page writes: each token lands in its slot, nothing else moves."""

import pytest
import torch

from openm3.ops.cache import Pool, write_pages


def pools(dtype: torch.dtype = torch.float32, *, index: bool = True) -> Pool:
    index_k_MBJ = torch.full((5, 128, 3), torch.nan, dtype=dtype) if index else None
    return Pool(*(torch.full((5, 2, 128, 4), torch.nan, dtype=dtype) for _ in range(2)), index_k_MBJ)


def test_tokens_land_in_their_slots_and_nothing_else_moves() -> None:
    pool = pools()
    slots = [4 * 128, 4 * 128 + 127, 127, 128, 2 * 128 + 5]
    k_TGH, v_TGH, index_k_TJ = torch.randn(5, 2, 4), torch.randn(5, 2, 4), torch.randn(5, 3)
    write_pages(k_TGH, v_TGH, index_k_TJ, pool, torch.tensor(slots))
    assert pool.index_k_MBJ is not None
    for t, slot in enumerate(slots):
        page, offset = divmod(slot, 128)
        assert torch.equal(pool.k_MGBH[page, :, offset], k_TGH[t])
        assert torch.equal(pool.v_MGBH[page, :, offset], v_TGH[t])
        assert torch.equal(pool.index_k_MBJ[page, offset], index_k_TJ[t])
    assert [int((~x.isnan()).sum()) for x in pool] == [5 * 8, 5 * 8, 5 * 3]


def test_the_pool_keeps_its_dtype() -> None:
    pool = pools(torch.bfloat16)
    k_TGH = torch.randn(1, 2, 4)
    write_pages(k_TGH, k_TGH, torch.randn(1, 3), pool, torch.tensor([7], dtype=torch.int32))
    assert torch.equal(pool.k_MGBH[0, :, 7], k_TGH[0].bfloat16())


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


@pytest.mark.parametrize(
    ("slots", "error", "message"),
    [([0, 1], ValueError, "1 tokens need as many slots"), ([-1], ValueError, "-1"), ([5 * 128], IndexError, "5")],
)
def test_slots_outside_the_pool_are_refused(slots: list[int], error: type[Exception], message: str) -> None:
    k_TGH, pool = torch.ones(1, 2, 4), pools(index=False)
    with pytest.raises(error, match=message):
        write_pages(k_TGH, k_TGH, None, pool, torch.tensor(slots))
    assert pool.k_MGBH.isnan().all()
