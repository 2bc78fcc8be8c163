"""Page writes in Triton: the reference's pools bit by bit, on a GPU or in Triton's interpreter."""

import pytest
import torch

import openm3
from openm3.ops.cache import Pool, write_pages


@pytest.mark.parametrize("index", [True, False], ids=["index", "dense"])
@pytest.mark.parametrize("tokens", [0, 1, 70])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_writes_are_the_reference(
    given: torch.dtype, stored: torch.dtype, tokens: int, index: bool, triton_device: torch.device
) -> None:
    """Strided inputs into strided pools, infinities and NaN included."""
    k_TGH, v_TGH = (torch.randn(tokens, 3, 50).to(given)[:, 1:, 3:40].to(triton_device) for _ in range(2))
    index_k_TJ = torch.randn(tokens, 30).to(given)[:, :17].to(triton_device) if index else None
    if index_k_TJ is not None and tokens:
        index_k_TJ[0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    slot_T = torch.randperm(6 * 128)[:tokens].to(triton_device)
    written = []
    for name in ("reference", "triton"):
        k_MGBH, v_MGBH = (
            torch.zeros(6, 128, 2, 40, dtype=stored, device=triton_device)[..., :37].transpose(1, 2) for _ in range(2)
        )
        index_k_MBJ = torch.zeros(6, 128, 20, dtype=stored, device=triton_device)[..., :17] if index else None
        pool = Pool(k_MGBH, v_MGBH, index_k_MBJ)
        with openm3.use(name):
            write_pages(k_TGH, v_TGH, index_k_TJ, pool, slot_T)
        written.append(pool.tensors())
    for x, y in zip(*written, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_slots_outside_the_pool_store_nothing(triton_device: torch.device) -> None:
    pool = Pool(*(torch.zeros(5, 2, 128, 4, device=triton_device) for _ in range(2)), None)
    k_TGH = torch.ones(4, 2, 4, device=triton_device)
    write_pages(k_TGH, k_TGH, None, pool, torch.tensor([3, -1, 5 * 128, 1 << 40], device=triton_device))
    assert pool.k_MGBH[0, :, 3].eq(1).all()
    assert int(pool.k_MGBH.sum()) == int(pool.v_MGBH.sum()) == 8


def test_tiles_fill_the_machine(triton_device: torch.device) -> None:
    from openm3.ops.cache.triton import token_tile

    assert [token_tile(tokens, 9, 132) for tokens in (1, 64, 512, 8192)] == [1, 1, 8, 32]
